"""Formats and trackers, told by the files alone."""

from pathlib import Path

import pytest

from bridge.training.checkpointing.detection import find_checkpoint_rank_0, get_checkpoint_format, read_metadata
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
)

TORCH_DIST = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
FSDP_CONFIG = "checkpoint:\n  ckpt_format: fsdp_dtensor\n"
TORCH_DIST_CONFIG = "checkpoint:\n  ckpt_format: torch_dist\n"


def make(path: Path, **files: str) -> Path:
    """A directory with files by short name."""
    names = {
        "metadata": "metadata.json",
        "payload": ".metadata",
        "common": "common.pt",
        "config": "run_config.yaml",
        "other": "notes.txt",
    }
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / names[name]).write_text(text)
    return path


FOUND: dict[str, tuple[dict[str, str], str | type[CheckpointError]]] = {
    "torch_dist": ({"metadata": TORCH_DIST, "payload": "", "common": ""}, "torch_dist"),
    "zarr": ({"metadata": '{"sharded_backend": "zarr"}', "common": ""}, "zarr"),
    "fsdp_dtensor": ({"payload": "", "config": FSDP_CONFIG}, "fsdp_dtensor"),
    "fsdp_dtensor without a configuration": ({"payload": ""}, "fsdp_dtensor"),
    "torch_dist, metadata.json not yet written": ({"payload": "", "common": ""}, CheckpointDamagedError),
    "torch_dist, all but the payload lost": ({"payload": "", "config": TORCH_DIST_CONFIG}, CheckpointDamagedError),
    "torch_dist, shards not yet written": ({"common": "", "config": TORCH_DIST_CONFIG}, CheckpointDamagedError),
    "torn metadata.json": ({"metadata": TORCH_DIST[:20], "payload": ""}, CheckpointDamagedError),
    "metadata.json of something else": ({"metadata": "[1]", "payload": ""}, CheckpointDamagedError),
    "something else": ({"other": ""}, NotACheckpointError),
    "an empty directory": ({}, NotACheckpointError),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_format_is_told_by_the_files(case: str, tmp_path: Path) -> None:
    files, expected = FOUND[case]
    path = make(tmp_path / "iter_0000007", **files)
    if isinstance(expected, str):
        assert get_checkpoint_format(path) == expected
        assert find_checkpoint_rank_0(str(tmp_path), 7) == str(path)
    else:
        with pytest.raises(expected) as raised:
            get_checkpoint_format(str(path))
        assert str(path) in str(raised.value)
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
