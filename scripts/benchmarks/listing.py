"""How long `bridge-ckpt ls` looks at a directory of many checkpoints, once it is loaded.

    .venv/bin/python -m scripts.benchmarks.listing [--checkpoints 1000] [--tensors 300] [--directory DIR] [--json FILE]

Four directories are made: checkpoints with a manifest, and checkpoints without one as Megatron-LM, torch DCP and
Megatron Bridge with Megatron FSDP leave them. Payload is linked, because none of it is read.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks._command import add_directory, command, hand_out

_ROUNDS = 5
_SETTINGS = 200
"""Lines in the section of a configuration, beside the one that counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command(__doc__)
    add_directory(parser)
    parser.add_argument("--checkpoints", type=int, default=1000, help="in each directory")
    parser.add_argument("--tensors", type=int, default=300, help="in each checkpoint")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        report = _measure(Path(directory), options.checkpoints, options.tensors)
    rows = [f"| {name} | {found['wall']:.2f} | {found['cpu']:.2f} |" for name, found in report["seconds"].items()]
    title = f"`ls` of {options.checkpoints} checkpoints, from a warm cache"
    hand_out(report, "\n".join([f"| {title} | Seconds | of the processor |", "|---|---|---|", *rows, ""]), options)
    return 0


def _measure(root: Path, count: int, tensors: int) -> dict[str, Any]:
    from bridge.training.checkpointing.catalog import list_all

    payload = _payload(root / "payload", tensors)
    seconds: dict[str, dict[str, float]] = {}
    for name, fill in _KINDS.items():
        directory = root / name
        for iteration in range(1, count + 1):
            checkpoint = directory / f"iter_{iteration:07d}"
            checkpoint.mkdir(parents=True)
            fill(checkpoint, payload, iteration)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(count))
        taken = []
        for _ in range(_ROUNDS):
            started = time.perf_counter(), time.process_time()
            listed = list_all(directory)
            taken.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        if len(listed.rows) != count or listed.choice.iteration != count:
            raise RuntimeError(f"{name}: not all checkpoints were listed as what they are")
        wall, busy = zip(*taken, strict=True)
        seconds[name] = {"wall": statistics.median(wall), "cpu": statistics.median(busy)}
    return {"checkpoints": count, "tensors": tensors, "seconds": seconds}


def _payload(directory: Path, tensors: int) -> Path:
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({f"layers.{n}.weight": torch.zeros(4, 4) for n in range(tensors)}, checkpoint_id=str(directory))
    torch.save({"iteration": 1}, directory / "common.pt")
    return directory


def _link(payload: Path, checkpoint: Path, *, common: bool) -> None:
    for path in payload.iterdir():
        if common or path.name != "common.pt":
            (checkpoint / path.name).hardlink_to(path)


def _with_manifest(checkpoint: Path, payload: Path, iteration: int) -> None:
    import torch

    from bridge.training.checkpointing.integrity import FileRecord, Manifest, write_manifest

    _of_megatron_lm(checkpoint, payload, iteration)
    (checkpoint / "common.pt").unlink()
    torch.save({"iteration": iteration}, checkpoint / "common.pt")
    names = sorted(path.name for path in checkpoint.iterdir())
    files = tuple(FileRecord.of(checkpoint, name) for name in names)
    write_manifest(checkpoint, Manifest(iteration, "torch_dist", 1, {"data": 1}, {"bridge": "0"}, files, created=1.0))


def _of_megatron_lm(checkpoint: Path, payload: Path, iteration: int) -> None:
    del iteration
    _link(payload, checkpoint, common=True)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def _of_torch(checkpoint: Path, payload: Path, iteration: int) -> None:
    del iteration
    _link(payload, checkpoint, common=False)


def _of_megatron_fsdp(checkpoint: Path, payload: Path, iteration: int) -> None:
    _of_torch(checkpoint, payload, iteration)
    settings = "".join(f"  setting_{n}: null\n" for n in range(_SETTINGS))
    text = f"_target_: megatron.bridge.training.config.ConfigContainer\ncheckpoint:\n{settings}"
    (checkpoint / "run_config.yaml").write_text(f"{text}  ckpt_format: fsdp_dtensor\n")


_KINDS: dict[str, Callable[[Path, Path, int], None]] = {
    "with a manifest": _with_manifest,
    "of Megatron-LM": _of_megatron_lm,
    "plain DCP": _of_torch,
    "of Megatron Bridge, fsdp_dtensor": _of_megatron_fsdp,
}


if __name__ == "__main__":
    sys.exit(main())
