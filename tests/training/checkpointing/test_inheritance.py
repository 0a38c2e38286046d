"""Saves that writers have finished after their trainers were gone: what the next start makes of them, and of what not.

That a trainer may be killed at any moment is tried in tests/faults/test_processes.py. Here the ranks leave a save by
themselves, and what they have left is changed before the next start looks at it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from bridge.training.checkpointing import inheritance, recovery
from bridge.training.checkpointing.catalog.listing import list_all
from bridge.training.checkpointing.catalog.repairing import plan_repairs, repair
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.integrity import find_damage, read_manifest
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


def edit(change: Callable[[dict[str, Any], dict[str, Any]], Any], rank: int = 1) -> Callable[[Path], None]:
    """Change what a rank has left: the writer's line and the trainer's."""

    def apply(staging: Path) -> None:
        file = staging / bequest_name(rank)
        written, given, payload = file.read_bytes().split(b"\n", 2)
        lines = json.loads(written), json.loads(given)
        change(*lines)
        file.write_bytes(b"\n".join([*(json.dumps(line).encode() for line in lines), payload]))

    return apply


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
        (lose_bytes, "__1_0.distcp has "),
        (add_a_file, "stray was written by nobody"),
        (of_iteration_three, "rank 0 has left iteration 2"),
        (swap, "cannot be completed: ValueError"),
        (cut(1, -1), "cannot be completed: ValueError"),
        (cut(0, -9), "cannot be completed: ValueError"),
        (cut(0, 10), "nothing was heard of the other ranks' writers"),
        (cut(1, 10), "cannot be completed"),
        (edit(lambda written, given: given.update(version=2)), "rank 1 has left is of version 2"),
        (edit(lambda written, given: given.update(manifest="{}")), "cannot be completed: ValueError"),
        (edit(lambda written, given: given.pop("manifest")), "cannot be completed: KeyError"),
        (edit(lambda written, given: written.update(files=7)), "cannot be completed: TypeError"),
        (edit(lambda written, given: written["files"][0].__setitem__(0, "../x")), "cannot be completed"),
        (edit(lambda written, given: written.update(checksum="none")), "cannot be completed: ValueError"),
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


def test_trackers_that_somebody_has_moved_since_stay(save_dir: Path) -> None:
    os.utime(save_dir / "latest_checkpointed_iteration.txt")
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 1)


def test_one_that_was_sealed_before_the_next_crash_is_published_with_its_trackers(save_dir: Path) -> None:
    staging = staging_in(save_dir)
    bequests = {path.name: path.read_bytes() for path in staging.glob(f"{BEQUEST_PREFIX}*")}
    assert inheritance.inherit(staging)
    for name, content in bequests.items():
        (staging / name).write_bytes(content)
    recovery.recover(save_dir)
    assert published(save_dir) == ((1, 2), 2)


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
    content = bytearray(file.read_bytes())
    at = content.index(b"BRIDGEMD")
    content[at + 8 : at + 16] = (1 << 60).to_bytes(8, "little")
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        recovery.recover(save_dir)
    assert published(save_dir) == ((1,), 1)
    assert "cut short or garbled" in caplog.text
