"""What the benchmarks of `load` and `save` share: large and small tensors, one rank, several ways in turns, tables."""

from __future__ import annotations

import argparse
import logging
import platform
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks._command import add_directory, command, hand_out

Seconds = dict[str, dict[str, list[float]]]
"""By way and clock (`wall`, `processor`), the seconds of each round."""
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def workload(text: str) -> tuple[int, int]:
    """The type of an option that says how many tensors of how many bytes."""
    found = re.fullmatch(r"(\d+)x(\d+)(|KiB|MiB|GiB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write tensors x bytes, as in 40x32MiB")
    return int(found[1]), int(found[2]) * _UNITS[found[3]]


def compare(
    arguments: Sequence[str] | None,
    description: str | None,
    rounds: int,
    pairs: Sequence[tuple[str, str]],
    measure: Callable[[Path, int, int, int], tuple[Seconds, dict[str, Any]]],
) -> None:
    """Run a benchmark as a command.

    Args:
        arguments: of the command line.
        description: shown by `--help`.
        rounds: by default.
        pairs: of ways, of which the report has the ratios.
        measure: from a directory to make, a number of tensors, bytes of each and rounds to the seconds, and what else
            belongs into the report.
    """
    parser = command(description)
    parser.add_argument("--large", type=workload, default=(40, 32 << 20), help="tensors x bytes")
    parser.add_argument("--small", type=workload, default=(20_000, 8 << 10), help="tensors x bytes")
    parser.add_argument("--rounds", type=int, default=rounds)
    add_directory(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        workloads = {
            name: _measured(Path(directory) / name, *getattr(options, name), options.rounds, pairs, measure)
            for name in ("large", "small")
        }
    machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
    report = {"machine": machine, "rounds": options.rounds, "workloads": workloads}
    hand_out(report, _tables(report), options)


def _measured(
    directory: Path, count: int, size: int, rounds: int, pairs: Sequence[tuple[str, str]], measure: Any
) -> dict[str, Any]:
    from bridge import accelerator

    accelerator.enable()
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    try:
        seconds, more = measure(directory, count, size, rounds)
    finally:
        torch.distributed.destroy_process_group()
    return {"tensors": count, "bytes": size, "seconds": seconds, "ratios": _ratios(seconds, pairs), **more}


def _ratios(seconds: Seconds, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    return {
        f"{slow} / {fast}": {
            clock: statistics.median(a / b for a, b in zip(seconds[slow][clock], seconds[fast][clock], strict=True))
            for clock in ("wall", "processor")
            if all(seconds[fast][clock])
        }
        for slow, fast in pairs
        if slow in seconds and fast in seconds
    }


def _tables(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']['system']}, median of {report['rounds']} rounds", ""]
    for name, result in report["workloads"].items():
        lines += [f"### {name}: {result['tensors']} tensors of {result['bytes']} bytes", ""]
        lines += ["| way | seconds | of the processor | microseconds a tensor |", "|---|---|---|---|"]
        for way, clocks in result["seconds"].items():
            wall, processor = (statistics.median(clocks[clock]) for clock in ("wall", "processor"))
            each = processor / result["tensors"] * 1e6
            lines.append(f"| {way} | {wall:.3f} | {processor:.3f} | {each:.1f} |")
        lines += ["", "| ratio | wall time | of the processor |", "|---|---|---|"]
        for pair, ratio in result["ratios"].items():
            values = (f"{ratio[clock]:.2f}" if clock in ratio else "" for clock in ("wall", "processor"))
            lines.append(f"| {pair} | {' | '.join(values)} |")
        if "kept memory / state" in result:
            lines += ["", f"host memory that is kept: {result['kept memory / state']:.2f} of the state"]
        lines.append("")
    return "\n".join(lines) + "\n"
