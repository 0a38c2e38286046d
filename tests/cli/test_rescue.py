"""Runs that are lost after an in-memory save, rescued in another process, and gone on with: bit for bit."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.cli.main import main
from bridge.training.checkpointing import ownership
from bridge.training.checkpointing.errors import CheckpointNotFoundError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import CheckpointRescued
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRACKER
from bridge.training.checkpointing.rescue import Held, newest_complete
from bridge.training.checkpointing.safety.safe_globals import load_torch_file
from bridge.training.checkpointing.source import require_whole
from bridge.training.checkpointing.tiers.session import session_of
from tests.distributed.launch import run_ranks
from tests.faults.killing import run_until
from tests.training.checkpointing.test_interop import STOCK_MCORE, run_stock
from tests.training.checkpointing.tiers.keepers import end_all_keepers_below, end_keeper, keepers_of
from tests.training.checkpointing.tiers.test_tier_resume import resume, run_and_lose
from tests.training.tiny import LAYOUTS, tiny_config


@pytest.fixture(autouse=True)
def no_keepers_left(tmp_path: Path) -> Iterator[None]:
    yield
    end_all_keepers_below(tmp_path)


def config(root: Path, *, train_iters: int = 6, model: dict[str, Any] | None = None, **more: Any) -> Any:
    """A run that saves into memory at every iteration and persistently at every other one."""
    settings: dict[str, Any] = {
        "save": str(root / "run"),
        "load": str(root / "run"),
        "save_interval": 2,
        "non_persistent_save_interval": 1,
        "non_persistent_ckpt_type": "in_memory",
    }
    return tiny_config(train_iters=train_iters, model=model or {}, checkpoint=settings | more)


def bridge_ckpt(*arguments: object) -> tuple[int, str, str]:
    """Run a command line in another process: its status, output and errors."""

    def run() -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
        return status, out.getvalue(), err.getvalue()

    (result,) = run_ranks(run, 1)
    return result


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def published(save_dir: Path) -> dict[str, Any]:
    """The checkpoints of a directory with their files, and what the trackers name."""
    found: dict[str, Any] = {path.name: files_in(path) for path in save_dir.glob("iter_*")}
    found["tracker"] = load_torch_file(save_dir / TRACKER, "tracker")["step"].item()
    found["legacy tracker"] = (save_dir / LEGACY_TRACKER).read_text()
    return found


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    described = [{key: (t.dtype, t.shape) for key, t in tensors.items()} for tensors in (found, expected)]
    assert described[0] == described[1]
    # The buckets of the optimizer have padding, which is not the same in any two runs. A load does not look at it.
    compared = [key for key in expected if "optimizer.distributed." not in key]
    assert [key for key in compared if not torch.equal(found[key], expected[key])] == []
    assert 10 < len(compared) < len(expected)


@pytest.mark.parametrize(
    ("layout", "algo"),
    [
        *((layout, "fully_parallel") for layout in ("DP2", "TP2", "PP2", "EP2")),
        *((layout, "atomic") for layout in ("DP2", "TP2", "PP2")),
    ],
)
def test_a_rescued_run_goes_on_bit_for_bit(tmp_path: Path, layout: str, algo: str) -> None:
    size, model = LAYOUTS[layout]
    settings = {"model": model, "non_persistent_local_ckpt_algo": algo}
    lost = run_ranks(lambda: run_and_lose(config(tmp_path, **settings), after=3), size)
    save_dir = tmp_path / "run"

    assert bridge_ckpt("rescue", save_dir, "--release") == (
        0,
        f"saved iteration 3 from memory to {save_dir}/iter_0000003\nended the keepers of rank 0, 1\n",
        "",
    )
    assert keepers_of(save_dir) == {}
    resumed = run_ranks(lambda: resume(config(tmp_path, **settings)), size)
    assert resumed == [("persistent", 3, seen[3]) for seen in lost]


@pytest.mark.parametrize(
    ("layout", "algo"),
    [
        ("TP2", "atomic"),
        pytest.param("PP2", "fully_parallel", marks=pytest.mark.slow),
        ("EP2", "fully_parallel"),
    ],
)
def test_a_rescued_checkpoint_is_what_the_run_would_have_saved(tmp_path: Path, layout: str, algo: str) -> None:
    size, model = LAYOUTS[layout]
    settings = {"model": model, "non_persistent_local_ckpt_algo": algo}
    run_ranks(lambda: run_and_lose(config(tmp_path, **settings), after=3), size)
    save_dir = tmp_path / "run"
    assert bridge_ckpt("rescue", save_dir, "--release")[0] == 0
    run_ranks(lambda: run_and_lose(config(tmp_path / "straight", save_interval=1, model=model), after=3), size)

    rescued, own = save_dir / "iter_0000003", tmp_path / "straight" / "run" / "iter_0000003"
    last = read_events(save_dir).events[-1]
    assert isinstance(last, CheckpointRescued)
    assert (last.iteration, last.path) == (3, str(rescued))
    assert {name for name in files_in(rescued) if not name.endswith(".distcp")} == {
        name for name in files_in(own) if not name.endswith(".distcp")
    }
    for name in files_in(own):
        if name == "train_state.pt" or name.startswith(("tokenizer/", "dataloader_state/")):
            found, expected = (load_torch_file(path / name, name) for path in (rescued, own))
            assert repr(found) == repr(expected), name
    by_rescue, by_run = read_manifest(rescued), read_manifest(own)
    assert by_rescue is not None
    assert by_run is not None
    assert (by_rescue.world_size, by_rescue.parallel_sizes) == (by_run.world_size, by_run.parallel_sizes)
    stock = [run_stock(STOCK_MCORE, path, tmp_path / "stock.pt") for path in (rescued, own)]
    assert_same_tensors(stock[0]["tensors"], stock[1]["tensors"])
    assert (stock[0]["common"], stock[0]["content"]) == (stock[1]["common"], stock[1]["content"])
    common = [load_torch_file(path / "common.pt", "common part") for path in (rescued, own)]
    assert repr(common[0]) == repr(common[1])


def test_a_rescued_checkpoint_loads_under_other_parallel_sizes(tmp_path: Path) -> None:
    tp2 = {"model": {"tensor_model_parallel_size": 2}, "dist_ckpt_optim_fully_reshardable": True}
    one = {"dist_ckpt_optim_fully_reshardable": True}
    run_ranks(lambda: run_and_lose(config(tmp_path, **tp2), after=3), 2)
    assert bridge_ckpt("rescue", tmp_path / "run", "--release")[0] == 0
    straight = tmp_path / "straight"
    run_ranks(lambda: run_and_lose(config(straight, save_interval=1, **tp2), after=3), 2)
    for size in (1, 2):
        rescued = run_ranks(lambda: resume(config(tmp_path, **one)), size)
        assert rescued == run_ranks(lambda: resume(config(straight, **one)), size)
        assert rescued[0][:2] == ("persistent", 3)


def test_copies_stand_in_for_what_a_keeper_lost(tmp_path: Path) -> None:
    settings = {"replication": True, "replication_jump": 1, "replication_factor": 2}
    lost = run_ranks(lambda: run_and_lose(config(tmp_path, **settings), after=3), 2)
    end_keeper(tmp_path / "run", rank=1)
    assert bridge_ckpt("rescue", tmp_path / "run", "--release")[0] == 0
    resumed = run_ranks(lambda: resume(config(tmp_path, **settings)), 2)
    assert resumed == [("persistent", 3, seen[3]) for seen in lost]


def test_what_cannot_or_need_not_be_rescued_changes_nothing(tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    run_ranks(lambda: run_and_lose(config(tmp_path), after=4), 2)
    before = published(save_dir)
    assert before["tracker"] == 4

    with claimed(save_dir) as pid:
        status, out, err = bridge_ckpt("rescue", save_dir)
        assert (status, out) == (1, "")
        assert err.startswith(f"error: SAVE_DIR: the run that saves in {save_dir} is alive (host ")
        assert f"process {pid}," in err

    nothing = "nothing to rescue: the newest iteration in memory is 3, and {} has the checkpoint of iteration 4\n"
    assert bridge_ckpt("rescue", save_dir) == (0, nothing.format(save_dir), "")
    assert keepers_of(save_dir).keys() == {0, 1}
    assert published(save_dir) == before

    end_keeper(save_dir, rank=1)
    assert bridge_ckpt("rescue", save_dir) == (
        1,
        "",
        "error: SAVE_DIR: the memory of this machine holds no complete set of snapshots of the run that saved in "
        f"{save_dir}: iteration 3 lacks that of rank 1 (of 2 ranks). If the other ranks' keepers are on other "
        "machines, start the run again there: it goes on from memory and then saves a persistent checkpoint\n",
    )
    end_keeper(save_dir, rank=0)
    assert bridge_ckpt("rescue", save_dir)[2] == (
        "error: SAVE_DIR: no keeper on this machine holds a snapshot of the run that saved in "
        f"{save_dir}; keepers end with the machine, with a run's planned end, and "
        "checkpoint.in_memory_release_minutes after a crash\n"
    )
    assert published(save_dir) == before
    assert bridge_ckpt("rescue", tmp_path / "absent")[2] == (
        f"error: SAVE_DIR: {tmp_path}/absent is not the checkpoint.save of a run with in-memory checkpoints: "
        "it has no .bridge-session\n"
    )
    assert not (tmp_path / "absent").exists()


@contextlib.contextmanager
def claimed(save_dir: Path, *, passing: bool = False) -> Iterator[int]:
    """Another process that saves in the directory, or only works there."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        ownership.claim(save_dir, passing=passing)
        os.write(told, b".")
        signal.pause()
    try:
        assert os.read(ready, 1) == b"."
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)


def test_by_force_the_tracker_goes_back_to_what_was_in_memory(tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    lost = run_ranks(lambda: run_and_lose(config(tmp_path), after=4), 2)
    assert bridge_ckpt("rescue", save_dir, "--force", "--release")[0] == 0
    assert published(save_dir)["tracker"] == 3
    resumed = run_ranks(lambda: resume(config(tmp_path)), 2)
    assert resumed == [("persistent", 3, seen[3]) for seen in lost]


def test_a_rescue_that_is_killed_leaves_what_was_there_and_can_be_repeated(tmp_path: Path) -> None:
    save_dir, kept = tmp_path / "run", tmp_path / "kept"
    lost = run_ranks(lambda: run_and_lose(config(tmp_path), after=3), 2)
    before = published(save_dir)
    shutil.copytree(save_dir, kept)

    def rescue() -> None:
        assert main(["rescue", str(save_dir)]) == 0

    killed, operations = run_until(None, save_dir, rescue, 1)
    assert not killed
    after = published(save_dir)
    assert after.keys() - before.keys() == {"iter_0000003"}
    seen = set()
    for operation in [2, operations // 3, operations // 2, *range(operations - 8, operations + 1, 2)]:
        shutil.rmtree(save_dir)
        shutil.copytree(kept, save_dir)
        killed, _ = run_until(operation, save_dir, rescue, 1)
        assert killed
        found = published(save_dir)
        if "iter_0000003" in found:
            require_whole(save_dir / "iter_0000003")
        seen.add(found["tracker"])
        assert found.items() <= {**after, **{name: found[name] for name in ("tracker", "legacy tracker")}}.items()
        assert found["tracker"] in (2, 3)
        assert before.keys() <= found.keys()
        status, out, err = bridge_ckpt("rescue", save_dir)
        assert status == 0, err
        if found["tracker"] == 3:
            assert out.startswith("nothing to rescue: ")
            assert published(save_dir) == found
        else:
            assert published(save_dir) == after
        assert not list(save_dir.glob(".saving-*"))
    assert 2 in seen
    end_all_keepers_below(tmp_path)
    resumed = run_ranks(lambda: resume(config(tmp_path)), 2)
    assert resumed == [("persistent", 3, seen_[3]) for seen_ in lost]


def test_the_command_lists_keepers_and_says_errors_in_one_line(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path), after=3), 2)
    session = session_of(tmp_path / "run")
    status, out, _ = bridge_ckpt("memory")
    rows = [line.split() for line in out.splitlines() if line.startswith(session)]
    assert status == 0
    keepers = keepers_of(tmp_path / "run")
    assert [(rank, pid, unit, *iterations) for _, rank, pid, _, unit, *iterations in rows] == [
        (str(rank), str(keepers[rank].pid), "MiB", "3") for rank in (0, 1)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bridge.cli", "rescue", str(tmp_path / "absent")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: SAVE_DIR: ")
    assert done.stderr.count("\n") == 1


def held(iteration: int, owner: int, save_id: str = "a", world_size: int = 2) -> tuple[Held, str]:
    return Held(iteration, owner, world_size, save_id), f"{iteration}{save_id}{owner}"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([held(3, 0), held(3, 1)], ["3a0", "3a1"]),
        ([held(3, 1), held(3, 0), held(4, 0)], ["3a0", "3a1"]),
        ([held(3, 0), held(3, 1), held(4, 1), held(4, 0)], ["4a0", "4a1"]),
        ([held(3, 0), held(3, 1), held(4, 0, "b"), held(4, 1, "c")], ["3a0", "3a1"]),
        ([held(9, 0, world_size=1), held(3, 0), held(3, 1)], ["9a0"]),
    ],
)
def test_the_newest_save_of_which_every_rank_is_there_is_taken(found: list[Any], expected: list[str]) -> None:
    assert newest_complete(found, "save") == expected


def test_what_is_missing_is_named_newest_first() -> None:
    found = [held(3, 1, world_size=4), held(4, 0, world_size=4), held(4, 3, world_size=4)]
    with pytest.raises(CheckpointNotFoundError) as raised:
        newest_complete(found, "save")
    assert (
        "save: iteration 4 lacks that of rank 1, 2 (of 4 ranks); iteration 3 lacks that of rank 0, 2, 3 (of 4 ranks). "
    ) in str(raised.value)
