"""The launchers in scripts/launch start what they say. Slurm's programs are small stand-ins; the shell is real."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from bridge.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "scripts" / "launch"
SCRIPTS = sorted(path for path in LAUNCHERS.iterdir() if path.suffix in (".sh", ".sbatch"))

STAND_IN = """\
#!/usr/bin/env bash
{body}
"""


def stand_in(directory: Path, name: str, body: str) -> Path:
    """A program of that name in `directory`."""
    path = directory / name
    path.write_text(STAND_IN.format(body=body))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_shell(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck") or str(ROOT / ".venv/bin/shellcheck")
    result = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def words_of(script: str, tmp_path: Path, arguments: list[str], **variables: str) -> list[str]:
    """What a launcher starts Python with."""
    python = stand_in(tmp_path, "python", "printf '%s\\n' \"$@\"")
    stand_in(tmp_path, "nvidia-smi", "echo GPU 0; echo GPU 1; echo GPU 2")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), **variables}
    command = [LAUNCHERS / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


ARGUMENTS = ["--recipe", "a recipe.yaml", "checkpoint.save=runs/mine"]


def test_one_machine_starts_a_rank_for_each_gpu(tmp_path: Path) -> None:
    started = words_of("one_machine.sh", tmp_path, ARGUMENTS)
    options = ["--standalone", "--nproc-per-node", "3", "--max-restarts", "3", "--shutdown-timeout", "600"]
    assert started == ["-m", "torch.distributed.run", *options, "scripts/pretrain.py", *ARGUMENTS]


def test_one_machine_takes_its_settings_from_the_environment(tmp_path: Path) -> None:
    settings = {"NPROC_PER_NODE": "5", "MAX_RESTARTS": "0", "SAVE_SECONDS": "90"}
    started = words_of("one_machine.sh", tmp_path, ARGUMENTS, **settings)
    assert started[2:9] == ["--standalone", "--nproc-per-node", "5", "--max-restarts", "0", "--shutdown-timeout", "90"]


def test_several_machines_meet_at_the_rendezvous(tmp_path: Path) -> None:
    started = words_of("several_machines.sh", tmp_path, ARGUMENTS, NODES="4", RENDEZVOUS="first:29400", RUN_ID="mine")
    options = dict(zip(started[2:-4:2], started[3:-4:2], strict=True))
    assert options == {
        "--nnodes": "4",
        "--nproc-per-node": "3",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "first:29400",
        "--rdzv-id": "mine",
        "--shutdown-timeout": "600",
    }
    assert started[-4:] == ["scripts/pretrain.py", *ARGUMENTS]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "NODES: set NODES to the number of machines"),
        ({"NODES": "2"}, "RENDEZVOUS: set RENDEZVOUS to host:port of one of the machines"),
    ],
)
def test_several_machines_say_what_is_missing(given: dict[str, str], message: str) -> None:
    environment = {"PATH": os.environ["PATH"], **given}
    script = LAUNCHERS / "several_machines.sh"
    result = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert message in result.stderr


RANK = """\
echo "$RANK/$WORLD_SIZE local $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*" >>"$RECORDS/ranks"
trap 'exit 3' TERM
[ -n "${RUNS_UNTIL_SIGNALLED:-}" ] && while :; do sleep 0.05; done
exit "${STATUS:-0}"
"""

SRUN = """\
shift  # --kill-on-bad-exit=1
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    while true; do
        wait "$pid"; status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""

SCONTROL = """\
if [ "$1" = show ]; then echo first; echo second; else echo "$*" >>"$RECORDS/scontrol"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on a cluster of stand-ins."""
    (tmp_path / "records").mkdir()
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", SCONTROL)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(stand_in(tmp_path, "python", RANK)),
        "RECORDS": str(tmp_path / "records"),
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_JOB_ID": "17",
    }


def batch(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [LAUNCHERS / "slurm.sbatch", *ARGUMENTS]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def records(environment: dict[str, str], name: str) -> list[str]:
    path = Path(environment["RECORDS"]) / name
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_slurm_starts_a_rank_a_task(slurm: dict[str, str]) -> None:
    job = batch(slurm)
    job.communicate(timeout=30)
    assert job.returncode == 0
    words = f"scripts/pretrain.py {' '.join(ARGUMENTS)} train.exit_signal_handler=true train.exit_signal=SIGTERM"
    assert records(slurm, "ranks") == [f"{rank}/2 local {rank} at first:29500: {words}" for rank in (0, 1)]
    assert records(slurm, "scontrol") == []


@pytest.mark.parametrize(
    ("status", "ends_with", "queued"), [(3, 0, True), (16, 0, True), (1, 1, False), (17, 17, False)]
)
def test_slurm_requeues_what_asks_for_it(slurm: dict[str, str], status: int, ends_with: int, queued: bool) -> None:
    job = batch({**slurm, "STATUS": str(status)})
    job.communicate(timeout=30)
    assert job.returncode == ends_with
    assert records(slurm, "scontrol") == ["requeue 17"] * queued


def test_slurm_passes_the_warning_on_as_the_exit_signal(slurm: dict[str, str]) -> None:
    job = batch({**slurm, "RUNS_UNTIL_SIGNALLED": "1"})
    deadline = time.monotonic() + 30
    while len(records(slurm, "ranks")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # a stand-in of a rank sets its trap after it has written its line
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert job.returncode == 0
    assert records(slurm, "scontrol") == ["requeue 17"]


def test_the_job_of_kubernetes_is_a_run_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((LAUNCHERS / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["minReplicas"]
    assert int(command[command.index("--shutdown-timeout") + 1]) < pod["terminationGracePeriodSeconds"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    arguments = command[command.index("scripts/pretrain.py") + 1 :]
    assert [arguments[0], arguments[2]] == ["--recipe", "--overlay"]
    config = load_config(ROOT / arguments[1], [ROOT / arguments[3]], arguments[4:])
    ranks = worker["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    config.validate(world_size=ranks)
    assert int(job["spec"]["nprocPerNode"]) * worker["replicas"] == ranks
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert config.checkpoint.save.startswith(container["volumeMounts"][0]["mountPath"])
