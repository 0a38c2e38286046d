"""Checkpoints without a manifest: whose they are, and what is only left of one of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bridge.training.checkpointing.catalog import read_entry
from bridge.training.checkpointing.catalog.origins import metrics_files
from bridge.training.checkpointing.detection import get_checkpoint_format
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.events.file import EventFile
from bridge.training.checkpointing.events.kinds import RunStarted
from bridge.training.checkpointing.layout import (
    COMPACT_METADATA,
    LEGACY_TRACKER,
    MANIFEST,
    PAYLOAD_METADATA,
    RUN_CONFIG,
    TRAIN_STATE,
)
from bridge.training.checkpointing.peeking import may_hold
from tests.cli.commands import copied, run_all


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that torch DCP alone has written, beside an iteration of the same kind."""
    root = tmp_path_factory.mktemp("plain")
    state = {f"layers.{number}.weight": torch.full((2, 2), float(number)) for number in range(3)}
    for place in (root / "weights", root / "run" / "iter_0000003"):
        dcp.save(state, checkpoint_id=str(place))
    (root / "run" / LEGACY_TRACKER).write_text("3")
    return root


@pytest.mark.parametrize(
    ("removed", "state", "origin", "problem"),
    [
        ((), "damaged", "bridge", f"{MANIFEST} is missing, the last file that a save writes"),
        (
            (RUN_CONFIG,),
            "damaged",
            "bridge",
            f"{MANIFEST} and {RUN_CONFIG} are missing: {COMPACT_METADATA} is of bridge",
        ),
        (
            (RUN_CONFIG, TRAIN_STATE),
            "damaged",
            "bridge",
            f"{MANIFEST} and {RUN_CONFIG} are missing: {COMPACT_METADATA} is of bridge",
        ),
        (
            (RUN_CONFIG, COMPACT_METADATA),
            "damaged",
            "",
            f"{RUN_CONFIG} is missing, and so is {MANIFEST} if it is of bridge: no other program that writes "
            f"{TRAIN_STATE} leaves it out",
        ),
        ((RUN_CONFIG, COMPACT_METADATA, TRAIN_STATE), "foreign", "Megatron-LM", ""),
    ],
)
def test_what_is_left_of_ours_is_not_another_programs(
    trained: Path, tmp_path: Path, removed: tuple[str, ...], state: str, origin: str, problem: str
) -> None:
    path = copied(trained, tmp_path / "run") / "iter_0000002"
    for name in (MANIFEST, *removed):
        (path / name).unlink()
    entry = read_entry(path)
    expected = f"{path} is damaged: {problem}" if problem else ""
    assert (entry.state, entry.origin, entry.problem) == (state, origin, expected)
    assert entry.format == "torch_dist"


def test_plain_dcp_is_called_so(plain: Path) -> None:
    alone, listed, doctor, data = run_all(
        ["ls", plain / "weights"],
        ["ls", plain / "run"],
        ["doctor", plain / "weights"],
        ["ls", plain / "weights", "--json"],
    )
    (row,) = [line.split() for line in alone.out.splitlines() if "fsdp_dtensor" in line]
    assert row[0] == "-"
    assert "  plain DCP  <- a run resumes here\n" in alone.out
    assert (
        f"A run that loads {plain}/weights begins at iteration 0 with a plain DCP checkpoint, which tells no "
        "iteration: checkpoint.load names this one checkpoint.\n"
    ) in alone.out
    assert "release" not in alone.out
    assert (
        "ok      understood of it: no iteration, so a run counts from 0, its parallel sizes are unknown\n" in doctor.out
    )
    (found,) = data.json["checkpoints"]
    assert (found["iteration"], found["origin"], found["is_loaded"]) == (None, "torch DCP", True)
    assert f"A run that loads {plain}/run resumes from iteration 3: " in listed.out


@pytest.mark.parametrize(
    ("config", "data", "expected"),
    [
        ("checkpoint:\n  a: 1\n  ckpt_format: fsdp_dtensor\n  z: 2\n", b"", "fsdp_dtensor"),
        # In another form, or in another place, it takes the parser to tell.
        ("checkpoint: {ckpt_format: fsdp_dtensor}\n", b"", "fsdp_dtensor"),
        ("model:\n  ckpt_format: zarr\ncheckpoint:\n  a: {\n    ckpt_format: zarr}\n", b"", "fsdp_dtensor"),
        ("checkpoint:\n  ckpt_format: 'torch_dist'\n", b"", "is configured as 'torch_dist'"),
        ("checkpoint:\n  ckpt_format: fsdp_dtensor\n  ckpt_format: torch_dist\n", b"", "is configured as 'torch_dist'"),
        ("checkpoint:\n  ckpt_format: fsdp_dtensor\n", b"\x80\x04 cut", ".metadata is not readable: "),
        ("", b"\x80\x04 cut", ".metadata is not readable: "),
    ],
)
def test_the_format_is_told_by_a_few_bytes(
    plain: Path, tmp_path: Path, config: str, data: bytes, expected: str
) -> None:
    (tmp_path / PAYLOAD_METADATA).write_bytes(data or (plain / "weights" / PAYLOAD_METADATA).read_bytes())
    if config:
        (tmp_path / RUN_CONFIG).write_text(config)
    if expected == "fsdp_dtensor":
        assert get_checkpoint_format(tmp_path) == expected
        return
    with pytest.raises(CheckpointDamagedError) as raised:
        get_checkpoint_format(tmp_path)
    assert expected in str(raised.value)


def test_a_key_that_lies_across_two_blocks_is_seen(tmp_path: Path) -> None:
    for padding in range((1 << 20) - 40, (1 << 20) + 10, 7):
        (tmp_path / PAYLOAD_METADATA).write_bytes(b" " * padding + b"rng_state/shard_0.0_1.1" + b" " * 99)
        assert may_hold(tmp_path, re.compile(rb"/shard_[0-9.]+_[0-9.]"))
    (tmp_path / PAYLOAD_METADATA).write_bytes(b" " * (3 << 20))
    assert not may_hold(tmp_path, re.compile(rb"/shard_[0-9.]+_[0-9.]"))


def test_a_runs_own_metrics_are_known_by_its_events_or_by_their_lines(tmp_path: Path) -> None:
    line = json.dumps({"iteration": 1, "loss": 2.5, "seconds": 0.1})
    contents = {"a.jsonl": f"{line}\n", "b.jsonl": "", "c.jsonl": "{}\n", "d.txt": line, "e.log": "", "f.jsonl": "{"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    assert metrics_files(tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    file = EventFile(tmp_path)
    file.take(RunStarted(iteration=0, metrics_path=str(tmp_path / "e.log")))
    file.close()
    assert metrics_files(tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "e.log"]
    assert metrics_files(tmp_path / "none") == []
