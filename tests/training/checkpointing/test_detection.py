"""Formats and trackers, told by the files alone."""

import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from bridge.training.checkpointing.detection import find_checkpoint_rank_0, get_checkpoint_format, read_metadata
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
)
from bridge.training.checkpointing.integrity import Manifest

TORCH_DIST = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
FSDP_CONFIG = "checkpoint:\n  ckpt_format: fsdp_dtensor\n"
TORCH_DIST_CONFIG = "checkpoint:\n  ckpt_format: torch_dist\n"
MANIFEST = Manifest(7, "zarr", 1, {}, {}, ()).to_json()


def dcp(*keys: str) -> bytes:
    """A `.metadata` with these keys."""
    return pickle.dumps(Metadata({key: BytesStorageMetadata() for key in keys}, storage_data={}))


OF_DCP, OF_MCORE = dcp("model.weight"), dcp("model.weight", "rng_state/shard_0.0_1.1")


def make(path: Path, **files: str | bytes) -> Path:
    """A directory with files by short name."""
    names = {
        "manifest": "manifest.json",
        "metadata": "metadata.json",
        "payload": ".metadata",
        "common": "common.pt",
        "config": "run_config.yaml",
        "shard": "__0_0.distcp",
        "other": "notes.txt",
    }
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / names[name]).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


FOUND: dict[str, tuple[dict[str, str | bytes], str | tuple[type[CheckpointError], str]]] = {
    "torch_dist": ({"metadata": TORCH_DIST, "payload": "", "common": ""}, "torch_dist"),
    "zarr": ({"metadata": '{"sharded_backend": "zarr"}', "common": ""}, "zarr"),
    "a format of the user's": ({"metadata": '{"sharded_backend": "flat"}'}, "flat"),
    "the manifest alone": ({"manifest": MANIFEST}, "zarr"),
    "a manifest beside a foreign .metadata": ({"manifest": MANIFEST, "payload": OF_DCP}, "zarr"),
    "fsdp_dtensor": ({"payload": OF_DCP, "config": FSDP_CONFIG}, "fsdp_dtensor"),
    "fsdp_dtensor without a configuration": ({"payload": OF_DCP}, "fsdp_dtensor"),
    "manifest and metadata.json differ": (
        {"manifest": MANIFEST, "metadata": TORCH_DIST},
        (
            CheckpointDamagedError,
            "is mixed up: manifest.json says that its format is 'zarr', and metadata.json says 'torch_dist'",
        ),
    ),
    "a torn manifest": (
        {"manifest": MANIFEST[:50], "metadata": TORCH_DIST, "payload": "", "common": ""},
        (CheckpointDamagedError, "manifest.json is not a readable manifest"),
    ),
    "torch_dist, metadata.json not yet written": (
        {"payload": OF_MCORE, "common": ""},
        (CheckpointDamagedError, "it has no metadata.json, and it has common.pt (perhaps its save did not end)"),
    ),
    "torch_dist, all but the payload lost": (
        {"payload": OF_MCORE, "config": TORCH_DIST_CONFIG},
        (CheckpointDamagedError, "it has no metadata.json and no common.pt, and is configured as 'torch_dist'"),
    ),
    "torch_dist, nothing but the payload": (
        {"payload": OF_MCORE},
        (CheckpointDamagedError, "has no metadata.json, and 'rng_state/shard_0.0_1.1' is a key of 'torch_dist'"),
    ),
    "a torn .metadata": ({"payload": OF_DCP[:40]}, (CheckpointDamagedError, ".metadata is not readable")),
    "torch_dist, shards not yet written": (
        {"common": "", "config": TORCH_DIST_CONFIG},
        (CheckpointDamagedError, "it has no metadata.json or .metadata; found in it: common.pt, run_config.yaml"),
    ),
    "shards alone": (
        {"shard": ""},
        (CheckpointDamagedError, "it has no metadata.json or .metadata; found in it: __0_0.distcp"),
    ),
    "torn metadata.json": (
        {"metadata": TORCH_DIST[:20], "payload": ""},
        (CheckpointDamagedError, "metadata.json does not say which format the checkpoint is in"),
    ),
    "metadata.json of something else": (
        {"metadata": "[1]", "payload": ""},
        (CheckpointDamagedError, "metadata.json does not say which format the checkpoint is in"),
    ),
    "a version that is no number": (
        {"metadata": '{"sharded_backend": "zarr", "sharded_backend_version": "2"}'},
        (CheckpointDamagedError, "its backend is 'zarr', version '2'"),
    ),
    "something else": (
        {"other": ""},
        (
            NotACheckpointError,
            "is not a checkpoint: it has no manifest.json, metadata.json or .metadata; found in it: notes.txt",
        ),
    ),
    "an empty directory": ({}, (NotACheckpointError, "found in it: nothing")),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_format_is_told_by_the_files(case: str, tmp_path: Path) -> None:
    files, expected = FOUND[case]
    path = make(tmp_path / "iter_0000007", **files)
    if isinstance(expected, str):
        assert get_checkpoint_format(path) == expected
        assert find_checkpoint_rank_0(str(tmp_path), 7) == str(path)
    else:
        kind, message = expected
        with pytest.raises(kind) as raised:
            get_checkpoint_format(str(path))
        assert type(raised.value) is kind
        assert str(path) in str(raised.value)
        assert message in str(raised.value)
        assert find_checkpoint_rank_0(str(tmp_path), 7) is None


def test_an_absent_directory_has_no_format(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint directory"):
        get_checkpoint_format(tmp_path / "absent")
    assert find_checkpoint_rank_0(str(tmp_path), 7) is None


def test_a_release_checkpoint_is_found_whatever_the_iteration(tmp_path: Path) -> None:
    path = make(tmp_path / "release", metadata=TORCH_DIST, payload="", common="")
    assert find_checkpoint_rank_0(str(tmp_path), 0, release=True) == str(path)
    assert find_checkpoint_rank_0(str(tmp_path), 0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", (1000, False)),
        ("1000\n", (1000, False)),
        ("0", (0, False)),
        ("release", (0, True)),
        ("release\n", (0, True)),
    ],
)
def test_a_tracker_names_an_iteration_or_a_release(text: str, expected: tuple[int, bool], tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    assert read_metadata(str(tracker)) == expected


@pytest.mark.parametrize("data", [b"", b"-3", b"12a", b"\xff\xfe", b"latest"])
def test_a_torn_tracker_is_a_typed_error(data: bytes, tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=r"latest_checkpointed_iteration\.txt"):
        read_metadata(tracker)
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "absent.txt")
