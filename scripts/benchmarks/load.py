"""Time to load tensors: this project's readers beside torch's, megatron-core's, and the bare reading of the bytes.

    .venv/bin/python -m scripts.benchmarks.load [--large 40x32MiB] [--small 20000x8KiB] [--rounds N]
        [--directory DIR] [--json FILE] [--markdown FILE]

All ways read the same tensors, into memory that has been touched, in turns in one process, with the files in the page
cache. What counts is the ratio of two ways in the same round; the medians of these are printed. Seconds are of wall
time and of the processor: on a machine that is busy with something else only the latter say anything.

    raw          the bytes of the files, into one buffer
    torch.load   one file of torch.save, the same tensors
    dcp          torch.distributed.checkpoint.load
    dcp direct   the same with DirectReader
    megatron     megatron-core's dist_checkpointing.load
    direct       the same with TorchDistLoadStrategy
    manager      what the checkpoint manager of this project calls
    own          the same, of a checkpoint that this project has saved, and that has its metadata in columns too
    slice        an eighth of the columns of every large tensor, by megatron-core
    slice direct the same with TorchDistLoadStrategy
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks._workloads import Seconds, compare

RATIOS = [
    ("direct", "raw"),
    ("megatron", "direct"),
    ("megatron", "manager"),
    ("megatron", "own"),
    ("own", "raw"),
    ("dcp", "dcp direct"),
    ("torch.load", "direct"),
    ("slice", "slice direct"),
]
"""Pairs of ways: how many times as long the first takes as the second."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all ways and write the tables."""
    compare(arguments, __doc__, 5, RATIOS, _measure)
    return 0


def _measure(directory: Path, count: int, size: int, rounds: int) -> tuple[Seconds, dict[str, Any]]:
    return _in_turns(_ways(directory, count, size), rounds), {}


def _in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> Seconds:
    seconds: Seconds = {name: {"wall": [], "processor": []} for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["processor"].append(time.process_time() - processor)
    return seconds


def _ways(directory: Path, count: int, size: int) -> dict[str, Callable[[], object]]:
    """Write the files and return what reads them, by name."""
    import torch
    import torch.distributed.checkpoint as dcp
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from bridge.training.checkpointing.agreement import Ranks
    from bridge.training.checkpointing.formats import torch_dist
    from bridge.training.checkpointing.formats.options import LoadOptions
    from bridge.training.checkpointing.io import DirectReader, TorchDistLoadStrategy, TorchDistSaveStrategy

    options = LoadOptions(strictness="assume_ok_unexpected")
    columns = max(1, size // 4 // 16) // 8 * 8 or 8
    names = [f"layers.{number}.weight" for number in range(count)]
    tensors = {name: torch.rand(16, columns) for name in names}
    parts = {name: torch.zeros(16, columns // 8) for name in names}

    def template(part: bool = False) -> dict[str, Any]:
        if part:
            return {n: ShardedTensor.from_rank_offsets(n, t, (1, 3, 8)) for n, t in parts.items()}
        return {n: ShardedTensor.from_rank_offsets(n, t) for n, t in tensors.items()}

    mcore, plain, single, own = directory / "mcore", directory / "dcp", directory / "single.pt", directory / "own"
    mcore.mkdir(parents=True)
    own.mkdir()
    dist_checkpointing.save(template(), str(mcore))
    dist_checkpointing.save(template(), str(own), TorchDistSaveStrategy())
    dcp.save(tensors, checkpoint_id=plain, no_dist=True)
    torch.save(tensors, single)
    wanted, wanted_parts, ranks = template(), template(part=True), Ranks.current()
    buffer = bytearray(max(path.stat().st_size for path in mcore.iterdir()))

    def raw() -> None:
        for path in sorted(mcore.glob("*.distcp")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def megatron(state: dict[str, Any], strategy: Any, validate: bool = True) -> None:
        dist_checkpointing.load(state, str(mcore), strategy, validate_access_integrity=validate)

    ways: dict[str, Callable[[], object]] = {
        "raw": raw,
        "torch.load": lambda: torch.load(single, weights_only=True),
        "dcp": lambda: dcp.load(tensors, checkpoint_id=plain, no_dist=True),
        "dcp direct": lambda: dcp.load(tensors, storage_reader=DirectReader(plain), no_dist=True),
        "megatron": lambda: megatron(wanted, None),
        "direct": lambda: megatron(wanted, TorchDistLoadStrategy()),
        "manager": lambda: torch_dist.load(wanted, mcore, ranks, options),
        "own": lambda: torch_dist.load(wanted, own, ranks, options),
    }
    if size >= 1 << 20:
        # One rank alone asks for a part, which does not cover the tensor.
        ways["slice"] = lambda: megatron(wanted_parts, None, validate=False)
        ways["slice direct"] = lambda: megatron(wanted_parts, TorchDistLoadStrategy(), validate=False)
    return ways


if __name__ == "__main__":
    sys.exit(main())
