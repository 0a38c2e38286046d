"""Room for a save: what is refused before it begins, and what a really full disk does to a save under way."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from bridge.training.checkpointing import CheckpointError, CheckpointSaveContext, NotEnoughSpaceError
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.disk import (
    Claim,
    Estimate,
    SharedDirectory,
    Space,
    as_text,
    available_bytes,
    require_local,
    shortages,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest, read_manifest, write_manifest
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints
from bridge.training.checkpointing.retention.policies import MostRecent
from bridge.training.checkpointing.retention.trash import Trash
from bridge.training.checkpointing.room import room_for
from bridge.training.checkpointing.starts import STARTS, Starts, write_starts
from bridge.training.checkpointing.tiers.global_directory import GlobalTier
from bridge.training.checkpointing.transaction import SaveTarget
from bridge.training.setup import Run, setup
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.tiny import tiny_config

MIB = 1 << 20
DISK = 32 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path, leave: int) -> Path:
    """Fill a file system with a file until only `leave` bytes are available."""
    free = available_bytes(path)
    assert free is not None
    filler = path.parent / "disk" / ".filler"
    filler.write_bytes(bytes(free - leave))
    return filler


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536 * MIB, "1.5 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert as_text(size) == text


@pytest.mark.parametrize(
    ("available", "reclaimable", "short"),
    [(100, 0, False), (101, 0, False), (99, 0, True), (99, 50, True), (0, 200, True)],
)
def test_what_is_yet_to_be_deleted_is_no_room(available: int, reclaimable: int, short: bool) -> None:
    space = Space(available, retention=reclaimable, trash=reclaimable)
    assert (space.shortage(Estimate(100, "x")) is not None) is short


def test_the_shortage_names_needed_available_and_reclaimable() -> None:
    assert Space(3 * MIB, retention=7 * MIB, trash=2 * MIB).shortage(Estimate(5 * MIB, "as it was")) == (
        "5.0 MiB are needed (as it was) and 3.0 MiB are available; reclaimable are 7.0 MiB in checkpoints that "
        "retention would delete after this save, and 2.0 MiB in deleted ones whose files are still there"
    )


def claim(rank: int, node: str, needed: int, available: int | None, device: int = 1) -> Claim:
    return Claim(rank, (node, device), f"/{node}/{device}", needed, available)


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([claim(0, "a", 50, 100), claim(1, "a", 50, 100)], []),
        (
            [claim(0, "a", 50, 100), claim(1, "a", 51, 100)],
            ["rank 0, 1 in /a/1: 101 bytes are needed and 100 bytes are available"],
        ),
        ([claim(0, "a", 80, 100), claim(1, "b", 80, 100)], []),
        ([claim(0, "a", 80, 100), claim(1, "a", 80, 100, device=2)], []),
        (
            [claim(0, "a", 80, 100), claim(1, "b", 80, 40), claim(2, "a", 10, 95), claim(3, "c", 9, 8)],
            [
                "rank 1 in /b/1: 80 bytes are needed and 40 bytes are available",
                "rank 3 in /c/1: 9 bytes are needed and 8 bytes are available",
            ],
        ),
        ([claim(0, "a", 80, None)], []),
        ([], []),
    ],
)
def test_ranks_of_one_file_system_share_its_room(claims: list[Claim], expected: list[str]) -> None:
    assert shortages(claims) == expected


def test_the_room_of_a_directory_that_is_yet_to_be_made_is_that_above_it(disk: Path) -> None:
    found = os.statvfs(disk)
    assert available_bytes(disk / "a" / "b") == found.f_bavail * found.f_frsize == DISK
    (disk / "file").write_bytes(bytes(MIB))
    assert available_bytes(disk) == DISK - MIB


def make_checkpoint(directory: Path, iteration: int, size: int, start: int = 0) -> Path:
    path = directory / iteration_name(iteration)
    path.mkdir(parents=True)
    (path / "data").write_bytes(bytes(size))
    files = (FileRecord.of(path, "data"),)
    write_manifest(path, Manifest(iteration, "torch_dist", 1, {}, {}, files, created=1.0, start=start))
    return path


def shared(path: Path, trash: Trash | None = None, in_use: tuple[Path, ...] = (), keep: int = 2) -> SharedDirectory:
    return SharedDirectory(path, "checkpoint.save", (MostRecent(keep),), trash or Trash(), in_use)


def test_the_newest_checkpoint_with_a_manifest_is_the_measure(tmp_path: Path) -> None:
    directory = shared(tmp_path)
    assert directory.recent_size() is None
    make_checkpoint(tmp_path, 10, 1000)
    make_checkpoint(tmp_path, 9, 5000)
    (tmp_path / iteration_name(11)).mkdir()
    broken = make_checkpoint(tmp_path, 12, 7)
    (broken / "manifest.json").write_text("{")
    size = directory.recent_size()
    assert size == Estimate(1000, "as much as the checkpoint of iteration 10 there")


def test_the_error_says_what_is_needed_available_and_reclaimable(disk: Path) -> None:
    for iteration, size in ((1, MIB), (2, 2 * MIB), (3, 3 * MIB)):
        make_checkpoint(disk, iteration, size)
    rest = disk / ".trash-iter_0000000-0123abcd" / "deep"
    rest.mkdir(parents=True)
    (rest / "data").write_bytes(bytes(MIB // 2))
    fill(disk, leave=2 * MIB)
    directory = shared(disk)
    directory.require(Estimate(2 * MIB, "x"), 4)
    with pytest.raises(NotEnoughSpaceError) as caught:
        directory.require(Estimate(3 * MIB, "as much as the checkpoint of iteration 3 there"), 4)
    assert str(caught.value) == (
        f"checkpoint.save: not enough space in {disk} for the checkpoint of iteration 4: 3.0 MiB are needed (as much "
        "as the checkpoint of iteration 3 there) and 2.0 MiB are available; reclaimable are 3.0 MiB in checkpoints "
        "that retention would delete after this save, and 512.0 KiB in deleted ones whose files are still there. Free "
        "space there, name another directory, or keep fewer checkpoints (checkpoint.most_recent_k); to save without "
        "this check, set checkpoint.check_free_space to false"
    )


@pytest.mark.parametrize(
    ("iteration", "in_use", "expected"),
    [
        (4, False, "3.0 MiB in checkpoints"),
        (4, True, "1.0 MiB in checkpoints"),  # one of them is in use
        (3, False, "4.0 MiB in checkpoints"),  # the one that is replaced, and the oldest
        (1, False, "1.0 MiB in checkpoints"),  # after a rollback nothing newer is deleted
    ],
)
def test_what_retention_would_delete_is_what_it_deletes(
    disk: Path, iteration: int, in_use: bool, expected: str
) -> None:
    paths = [make_checkpoint(disk, number, number * MIB) for number in (1, 2, 3)]
    with pytest.raises(NotEnoughSpaceError) as caught:
        shared(disk, in_use=(paths[1],) if in_use else ()).require(Estimate(2 * DISK, "x"), iteration)
    assert expected in str(caught.value)


def test_non_persistent_checkpoints_are_judged_by_the_starts_of_the_save_directory(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_starts(disk, Starts().followed_by(1, 0))
    make_checkpoint(disk / "non_persistent", 3, MIB, start=1)
    cfg = tiny_config(checkpoint={"save": str(disk)})
    tier = GlobalTier.of(cfg.checkpoint, "a session", Trash())
    target = SaveTarget(tier.directory, 4, tier.kind)
    room = room_for(target, SimpleNamespace(cfg=cfg), {})
    assert room is not None
    with pytest.raises(NotEnoughSpaceError, match=r"reclaimable are 1\.0 MiB in checkpoints that retention"):
        room.require(Estimate(2 * DISK, "x"), 4)
    (disk / STARTS).write_text("damaged")  # retention would delete nothing then
    with pytest.raises(NotEnoughSpaceError, match="MiB are available"):
        room.require(Estimate(2 * DISK, "x"), 4)
    tier.forget_newer(2, Ranks.current())
    assert list_checkpoints(tier.directory).iterations == ()
    assert [record.getMessage() for record in caplog.records if STARTS in record.getMessage()] == []


def test_a_save_waits_for_deleted_checkpoints_if_that_makes_room(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = disk / ".trash-iter_0000001-0123abcd"
    gone.mkdir()
    for number in range(20):
        (gone / str(number)).write_bytes(bytes(MIB))
    trash = Trash(files_per_second=0.1)
    trash.delete([gone])
    with caplog.at_level(logging.WARNING):
        shared(disk, trash).require(Estimate(30 * MIB, "x"), 2)
    assert not gone.exists()
    (message,) = [record.getMessage() for record in caplog.records]
    room = "there is no room for the next checkpoint while deleted ones are still there; waiting until they are gone"
    assert message == f"{disk}: {room}"


def measure_states(cfg: Any) -> list[int]:
    """What the first save of this run is estimated at, and the second one, before which nothing else tells."""
    sizes: list[int] = []
    require = SharedDirectory.require

    def note(self: SharedDirectory, needed: Estimate, iteration: int) -> None:
        sizes.append(needed.size)
        require(self, needed, iteration)

    SharedDirectory.require = note  # type: ignore[method-assign]  # in this forked rank only: it listens, and asks
    run = setup(cfg)
    save(run, 1)
    on_first((Path(cfg.checkpoint.save) / iteration_name(1) / "manifest.json").unlink)
    save(run, 2)
    return sizes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ddp": {"use_distributed_optimizer": True}},
        {"model": {"tensor_model_parallel_size": 2}},
    ],
)
def test_replicas_are_counted_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    cfg = tiny_config(checkpoint={"save": str(tmp_path), "fully_parallel_save": True}, **settings)
    (estimate, again), nothing = run_ranks(measure_states, 2, cfg)
    assert nothing == []
    manifest = read_manifest(tmp_path / iteration_name(2))
    assert manifest is not None
    assert estimate == again == pytest.approx(manifest.total_bytes, rel=0.1)


def claim_room(near: Path, far: Path) -> list[str]:
    init_ranks()
    ranks = Ranks.current()
    directory = far if ranks.rank == 1 else near
    seen = []
    for needed in (MIB, DISK + 1):
        seen.append(
            outcome_of(lambda needed=needed: require_local(directory / "new", needed, 7, "checkpoint.x", ranks))
        )
    return seen


def test_every_rank_hears_that_one_of_them_has_no_room(tmp_path: Path, disk: Path) -> None:
    first, second = run_ranks(claim_room, 2, tmp_path, disk)
    assert first == second
    assert first == [
        "fine",
        "NotEnoughSpaceError: checkpoint.x: not enough space for the checkpoint of iteration 7: rank 1 in "
        f"{disk}/new: 32.0 MiB are needed and 32.0 MiB are available. Free space there, or name another directory; to "
        "save without this check, set checkpoint.check_free_space to false",
    ]


# --- real runs on a small disk ---


def outcome_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def save(run: Run, step: int) -> None:
    run.state.train_state.step = step
    run.manager.save(CheckpointSaveContext(run.state, run.model, run.optimizer, run.scheduler, 7), None)
    run.manager.finalize_async_saves(run.state, blocking=True)


def contents_of(path: Path) -> dict[str, bytes]:
    return {
        entry.relative_to(path).as_posix(): entry.read_bytes()
        for entry in path.rglob("*")
        if entry.is_file() and entry.name not in {".bridge-writer", ".bridge-starts", ".bridge-events.jsonl", ".filler"}
    }


def on_first(action: Callable[[], Any]) -> None:
    """Do something outside the save while no rank saves."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def save_on_a_small_disk(cfg: Any, disk: Path, leave: int) -> dict[str, Any]:
    """Save, fill the disk, fail, free it, and save again."""
    run = setup(cfg)
    seen: dict[str, Any] = {}
    on_first(lambda: fill(disk, leave=MIB))
    seen["first"] = outcome_of(lambda: save(run, 1))
    on_first((disk / ".filler").unlink)
    save(run, 2)
    before = contents_of(disk)
    on_first(lambda: fill(disk, leave))
    seen["second"] = outcome_of(lambda: save(run, 3))
    dist.barrier()  # rank 0 removes what the failed save has written
    seen["untouched"] = contents_of(disk) == before
    on_first((disk / ".filler").unlink)
    seen["third"] = outcome_of(lambda: save(run, 3))
    return seen


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_save_without_room_is_not_begun(disk: Path, mode: str) -> None:
    cfg = tiny_config(checkpoint={"save": str(disk), "async_save": mode == "async"})
    first, second = run_ranks(save_on_a_small_disk, 2, cfg, disk, MIB)
    assert first == second
    assert first["first"].startswith("NotEnoughSpaceError: checkpoint.save: not enough space in ")
    assert "(the bytes of the state)" in first["first"]
    assert first["second"].startswith("NotEnoughSpaceError: checkpoint.save: not enough space in ")
    assert "(the bytes of the state) and 1.0 MiB are available; " in first["second"]
    assert (first["untouched"], first["third"]) == (True, "fine")
    assert {path.name for path in disk.glob("*iter_*")} == {"iter_0000002", "iter_0000003"}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("writers", [1, 2])
def test_a_disk_that_is_full_in_mid_write_is_the_same_error_on_all_ranks(disk: Path, mode: str, writers: int) -> None:
    cfg = tiny_config(
        checkpoint={
            "save": str(disk),
            "async_save": mode == "async",
            "check_free_space": False,
            "save_retries": 0,
            "storage_writers_per_rank": writers,
        }
    )
    first, second = run_ranks(save_on_a_small_disk, 2, cfg, disk, 2 * MIB)
    assert first == second
    for name, iteration in (("first", 1), ("second", 3)):
        message = first[name]
        assert message.startswith(f"CheckpointSaveError: writing the persistent checkpoint of iteration {iteration} ")
        assert " on rank " in message
        assert "No space left on device" in message
    assert (first["untouched"], first["third"]) == (True, "fine")
    assert (disk / "latest_checkpointed_iteration.txt").read_text() == "3"


class Cure(logging.Handler):
    """Removes what fills the disk when a retry is announced."""

    def __init__(self, filler: Path) -> None:
        super().__init__()
        self.filler = filler

    def emit(self, record: logging.LogRecord) -> None:
        if "checkpoint.save_retries" in record.getMessage():
            self.filler.unlink(missing_ok=True)


def recover_in_mid_write(cfg: Any, disk: Path) -> str:
    run = setup(cfg)
    on_first(lambda: fill(disk, 2 * MIB))
    logging.getLogger("bridge.training.checkpointing").addHandler(Cure(disk / ".filler"))
    return outcome_of(lambda: save(run, 1))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_write_that_failed_is_made_anew_when_storage_has_recovered(disk: Path, mode: str) -> None:
    checkpoint = {"async_save": mode == "async", "check_free_space": False, "save_retry_seconds": 0.2}
    cfg = tiny_config(checkpoint={"save": str(disk), **checkpoint})
    assert run_ranks(recover_in_mid_write, 2, cfg, disk) == ["fine", "fine"]
    found = disk / iteration_name(1)
    manifest = read_manifest(found)
    assert manifest is not None
    reference = tiny_config(checkpoint={"save": str(disk / "reference")})
    run_ranks(lambda cfg: save(setup(cfg), 1), 2, reference)
    payload = sorted(found.glob("*.distcp"))
    assert len(payload) == 2
    assert [path.read_bytes() for path in payload] == [
        (disk / "reference" / found.name / path.name).read_bytes() for path in payload
    ]


def fail_to_move_the_trackers(cfg: Any) -> list[str]:
    """A tracker's temporary name is taken by a directory: the checkpoint is whole, and the trackers stay."""
    run = setup(cfg)
    save(run, 1)
    block = Path(cfg.checkpoint.save) / ".latest_train_state.pt.bridge-tmp"
    on_first(block.mkdir)
    seen = [outcome_of(lambda: save(run, 2))]
    on_first(block.rmdir)
    return [*seen, outcome_of(lambda: save(run, 3))]


def test_a_failure_after_the_rename_leaves_the_trackers_and_the_next_save_works(tmp_path: Path) -> None:
    cfg = tiny_config(checkpoint={"save": str(tmp_path)})
    first, second = run_ranks(fail_to_move_the_trackers, 2, cfg)
    assert first == second
    assert first[0].startswith("CheckpointSaveError: IsADirectoryError: ")
    assert first[1] == "fine"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


def save_locally(cfg: Any, disk: Path) -> list[str]:
    """Rank 1 keeps its local checkpoints on the small disk."""
    if os.environ["RANK"] == "1":
        cfg.checkpoint.non_persistent_local_ckpt_dir = str(disk)
    run = setup(cfg)

    def save_step(step: int) -> None:
        run.state.train_state.step = step
        context = CheckpointSaveContext(run.state, run.model, run.optimizer, run.scheduler, 7, non_persistent_ckpt=True)
        run.manager.save(context, None)

    seen = [outcome_of(lambda: save_step(1))]
    on_first(lambda: fill(disk, leave=MIB))
    return [*seen, outcome_of(lambda: save_step(2))]


def test_a_node_without_room_refuses_a_local_save_on_all_ranks(tmp_path: Path, disk: Path) -> None:
    local = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": str(tmp_path / "local")}
    cfg = tiny_config(checkpoint={"save": str(tmp_path / "runs"), **local})
    first, second = run_ranks(save_locally, 2, cfg, disk)
    assert first == second
    assert first[0] == "fine"
    assert first[1].startswith(
        "NotEnoughSpaceError: checkpoint.non_persistent_local_ckpt_dir: not enough space for the checkpoint of "
        "iteration 2: rank 1 in "
    )
    assert " are needed and 1.0 MiB are available. " in first[1]
