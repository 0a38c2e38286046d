"""Command lines run through the real entry point, and a run's checkpoints for them to work with."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from bridge.cli.main import main
from bridge.training.checkpointing import commit
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.sidecar import torch_bytes
from bridge.training.state import TrainState
from tests.distributed.launch import run_ranks


class Result(NamedTuple):
    """What came of a command line."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object that `--json` printed."""
        assert self.out, self.err
        return json.loads(self.out)


def run_all(*lines: list[object]) -> list[Result]:
    """Run command lines one after the other in one other process, where logging may be set up anew."""

    def run() -> list[Result]:
        return [_run(line) for line in lines]

    (results,) = run_ranks(run, 1)
    return results


def run(*arguments: object) -> Result:
    """Run one command line in another process."""
    return run_all(list(arguments))[0]


def _run(arguments: list[object]) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Result(status, out.getvalue(), err.getvalue())


def copied(source: Path, target: Path) -> Path:
    """A directory of checkpoints of a test's own, where nobody has ever saved."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".bridge-*"))
    return target


def write_recipe(path: Path, more: str = "") -> Path:
    """A recipe of the run of `trained`."""
    path.write_text(
        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, seq_length: 32,"
        " make_vocab_size_divisible_by: 16}\n"
        "train: {train_iters: 6, micro_batch_size: 2, global_batch_size: 8}\n"
        "dataset: {mock: true}\n"
        "tokenizer: {tokenizer_type: NullTokenizer, vocab_size: 255}\n" + more
    )
    return path


def commit_small(save_dir: Path, iteration: int, *, metrics: dict[str, float] | None = None) -> Path:
    """Publish a checkpoint without tensors, as a save publishes one."""
    staging = commit.begin_staging(save_dir, iteration)
    state = TrainState()
    state.step = iteration
    train_state = torch_bytes(state.state_dict())
    files = {"train_state.pt": train_state, "__0_0.distcp": bytes(iteration % 251 for _ in range(64))}
    for name, data in files.items():
        (staging / name).write_bytes(data)
    records = tuple(FileRecord.of_bytes(name, data) for name, data in files.items())
    sizes = {"tensor": 2, "pipeline": 1, "data": 1}
    created = 1_700_000_000.0 + iteration
    manifest = Manifest(iteration, "torch_dist", 2, sizes, {"bridge": "0"}, records, created=created)
    commit.seal(staging, manifest if metrics is None else Manifest(**{**vars(manifest), "metrics": metrics}))
    path = commit.publish(staging, iteration)
    commit.move_trackers(save_dir, iteration, train_state)
    return path


def flip(path: Path, offset: int | None = None) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2 if offset is None else offset)
        byte = stream.read(1)
        stream.seek(-1, io.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0xFF]))
