"""Loads of parts and by other numbers of ranks: time, and how much is read of what is needed.

    .venv/bin/python -m scripts.benchmarks.resharding [--large 16x32MiB] [--layers N] [--hidden-size N] [--rounds N]
        [--directory DIR] [--json FILE] [--markdown FILE]

What one process loads, in turns, with the files in the page cache. "Read" is what the system has counted for this
process, metadata included, divided by the bytes of the tensors that are wanted.

    rows, columns   an eighth of each of some large tensors, as one of eight tensor-parallel ranks has it
    TP2 to TP1      a GPT with its optimizer, which two tensor-parallel ranks have saved

    direct     this project: its strategy for parts, its manager for the GPT
    stock      the manager with `io_backend: stock`, for the GPT
    megatron   megatron-core alone
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

from scripts.benchmarks import _gpt, _ranks
from scripts.benchmarks._command import add_directory, command, hand_out
from scripts.benchmarks._workloads import workload

GPT = "TP2 to TP1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all and write the table."""
    parser = command(__doc__)
    parser.add_argument("--large", type=workload, default=(16, 32 << 20), help="tensors x bytes")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--rounds", type=int, default=5)
    add_directory(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    _ranks.import_all()
    with tempfile.TemporaryDirectory(dir=options.directory, ignore_cleanup_errors=True) as found:
        directory = Path(found)
        loads = _ranks.on_ranks(_parts, 1, directory, *options.large, options.rounds)
        shape = options.layers, options.hidden_size
        _ranks.on_ranks(_save, 2, directory, *shape)
        loads[GPT] = _ranks.on_ranks(_load, 1, directory, *shape, options.rounds)
    for load in loads.values():
        load["ratios"] = ratios(load["ways"])
    report = {"rounds": options.rounds, "loads": loads}
    hand_out(report, markdown(report), options)
    return 0 if all(load["is what it was"] for load in loads.values()) else 1


def ratios(ways: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as long as this project each way takes: the median of all rounds."""
    return {
        f"{way} / direct": statistics.median(
            a / b for a, b in zip(found["seconds"], ways["direct"]["seconds"], strict=True)
        )
        for way, found in ways.items()
        if way != "direct"
    }


def _in_turns(ways: dict[str, Callable[[], None]], needed: int, rounds: int) -> dict[str, dict[str, Any]]:
    from bridge.training.checkpointing.read_meter import bytes_read

    found: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in ways}
    for number in range(rounds + 1):
        for way, load in ways.items():
            read, begun = bytes_read(), time.perf_counter()
            load()
            seconds, after = time.perf_counter() - begun, bytes_read()
            found[way]["amplification"] = None if read is None or after is None else (after - read) / needed
            if number:  # the first round warms up
                found[way]["seconds"].append(seconds)
    return found


def _parts(directory: Path, count: int, size: int, rounds: int) -> dict[str, Any]:
    """Save tensors whole and load an eighth of each, as a rank of several would."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch.distributed import HashStore

    from bridge.training.checkpointing.io import TorchDistLoadStrategy

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    side = max(1, int((size / 4) ** 0.5)) // 8 * 8 or 8
    whole = {f"layers.{number}.weight": torch.rand(side, side) for number in range(count)}
    place = directory / "parts"
    place.mkdir()
    dist_checkpointing.save({n: ShardedTensor.from_rank_offsets(n, t) for n, t in whole.items()}, str(place))
    results = {}
    for name, axis in (("rows", 0), ("columns", 1)):
        shape = (side // 8, side) if axis == 0 else (side, side // 8)
        parts = {n: torch.zeros(shape) for n in whole}
        wanted = {n: ShardedTensor.from_rank_offsets(n, t, (axis, 3, 8)) for n, t in parts.items()}

        def load(strategy: Any = None, wanted: dict[str, Any] = wanted) -> None:
            # One rank alone asks for a part, which does not cover the tensor.
            dist_checkpointing.load(wanted, str(place), strategy, validate_access_integrity=False)

        ways = {"direct": lambda load=load: load(TorchDistLoadStrategy()), "megatron": load}
        found = _in_turns(ways, sum(t.nbytes for t in parts.values()), rounds)
        part = slice(3 * side // 8, 4 * side // 8)
        same = True
        for way in ways.values():
            for tensor in parts.values():
                tensor.zero_()
            way()
            same = same and all(torch.equal(parts[n], t[part] if axis == 0 else t[:, part]) for n, t in whole.items())
        results[name] = {"ways": found, "bytes": sum(t.nbytes for t in parts.values()), "is what it was": same}
    return results


def _save(directory: Path, layers: int, hidden: int) -> None:
    """On two ranks."""
    run = _gpt.gpt_run(
        directory / "gpt", layers, hidden, {"tensor_model_parallel_size": 2}, dist_ckpt_optim_fully_reshardable=True
    )
    _gpt.step(run)
    _gpt.save(run)


def _load(directory: Path, layers: int, hidden: int, rounds: int) -> dict[str, Any]:
    """On one rank."""
    import torch

    logging.disable(logging.ERROR)
    settings = {"dist_ckpt_optim_fully_reshardable": True}
    run = _gpt.gpt_run(directory / "unused", layers, hidden, **settings)
    _gpt.step(run)
    direct = _gpt.beside(run, directory / "gpt")
    stock = _gpt.beside(run, directory / "gpt", io_backend="stock")
    (place,) = (directory / "gpt").glob("iter_*")
    megatron = _gpt.Megatron(run)
    ways = {
        "direct": lambda: _gpt.load(direct),
        "stock": lambda: _gpt.load(stock),
        "megatron": lambda: megatron.load(place),
    }
    needed = sum(tensor.nbytes for tensor in _gpt.tensors_of(_gpt.sharded_state(run)).values())
    found = _in_turns(ways, needed, rounds)
    loaded = []
    for way in ways.values():
        for tensor in _gpt.tensors_of(_gpt.sharded_state(run)).values():
            tensor.zero_()
        way()
        loaded.append({n: t.clone() for n, t in _gpt.tensors_of(_gpt.sharded_state(run)).items()})
    same = all(torch.equal(other[name], tensor) for other in loaded[1:] for name, tensor in loaded[0].items())
    return {"ways": found, "bytes": needed, "is what it was": same}


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    lines = [
        f"Seconds, median of {report['rounds']} rounds; in brackets, times `direct`.",
        "",
        "| what | MiB wanted | way | seconds | read, of what is wanted |",
        "|---|---|---|---|---|",
    ]
    for name, load in report["loads"].items():
        for way, found in load["ways"].items():
            ratio = load["ratios"].get(f"{way} / direct")
            read = found["amplification"]
            lines.append(
                f"| {name} | {load['bytes'] / 2**20:,.0f} | {way} | {statistics.median(found['seconds']):.3f}"
                f"{'' if ratio is None else f' ({ratio:.1f})'} | {'unknown' if read is None else f'{read:.2f}'} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
