"""quickstart: when it kills, that nothing survives, what it compares, and that it fails when it must."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


quickstart = load_script(SCRIPT)

# A stand-in for the training program, with the same interface to the outside: a run whose loss depends on
# the iteration alone, so that what is tested is quickstart's own part. BROKEN selects a way of going wrong.
TRAINER = """
import argparse, json, os, pathlib, subprocess, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--recipe", required=True)
parser.add_argument("--overlay", action="append")
parser.add_argument("overrides", nargs="*")
options = parser.parse_args()
settings = dict(item.split("=", 1) for item in options.overrides)
save = pathlib.Path(settings["checkpoint.save"])
tracker = save / "latest_checkpointed_iteration.txt"
broken = pathlib.Path("BROKEN").read_text() if os.path.exists("BROKEN") else ""
resumes = tracker.exists() and broken != "starts afresh"
first = int(tracker.read_text()) + 1 if resumes else 1
if resumes and broken == "fails":
    print("the trainer says why")
    sys.exit(3)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if os.environ["RANK"] != "0":
    time.sleep(600 if resumes and broken == "hangs" else 0)
    sys.exit()
for iteration in range(first, int(settings["train.train_iters"]) + 1):
    time.sleep(0.03)
    loss = 1 / iteration + (1e-16 if resumes and broken == "differs" and iteration == 20 else 0)
    with open(settings["logger.metrics_path"], "a") as file:
        file.write(json.dumps({"iteration": iteration, "loss": loss}) + "\\n")
    if iteration % int(settings["checkpoint.save_interval"]) == 0:
        staged = save / f".saving-iter_{iteration:07d}-0"
        staged.mkdir(parents=True)
        staged.rename(save / f"iter_{iteration:07d}")
        tracker.write_text(str(iteration))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of quickstart.py and programs that take the place of the two it starts."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "scripts/prepare_data.py").write_text("import sys; print(*sys.argv[1:])")
    (tmp_path / "scripts/pretrain.py").write_text(TRAINER)
    return tmp_path


def run_quickstart(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(repository / "scripts/quickstart.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def living_descendants_of(repository: Path) -> list[str]:
    """Command lines of processes that work in `repository`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == repository:
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_a_run_that_resumes_exactly_is_reported_equal(repository: Path) -> None:
    result = run_quickstart(repository)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "40 iterations, 24 of them resumed from iteration 16: every loss is equal bit for bit"
    heading = next(n for n, line in enumerate(lines) if line.split()[:1] == ["iteration"] and "equal" in line)
    table = [line.split() for line in lines[heading + 1 : heading + 41]]
    assert [row[:4] for row in table] == [[str(n), repr(1 / n), repr(1 / n), "yes"] for n in range(1, 41)]
    assert " ".join(table[15][4:]) == "<- resumed from this checkpoint"
    assert next(n for n, row in enumerate(table, start=1) if "killed" in row) in range(19, 24)
    assert living_descendants_of(repository) == []


def test_a_fresh_start_deletes_only_what_quickstart_made(tmp_path: Path) -> None:
    stale = tmp_path / "runs/uninterrupted/metrics.jsonl"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with pytest.raises(quickstart.StepFailedError, match="holds files that are not quickstart's"):
        quickstart.make_fresh(tmp_path / "runs")
    assert stale.exists()
    (tmp_path / "runs" / quickstart.OWNER_MARK).touch()
    quickstart.make_fresh(tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [quickstart.OWNER_MARK]
    quickstart.make_fresh(tmp_path / "new/runs")
    assert (tmp_path / "new/runs").is_dir()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("fails", "training ended with exit status 1"),
        ("starts afresh", "expected the iterations 17 to 40, but the run made [1, 2, 3, "),
    ],
)
def test_a_run_that_does_not_resume_is_a_failure(repository: Path, broken: str, message: str) -> None:
    (repository / "BROKEN").write_text(broken)
    result = run_quickstart(repository)
    assert result.returncode == 1
    assert f"quickstart: {message}" in result.stderr
    assert f"--- all of it: {repository}/runs/quickstart/interrupted/log.txt" in result.stderr
    assert ("the trainer says why" in result.stderr) == (broken == "fails")
    assert living_descendants_of(repository) == []


def test_one_loss_that_differs_in_its_last_bit_is_a_failure(repository: Path) -> None:
    (repository / "BROKEN").write_text("differs")
    result = run_quickstart(repository)
    assert result.returncode == 1
    assert result.stdout.endswith("resumed from iteration 16: losses that differ: 1, the first at iteration 20\n")


def test_killing_a_job_reaches_processes_in_other_sessions_and_spares_the_rest(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "subprocess.Popen(sleep, start_new_session=True)\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: time.sleep(600)\n"  # its parent ends: an orphan
        "    os._exit(0)\n"
        "time.sleep(600)\n"
    )
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with quickstart.Job(["-c", program], tmp_path / "log") as job:
            run_id = job._run_id
            deadline = time.monotonic() + 20
            while len(quickstart.processes_of(run_id)) != 3 and time.monotonic() < deadline:  # one ends at once
                time.sleep(0.02)
            assert len(quickstart.processes_of(run_id)) == 3
            job.kill()
            assert quickstart.processes_of(run_id) == []
            assert job.exit_status() == -9
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    ("iteration", "published", "saving", "expected"),
    [
        (12, [8], False, False),  # one checkpoint only
        (16, [8, 16], False, False),  # at the save
        (18, [8, 16], False, False),
        (19, [8, 16], False, True),
        (19, [8, 16], True, False),  # an asynchronous save is still going on
        (19, [8], False, False),  # the checkpoint of 16 is not published yet
        (22, [8, 16], False, True),
        (23, [8, 16], False, False),  # the next save is near
        (25, [8, 16], False, False),  # the checkpoint of 24 is not published yet
        (28, [8, 16, 24], False, True),
    ],
)
def test_the_moment_to_kill(iteration: int, published: list[int], saving: bool, expected: bool) -> None:
    assert quickstart.is_between_saves(iteration, published, saving, save_interval=8) is expected


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    for name in ("iter_0000020", "iter_0000008", "iter_best", "iter_0000030_bak", ".trash-iter_0000004-1"):
        (tmp_path / name).mkdir()
    assert quickstart.published_iterations(tmp_path) == [8, 20]
    assert not quickstart.save_in_progress(tmp_path)
    (tmp_path / ".saving-iter_0000028-x").mkdir()
    assert quickstart.published_iterations(tmp_path) == [8, 20]
    assert quickstart.save_in_progress(tmp_path)
    assert quickstart.published_iterations(tmp_path / "absent") == []


def test_losses_are_read_exactly_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert quickstart.read_losses(metrics) == []
    metrics.write_text('{"iteration": 1, "loss": 8.300000000000001}\n{"iteration": 2, "loss": 8.2, "lr')
    assert quickstart.read_losses(metrics) == [(1, 8.300000000000001)]


def test_the_table() -> None:
    comparison = quickstart.Comparison(
        uninterrupted={1: 3.5, 2: 3.25, 3: 3.0, 4: 2.5},
        before_kill={1: 3.5, 2: 3.25, 3: 3.0},
        after_resume={2: 3.25, 3: 3.0, 4: 2.75},
    )
    assert comparison.table().splitlines() == [
        "iteration  uninterrupted run     resumed run           equal",
        "        1  3.5                   3.5                   yes    <- resumed from this checkpoint",
        "        2  3.25                  3.25                  yes    trained again",
        "        3  3.0                   3.0                   yes    <- killed here; trained again",
        "        4  2.5                   2.75                  NO",
    ]
    assert comparison.differing() == [4]


def test_a_repeated_iteration_is_equal_only_if_both_of_its_losses_are() -> None:
    comparison = quickstart.Comparison(
        uninterrupted={1: 3.5, 2: 3.25}, before_kill={1: 3.5, 2: 3.0}, after_resume={2: 3.25}
    )
    assert comparison.differing() == [2]


def test_too_few_iterations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(["--iterations", "23"])
    assert "need at least 24" in capsys.readouterr().err


def test_ending_quickstart_ends_its_jobs(repository: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(repository / "scripts/quickstart.py")],
        cwd=os.fspath(repository.parent),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = repository / "runs/quickstart/uninterrupted/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 128 + 15
    assert living_descendants_of(repository) == []


def test_the_real_thing(tmp_path: Path) -> None:
    """The main job, shortened, as `make quickstart` does it; the data it prepares is kept for the next time."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--iterations", "32", "--work-dir", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("of them resumed from iteration 16: every loss is equal bit for bit\n")
