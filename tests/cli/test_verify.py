"""verify: status 0 only if every published checkpoint is sound, and the file that is wrong by its name."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from bridge.training.checkpointing.catalog.payload import payload_problems
from bridge.training.checkpointing.catalog.reading import Reading
from bridge.training.checkpointing.catalog.verifying import _damage
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import (
    COMPACT_METADATA,
    LEGACY_TRACKER,
    MANIFEST,
    RUN_CONFIG,
    TRACKER,
    TRAIN_STATE,
)
from bridge.training.checkpointing.marks import mark
from tests.cli.commands import copied, flip, run, run_all

SHARD = "__1_0.distcp"


def test_what_is_sound(trained: Path) -> None:
    text, quiet, data, step, one = run_all(
        ["verify", trained],
        ["verify", trained, "--quiet"],
        ["verify", trained, "--json", "--level", "sizes"],
        ["verify", trained, "--step", 4],
        ["verify", trained / "iter_0000002", "--threads", 1],
    )
    assert [each.status for each in (text, quiet, data, step, one)] == [0] * 5
    assert [line.split()[:2] for line in text.out.splitlines()[:3]] == [[f"iter_000000{n}", "sound"] for n in (2, 4, 6)]
    assert quiet.out == "3 checkpoints, all sound\n"
    assert data.json["is_sound"] is True
    assert [each["problems"] for each in data.json["checkpoints"]] == [[], [], []]
    assert step.out.splitlines()[-1] == one.out.splitlines()[-1] == "1 checkpoint, all sound"


def test_a_byte_a_length_and_a_file(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    flip(save_dir / "iter_0000002" / SHARD)
    with (save_dir / "iter_0000004" / SHARD).open("r+b") as stream:
        stream.truncate(1000)
    (save_dir / "iter_0000006" / "tokenizer").mkdir(exist_ok=True)
    (save_dir / "iter_0000006" / SHARD).unlink()
    full, sizes = run_all(["verify", save_dir, "--json"], ["verify", save_dir, "--level", "sizes", "--json"])
    size = (trained / "iter_0000004" / SHARD).stat().st_size
    problems = [each["problems"] for each in full.json["checkpoints"]]
    assert full.status == sizes.status == 1
    assert problems[0][0].startswith(f"{SHARD} has xxh3 ")
    assert problems[1:] == [[f"{SHARD} has 1000 bytes instead of {size}"], [f"{SHARD} is missing"]]
    # A byte in the middle of a shard is not seen by its size.
    assert [each["problems"] for each in sizes.json["checkpoints"]] == [[], *problems[1:]]
    text = run("verify", save_dir)
    assert f"iter_0000004  DAMAGED  {SHARD} has 1000 bytes instead of {size}\n" in text.out
    assert "3 of 3 checkpoints NOT SOUND\n" in text.out


def test_without_a_manifest(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / "iter_0000002" / MANIFEST).unlink()
    for name in ("iter_0000004", "iter_0000006"):
        for file in (MANIFEST, RUN_CONFIG, TRAIN_STATE, COMPACT_METADATA):
            (save_dir / name / file).unlink()
    with (save_dir / "iter_0000006" / SHARD).open("r+b") as stream:
        stream.truncate(1000)
    found = run("verify", save_dir, "--json")
    assert found.status == 1
    ours, whole, cut = found.json["checkpoints"]
    assert ours["problems"] == [f"{MANIFEST} is missing, the last file that a save writes"]
    assert (whole["is_sound"], whole["has_checksums"]) == (True, False)
    assert cut["problems"][0].startswith(f"{SHARD} has 1000 bytes, and at least ")


def test_trackers_and_marks(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    mark(save_dir / "iter_0000004", "it was wrong once")
    marked = run("verify", save_dir)
    assert marked.status == 0
    assert "note: it is marked as damaged, and nothing is wrong with it; repair takes the mark off" in marked.out
    shutil.rmtree(save_dir / "iter_0000006")
    gone = run("verify", save_dir)
    assert gone.status == 1
    assert f"DAMAGED TRACKER: {save_dir / TRACKER} names iter_0000006, which does not exist\n" in gone.out
    (save_dir / TRACKER).write_bytes(b"no train state")
    assert "is not a readable train state" in run("verify", save_dir).out


def test_what_cannot_be_verified(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    missing, empty, step, level = run_all(
        ["verify", tmp_path / "missing"],
        ["verify", tmp_path / "empty"],
        ["verify", trained, "--step", 3],
        ["verify", trained, "--level", "half"],
    )
    assert missing.err.startswith(f"error: {tmp_path}/missing does not exist; name a directory of checkpoints")
    assert empty.err == f"error: there is no checkpoint in {tmp_path}/empty; name a directory of checkpoints\n"
    assert step.err == f"error: --step: 3 is not in {trained} (there: 2, 4, 6)\n"
    assert [each.status for each in (missing, empty, step, level)] == [1, 1, 1, 2]


def test_what_leads_nowhere_is_not_sound(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / "iter_0000006").rename(tmp_path / "elsewhere")
    (save_dir / "iter_0000006").symlink_to(tmp_path / "gone")
    every, one = run_all(["verify", save_dir], ["verify", save_dir, "--step", 6])
    assert (every.status, one.status) == (1, 1)
    assert f"iter_0000006  DAMAGED  it is a link to {tmp_path}/gone, which does not exist\n" in one.out
    assert "1 of 3 checkpoints NOT SOUND\n" in every.out
    assert f"DAMAGED TRACKER: {save_dir / TRACKER} names iter_0000006, which does not exist\n" in every.out


def test_what_is_left_of_our_own(trained: Path, tmp_path: Path) -> None:
    """Without its manifest and its configuration a checkpoint of ours is none of Megatron-LM's."""
    save_dir = copied(trained, tmp_path / "run")
    for name in (MANIFEST, RUN_CONFIG):
        (save_dir / "iter_0000002" / name).unlink()
    found = run("verify", save_dir, "--step", 2, "--json")
    assert found.status == 1
    expected = f"{MANIFEST} and {RUN_CONFIG} are missing: {COMPACT_METADATA} is of bridge"
    assert found.json["checkpoints"][0]["problems"] == [expected]
    (save_dir / "iter_0000002" / COMPACT_METADATA).unlink()
    (problem,) = run("verify", save_dir, "--step", 2, "--json").json["checkpoints"][0]["problems"]
    assert problem.startswith(f"{RUN_CONFIG} is missing, and so is {MANIFEST}")


def test_both_trackers_are_held_against_what_is_there(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    for text, message in (
        ("999", f"{save_dir / LEGACY_TRACKER} names iter_0000999, which does not exist"),
        ("garbage", f"{save_dir / LEGACY_TRACKER} holds 'garbage' where an iteration or 'release' belongs"),
    ):
        (save_dir / LEGACY_TRACKER).write_text(text)
        found = run("verify", save_dir, "--level", "sizes")
        assert found.status == 1
        assert f"DAMAGED TRACKER: {message}" in found.out


def test_each_is_called_by_its_place(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    beside = copied(trained, save_dir / "non_persistent")
    for file in (MANIFEST, RUN_CONFIG, TRAIN_STATE, COMPACT_METADATA):
        (save_dir / "iter_0000002" / file).unlink()
    (beside / TRACKER).write_bytes(b"no train state")
    found = run("verify", save_dir, "--level", "sizes")
    lines = found.out.splitlines()
    assert [line.split()[0] for line in lines if "  sound  " in line] == [
        *("iter_0000004", "iter_0000006"),
        *(f"non_persistent/iter_000000{n}" for n in (2, 4, 6)),
    ]
    assert "6 checkpoints: 5 sound, 1 without checksums as far as sizes and small files tell" in lines
    assert lines[-1] == f"To set the trackers right: bridge-ckpt repair {beside}"


def test_reading_ends_when_nobody_waits(trained: Path) -> None:
    path = trained / "iter_0000002"
    manifest = read_manifest(path)
    assert manifest is not None
    record = manifest.record(SHARD)
    assert record is not None
    with Reading.begun(1, None) as reading:
        assert _damage(path, reading, record) == []
    with pytest.raises(CancelledError):
        _damage(path, reading, record)


def test_arrays_without_a_manifest(tmp_path: Path) -> None:
    """The chunks of Zarr's arrays are looked for, and have one size."""
    array = tmp_path / "weight"
    (array / "c" / "0").mkdir(parents=True)
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [4, 4],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 2]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {"torch_dtype": "float32"},
    }
    (array / "zarr.json").write_text(json.dumps(metadata))
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    (tmp_path / "common.pt").write_bytes(b"")
    (array / "c" / "0" / "0").write_bytes(bytes(32))
    assert payload_problems(tmp_path) == (2, 32, ["weight/c/0/1 is missing"])
    (array / "c" / "0" / "1").write_bytes(bytes(16))
    assert payload_problems(tmp_path) == (2, 48, ["weight/c/0/1 has 16 bytes instead of 32"])
