"""Saves that writers have finished after their trainers were gone: what the next start makes of them, and of what not.

That a trainer may be killed at any moment is tried in tests/faults/test_processes.py. Here the ranks leave a save by
themselves, and what they have left is changed before the next start looks at it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from bridge.training.checkpointing import commit, inheritance, recovery
from bridge.training.checkpointing.catalog.listing import list_all
from bridge.training.checkpointing.catalog.repairing import plan_repairs, repair
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.formats.planning import Places
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, read_manifest
from bridge.training.checkpointing.io.bequest import Bequest
from bridge.training.checkpointing.layout import BEQUEST_PREFIX, bequest_name, list_checkpoints
from bridge.training.checkpointing.queue import queue_of
from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.checkpointing.io.test_asynchronous_saves import finish, save
from tests.training.tiny import tiny_config


def leave_a_save(cfg: Any) -> None:
    """Publish iteration 1, then begin to save iteration 2 and end."""
    run = setup(cfg)
    save(run, 1)
    finish(run)
    with torch.no_grad():
        for parameter in run.model[0].parameters():
            parameter.fill_(2.0)
    save(run, 2)
    queue_of(run.state).abort()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two ranks that have left the save of iteration 2 to their writers."""
    directory = tmp_path_factory.mktemp("left") / "save"
    run_ranks(leave_a_save, 2, tiny_config(checkpoint={"save": str(directory), "async_save": True}))
    for _ in range(200):
        if inheritance.is_complete(staging_in(directory)):
            return directory
        time.sleep(0.1)
    raise AssertionError(f"{sorted(path.name for path in staging_in(directory).iterdir())}")


@pytest.fixture
def save_dir(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(inheritance, "_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(inheritance, "_NOTICE_SECONDS", 0.5)
    return Path(shutil.copytree(left, tmp_path / "save"))


def staging_in(directory: Path) -> Path:
    (name,) = list_checkpoints(directory).leftovers
    return directory / name


def published(directory: Path) -> tuple[tuple[int, ...], int]:
    """The checkpoints, and the one that the tracker names; nothing else may be left."""
    listing = list_checkpoints(directory)
    assert listing.leftovers == ()
    for iteration in listing.iterations:
        path = directory / f"iter_{iteration:07d}"
        manifest = read_manifest(path)
        assert manifest is not None
        assert find_damage(path, manifest.files, checksums=True) == []
        names = {found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()}
        assert names == {record.name for record in manifest.files} | {"manifest.json"}
    return listing.iterations, int(read_train_state(directory / "latest_train_state.pt")["step"])


def test_it_is_published_as_the_run_would_have_published_it(save_dir: Path) -> None:
    assert recovery.unpublished(save_dir) == {}
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)
    first, second = (read_manifest(save_dir / f"iter_000000{number}") for number in (1, 2))
    assert first is not None and second is not None
    assert {record.name for record in first.files} == {record.name for record in second.files}
    for field in ("checkpoint_format", "world_size", "parallel_sizes", "versions", "start", "checksum"):
        assert getattr(first, field) == getattr(second, field)
    old, new = (FileSystemReader(save_dir / f"iter_000000{number}").read_metadata() for number in (1, 2))
    assert old.state_dict_metadata == new.state_dict_metadata
    assert old.storage_data.keys() == new.storage_data.keys()
    assert (save_dir / "latest_checkpointed_iteration.txt").read_text() == "2"
    for io_backend in ("direct", "stock"):
        loading = tiny_config(checkpoint={"load": str(save_dir), "io_backend": io_backend})
        assert run_ranks(loaded_values, 2, loading) == [{2.0}, {2.0}]


def loaded_values(cfg: Any) -> set[float]:
    run = setup(cfg)
    return {float(value) for parameter in run.model[0].parameters() for value in parameter.detach().unique()}


def test_a_writer_that_is_still_at_it_is_waited_for(save_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = staging_in(save_dir) / bequest_name(1)
    content = file.read_bytes()
    file.write_bytes(b"")

    def go_on() -> None:
        for _ in range(12):  # longer than it is waited for without a sign
            time.sleep(0.4)
            os.utime(file)
        file.write_bytes(content)

    writer = threading.Thread(target=go_on)
    writer.start()
    recovery.recover(save_dir)
    writer.join()
    assert published(save_dir) == ((1, 2), 2)


def keep_only_zero(staging: Path) -> None:
    (staging / bequest_name(1)).unlink()


def stay_silent(staging: Path) -> None:
    (staging / bequest_name(1)).write_bytes(b"")


def lose_bytes(staging: Path) -> None:
    file = staging / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def add_a_file(staging: Path) -> None:
    (staging / "stray").touch()


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], payload: bytes | None = None) -> None:
    """Change what a rank has left: the writer's line and the trainer's, and the rest."""
    _, written, given, found = file.read_bytes().split(b"\n", 3)
    lines = json.loads(written), json.loads(given)
    change(*lines)
    rest = found if payload is None else payload
    body = b"\n".join([*(json.dumps(line).encode() for line in lines), rest])
    file.write_bytes(json.dumps({"crc32": zlib.crc32(body)}).encode() + b"\n" + body)


def edit(change: Callable[[dict[str, Any], dict[str, Any]], Any], *ranks: int) -> Callable[[Path], None]:
    def apply(staging: Path) -> None:
        for rank in ranks or (1,):
            rewrite(staging / bequest_name(rank), change)

    return apply


def with_manifest(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A change of the manifest that a trainer has given."""

    def change(written: dict[str, Any], given: dict[str, Any]) -> None:
        given["manifest"] = replace(Manifest.from_json(given["manifest"]), **changes).to_json()

    return change


def make_a_pipe(staging: Path) -> None:
    (staging / bequest_name(1)).unlink()
    os.mkfifo(staging / bequest_name(1))


def make_a_link(staging: Path) -> None:
    file = staging / bequest_name(1)
    file.rename(staging.parent / "elsewhere")
    file.symlink_to(staging.parent / "elsewhere")


def lead_beyond_the_end(staging: Path) -> None:
    file = staging / bequest_name(1)
    payload = file.read_bytes().split(b"\n", 3)[3]
    places, _ = Places.from_bytes(payload)
    at, length = places.columns()
    rewrite(file, lambda *_: None, Places.of(at + 10**15, length).to_bytes())


def put_a_directory_in_the_way(staging: Path) -> None:
    (staging / ".metadata").mkdir()


def test_one_that_was_sealed_before_the_next_crash_is_published_with_its_trackers(save_dir: Path) -> None:
    assert inheritance.inherit(staging_in(save_dir))
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)


def test_one_whose_manifest_is_cut_short_is_completed(save_dir: Path) -> None:
    staging = staging_in(save_dir)
    (staging / ".metadata").write_bytes(b"half")
    (staging / "manifest.json").write_bytes(b"{")
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)


def test_of_two_the_newer_one_is_tracked(save_dir: Path) -> None:
    later = Path(shutil.copytree(staging_in(save_dir), save_dir / ".saving-iter_0000003-00000000"))
    (later / "common.pt").write_bytes((later / "common.pt").read_bytes())
    edit(with_manifest(iteration=3), 0, 1)(later)
    recovery.recover(save_dir)
    listing = list_checkpoints(save_dir)
    assert (listing.iterations, listing.leftovers) == ((1, 2, 3), ())
    assert (save_dir / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.parametrize(("step", "number"), [("sync_file", errno.ENOSPC), ("_read", errno.EIO)])
def test_what_cannot_be_published_now_is_kept(
    step: str, number: int, save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    staging = staging_in(save_dir)
    with monkeypatch.context() as patch:
        patch.setattr(inheritance, step, refuse)
        recovery.recover(save_dir)
    assert list_checkpoints(save_dir).leftovers == (staging.name,)
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)


def test_a_published_checkpoint_has_none_whoever_comes_first(tmp_path: Path) -> None:
    staging = tmp_path / ".saving-iter_0000001-00000000"
    staging.mkdir()
    descriptor = os.open(staging, os.O_RDONLY)
    late, early = Bequest(bequest_name(1), descriptor), Bequest(bequest_name(2), descriptor)
    for each in (late, early):
        each.complete({"files": []}, b"")
    early.leave()
    assert [path.name for path in staging.iterdir()] == [".bequest-2"]
    final = commit.publish(staging, 1)
    late.show_life()
    late.leave()
    for each in (late, early):
        each.close()
    assert [*final.iterdir()] == []


def test_a_sign_of_life_takes_nothing_away_that_has_been_left(tmp_path: Path) -> None:
    staging = tmp_path / ".saving-iter_0000001-00000000"
    staging.mkdir()
    bequest = Bequest(bequest_name(0), os.open(staging, os.O_RDONLY))
    bequest.show_life()
    assert (staging / bequest_name(0)).stat().st_size == 0
    bequest.complete({"files": []}, b"content")
    stop = threading.Event()

    def show() -> None:
        while not stop.is_set():
            bequest.show_life()

    watch = threading.Thread(target=show)
    watch.start()
    bequest.leave()
    time.sleep(0.05)
    stop.set()
    watch.join()
    bequest.close()
    assert (staging / bequest_name(0)).read_bytes().endswith(b"content")
    assert [path.name for path in staging.iterdir()] == [bequest_name(0)]


def test_a_sign_of_life_of_a_save_that_failed_is_taken_away(tmp_path: Path) -> None:
    staging = tmp_path / ".saving-iter_0000001-00000000"
    staging.mkdir()
    bequest = Bequest(bequest_name(0), os.open(staging, os.O_RDONLY))
    bequest.show_life()
    bequest.leave()
    bequest.close()
    assert [*staging.iterdir()] == []


def test_repair_says_so_and_does_it(save_dir: Path) -> None:
    staging = staging_in(save_dir)
    planned = plan_repairs(save_dir)
    text = f"publish iter_0000002, which writers have completed as {staging.name} after their run had died"
    assert [each.text for each in planned.repairs] == [text]
    assert staging.exists()
    note = f"writers have completed iter_0000002 as {staging} after their run had died"
    assert any(each.startswith(note) for each in list_all(save_dir).notes)
    assert [each.text for each in repair(save_dir).repairs] == [text]
    assert published(save_dir) == ((1, 2), 2)


def test_nothing_is_left_of_a_save_that_was_published(left: Path) -> None:
    assert not [*(left / "iter_0000001").glob(f"{BEQUEST_PREFIX}*")]


def test_a_damaged_plan_takes_no_memory(save_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = staging_in(save_dir) / bequest_name(0)
    payload = bytearray(file.read_bytes().split(b"\n", 3)[3])
    at = payload.index(b"BRIDGEMD")
    payload[at + 8 : at + 16] = (1 << 60).to_bytes(8, "little")
    rewrite(file, lambda *_: None, bytes(payload))
    with caplog.at_level(logging.WARNING):
        recovery.recover(save_dir)
    assert published(save_dir) == ((1,), 1)
    assert "cut short or garbled" in caplog.text


def make_it_huge(staging: Path) -> None:
    os.truncate(staging / bequest_name(1), 1 << 36)


def flip_a_digit(staging: Path) -> None:
    file = staging / bequest_name(1)
    data = file.read_bytes()
    at = data.index(b'"files"') + 40
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def make_a_bomb(staging: Path) -> None:
    """Places that say they are many more bytes than the plan has shards for."""
    packed = zlib.compress(bytes(1 << 26))
    rewrite(staging / bequest_name(1), lambda *_: None, struct.pack("<QQ", len(packed), 1 << 22) + packed)


def cut(rank: int, size: int) -> Callable[[Path], None]:
    def apply(staging: Path) -> None:
        file = staging / bequest_name(rank)
        file.write_bytes(file.read_bytes()[:size])

    return apply


def of_iteration_three(staging: Path) -> None:
    staging.rename(staging.with_name(staging.name.replace("iter_0000002", "iter_0000003")))


def swap(staging: Path) -> None:
    """The places of rank 1 are then not as many as were planned for it, or no file of rank 0 is accounted for."""
    shutil.copyfile(staging / bequest_name(0), staging / bequest_name(1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (keep_only_zero, "nothing was heard of the other ranks' writers"),
        (stay_silent, "nothing was heard of the other ranks' writers"),
        (lose_bytes, "a shard lies beyond the end of its file"),
        (add_a_file, "stray was written by nobody"),
        (of_iteration_three, "rank 0 has left iteration 2"),
        (swap, "it is of rank 0 and of version 1"),
        (cut(1, -1), "it is damaged"),
        (cut(0, -9), "it is damaged"),
        (cut(0, 10), "cannot be completed"),
        (cut(1, 10), "cannot be completed"),
        (flip_a_digit, "it is damaged"),
        (make_a_pipe, "nothing was heard of the other ranks' writers"),
        (make_a_link, "nothing was heard of the other ranks' writers"),
        (lead_beyond_the_end, "a shard lies beyond the end of its file"),
        (put_a_directory_in_the_way, "Is a directory"),
        (make_it_huge, "no file of a size that makes sense"),
        (make_a_bomb, "the places of the shards are not as many as were planned"),
        (edit(lambda written, given: given.update(version=2)), "it is of rank 1 and of version 2"),
        (edit(lambda written, given: given.update(rank=0)), "it is of rank 0 and of version 1"),
        (edit(lambda written, given: given.update(manifest="{}")), "ValueError: its format_version is None"),
        (edit(lambda written, given: given.pop("manifest")), "KeyError: 'manifest'"),
        (edit(lambda written, given: written.update(files=7)), "what rank 1 has left cannot be read: TypeError"),
        (edit(lambda written, given: written["files"][0].__setitem__(0, "../x")), "'../x' leaves the checkpoint"),
        (edit(lambda written, given: written["files"][0].__setitem__(1, -1)), "is -1"),
        (edit(lambda written, given: written.update(checksum="none")), "what rank 1 has left cannot be read"),
        (edit(with_manifest(world_size=10**20), 0, 1), "nothing was heard of"),
        (edit(with_manifest(world_size=0), 0, 1), "nothing was heard of"),
        (edit(with_manifest(start=7)), "rank 1 has left another save than rank 0"),
        (edit(with_manifest(checkpoint_format="evil.Strategy"), 0, 1), "'evil.Strategy' cannot be completed"),
        (edit(with_manifest(checkpoint_format="zarr"), 0, 1), "'zarr' cannot be completed"),
    ],
)
def test_what_does_not_make_up_a_whole_is_removed(
    change: Callable[[Path], None], reason: str, save_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(staging_in(save_dir))
    recovery.recover(save_dir)
    assert published(save_dir) == ((1,), 1)
    assert reason in caplog.text
    assert "a save that did not finish" in caplog.text


def test_it_never_takes_the_place_of_a_checkpoint(save_dir: Path) -> None:
    shutil.copytree(save_dir / "iter_0000001", save_dir / "iter_0000002")
    before = (save_dir / "iter_0000002" / "manifest.json").read_bytes()
    recovery.recover(save_dir)
    assert (save_dir / "iter_0000002" / "manifest.json").read_bytes() == before
    assert list_checkpoints(save_dir).leftovers == ()


def test_trackers_that_somebody_has_moved_since_stay(save_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (save_dir / "latest_checkpointed_iteration.txt").write_text("0")
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 1)
    assert "the trackers stay where they are: they were moved after iter_0000002 was saved" in caplog.text


def test_a_tracker_that_cannot_be_moved_stops_nothing(save_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    def then(written: dict[str, Any], given: dict[str, Any]) -> None:
        given["trackers"] = commit.digest_of_trackers(save_dir)

    (save_dir / "latest_train_state.pt").unlink()
    (save_dir / "latest_train_state.pt").mkdir()
    edit(then, 0)(staging_in(save_dir))
    recovery.recover(save_dir)
    listing = list_checkpoints(save_dir)
    assert (listing.iterations, listing.leftovers) == ((1, 2), (".latest_train_state.pt.bridge-tmp",))
    assert "they cannot be moved" in caplog.text
    (save_dir / "latest_train_state.pt").rmdir()
    recovery.recover(save_dir)  # what the first one has left leads the second
    assert published(save_dir) == ((1, 2), 2)


def test_the_next_start_moves_the_trackers_if_the_first_is_cut_short(save_dir: Path) -> None:
    staging = staging_in(save_dir)
    assert inheritance.inherit(staging)
    staging.rename(save_dir / "iter_0000002")
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)


def test_a_checkpoint_that_was_damaged_before_its_trackers_moved_stops_nothing(save_dir: Path) -> None:
    staging = staging_in(save_dir)
    assert inheritance.inherit(staging)
    (staging / "manifest.json").write_bytes(b"{")
    staging.rename(save_dir / "iter_0000002")
    recovery.recover(save_dir)
    assert not [*(save_dir / "iter_0000002").glob(f"{BEQUEST_PREFIX}*")]
    assert (save_dir / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_a_first_sign_that_comes_late_is_waited_for(save_dir: Path) -> None:
    staging = staging_in(save_dir)
    bequests = {path: path.read_bytes() for path in staging.glob(f"{BEQUEST_PREFIX}*")}
    for path in bequests:
        path.unlink()

    def leave() -> None:
        time.sleep(0.4)
        for path, content in bequests.items():
            path.write_bytes(content)

    writer = threading.Thread(target=leave)
    writer.start()
    recovery.recover(save_dir)
    writer.join()
    assert published(save_dir) == ((1, 2), 2)


@pytest.mark.parametrize("checksum", ["crc32", "sha256"])
def test_a_rank_that_has_written_no_file_knows_the_kind_of_checksum(checksum: str, save_dir: Path) -> None:
    staging = staging_in(save_dir)

    def other_kind(written: dict[str, Any], given: dict[str, Any]) -> None:
        written["checksum"] = checksum
        for entry in written["files"]:
            record = FileRecord.of(staging, entry[0], checksum)
            entry[:] = [record.name, record.size, record.checksum, record.sample]

    def take(written: dict[str, Any], given: dict[str, Any]) -> None:
        written["files"] += json.loads((staging / bequest_name(1)).read_bytes().split(b"\n", 2)[1])["files"]

    edit(take, 0)(staging)
    edit(lambda written, given: written.update(files=[]), 1)(staging)
    edit(other_kind, 0, 1)(staging)
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)
