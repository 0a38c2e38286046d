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

import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks._command import add_directory, command, hand_out, workload

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
    parser = command(__doc__)
    parser.add_argument("--large", type=workload, default=(40, 32 << 20), help="tensors x bytes")
    parser.add_argument("--small", type=workload, default=(20_000, 8 << 10), help="tensors x bytes")
    parser.add_argument("--rounds", type=int, default=5)
    add_directory(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        report = _measure(Path(directory), {"large": options.large, "small": options.small}, options.rounds)
    hand_out(report, _markdown(report), options)
    return 0


def _measure(directory: Path, workloads: dict[str, tuple[int, int]], rounds: int) -> dict[str, Any]:
    from bridge import accelerator

    accelerator.enable()
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    results = {}
    try:
        for name, (count, size) in workloads.items():
            ways = _ways(directory / name, count, size)
            seconds = _in_turns(ways, rounds)
            results[name] = {"tensors": count, "bytes": size, "seconds": seconds, "ratios": _ratios(seconds)}
    finally:
        torch.distributed.destroy_process_group()
    machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
    return {"machine": machine, "torch": torch.__version__, "rounds": rounds, "workloads": results}


def _in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["processor"].append(time.process_time() - processor)
    return seconds


def _ratios(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    found = {}
    for slow, fast in RATIOS:
        if slow in seconds and fast in seconds:
            found[f"{slow} / {fast}"] = {
                clock: statistics.median(a / b for a, b in zip(seconds[slow][clock], seconds[fast][clock], strict=True))
                for clock in ("wall", "processor")
            }
    return found


def _ways(directory: Path, count: int, size: int) -> dict[str, Callable[[], object]]:
    """Write the files and return what reads them, by name."""
    import torch
    import torch.distributed.checkpoint as dcp
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from bridge.training.checkpointing.agreement import Ranks
    from bridge.training.checkpointing.formats import torch_dist
    from bridge.training.checkpointing.io import DirectReader, TorchDistLoadStrategy, TorchDistSaveStrategy

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
        "manager": lambda: torch_dist.load(wanted, mcore, ranks, strictness="assume_ok_unexpected"),
        "own": lambda: torch_dist.load(wanted, own, ranks, strictness="assume_ok_unexpected"),
    }
    if size >= 1 << 20:
        # One rank alone asks for a part, which does not cover the tensor.
        ways["slice"] = lambda: megatron(wanted_parts, None, validate=False)
        ways["slice direct"] = lambda: megatron(wanted_parts, TorchDistLoadStrategy(), validate=False)
    return ways


def _markdown(report: dict[str, Any]) -> str:
    lines = [f"torch {report['torch']}, {report['machine']['system']}, median of {report['rounds']} rounds", ""]
    for name, result in report["workloads"].items():
        lines += [f"### {name}: {result['tensors']} tensors of {result['bytes']} bytes", ""]
        lines += ["| way | seconds | of the processor | microseconds a tensor |", "|---|---|---|---|"]
        for way, clocks in result["seconds"].items():
            wall, processor = (statistics.median(clocks[clock]) for clock in ("wall", "processor"))
            each = processor / result["tensors"] * 1e6
            lines.append(f"| {way} | {wall:.3f} | {processor:.3f} | {each:.1f} |")
        lines += ["", "| ratio | wall time | of the processor |", "|---|---|---|"]
        for pair, ratio in result["ratios"].items():
            lines.append(f"| {pair} | {ratio['wall']:.2f} | {ratio['processor']:.2f} |")
        lines.append("")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
