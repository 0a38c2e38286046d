"""What checksums add to a save by this project's writer, and how fast they are verified.

    .venv/bin/python -m scripts.benchmarks.checksums [--mib 1024] [--rounds N] [--directory DIR] [--json FILE]

The same tensors are written and synced with each kind of checksum and without any, in turns. The files are then
verified with the default kind, in full and by sample, beside a plain read of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_TENSOR_BYTES = 32 << 20


class _NoChecksum:
    """Stands for a checksum that costs nothing."""

    def update(self, data: Any, /) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """No digits."""
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        report = _measure(Path(directory), options.mib << 20, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    for kind, ratios in report["with / without"].items():
        print(f"with {kind}: wall {ratios['wall'] - 1:+.1%}, processor {ratios['processor'] - 1:+.1%}")
    for how, clocks in report["seconds"].items():
        wall = statistics.median(clocks["wall"])
        print(f"{how:<16} {wall:.3f} s {report['bytes'] / wall / 1e9:8.1f} GB/s")
    return 0


def _measure(directory: Path, size: int, rounds: int) -> dict[str, Any]:
    from bridge import accelerator

    accelerator.enable()
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    from bridge.training.checkpointing import checksums
    from bridge.training.checkpointing.agreement import Ranks
    from bridge.training.checkpointing.integrity import find_damage
    from bridge.training.checkpointing.io import TorchDistSaveStrategy

    checksums._KINDS["none"] = _NoChecksum
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    count, part = max(1, size // _TENSOR_BYTES), min(size, _TENSOR_BYTES)
    state = {f"t{n}": torch.rand(part // 4) for n in range(count)}
    shards = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in state.items()}
    direct, _ = TorchDistSaveStrategy()._plan(shards, directory, Ranks.current())
    records: list[Any] = []

    def write(kind: str) -> None:
        records[:] = direct.write(kind)[0]

    write("none")  # the first file is slower than those after it
    kinds = [kind for kind in checksums.KINDS if kind != checksums.DEFAULT]
    ways = {"without": lambda: write("none"), **{kind: lambda kind=kind: write(kind) for kind in kinds}}
    ways[checksums.DEFAULT] = lambda: write(checksums.DEFAULT)  # the last one: it is the one that is verified
    seconds = _in_turns(ways, rounds)

    def verify(**how: bool) -> None:
        if find_damage(directory, records, **how):
            raise RuntimeError("the files are not what was written")

    buffer = bytearray(8 << 20)

    def read() -> None:
        for path in directory.iterdir():
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    read()
    seconds |= _in_turns(
        {"raw read": read, "verified": lambda: verify(checksums=True), "sampled": lambda: verify(samples=True)}, rounds
    )
    torch.distributed.destroy_process_group()
    return {
        "bytes": sum(record.size for record in records),
        "rounds": rounds,
        "seconds": seconds,
        "with / without": {
            kind: {clock: _ratio(seconds[kind][clock], seconds["without"][clock]) for clock in ("wall", "processor")}
            for kind in checksums.KINDS
        },
    }


def _ratio(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def _in_turns(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            wall, processor = time.perf_counter(), time.process_time()
            action()
            found[name]["wall"].append(time.perf_counter() - wall)
            found[name]["processor"].append(time.process_time() - processor)
    return found


if __name__ == "__main__":
    sys.exit(main())
