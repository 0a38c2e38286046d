"""What planning, metadata and retention cost on the coordinator of a large job, simulated in one process.

    .venv/bin/python -m scripts.benchmarks.scale [--ranks 64,1024,16384] [--tensors 600] [--writers N]
        [--checkpoints N] [--json FILE] [--markdown FILE]

The code is that of a real save; only the network is missing. Every simulated rank describes its own shards as it would
before a first save. What rank 0 does with them is timed: it unpacks them, shares out the writing among data-parallel
replicas, checks that they make up whole tensors, lays out the files, and makes `.metadata` and the compact file. Bytes
are counted where ranks would send them.

A job has tensor-parallel size 8, pipeline-parallel size 8 and the rest data-parallel. Half of a rank's tensors are
weights, which all data-parallel ranks have; the other half is optimizer state, of which each has a share of its own.
Times are of the processor, in seconds.
"""

from __future__ import annotations

import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from scripts.benchmarks._command import command, hand_out

T = TypeVar("T")

TENSOR, PIPELINE = 8, 8
HIDDEN = 4096
VOTE_BYTES = 24
"""What a rank sends to find out whether all keep one plan for what they have."""
RECORD_FRAMING = 1200
"""Bytes that torch.save puts around a tensor."""


@dataclass
class Cost:
    """One job."""

    ranks: int
    items: int
    """Shards of all ranks together."""
    written: int = 0
    """Shards that are written."""
    describe_us_per_item: float = 0.0
    """On each rank, microseconds."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the coordinator, by step."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Sent or written."""

    def timed(self, step: str, action: Callable[[], T]) -> T:
        """Do a step of the coordinator."""
        begun = time.process_time()
        result = action()
        self.seconds[step] = time.process_time() - begun
        return result

    @property
    def first_plan(self) -> float:
        """Seconds of the coordinator before anything is written."""
        return sum(self.seconds[step] for step in ("unpack", "share out", "validate", "lay out"))

    @property
    def metadata(self) -> float:
        """Seconds of the coordinator after everything is written."""
        return self.seconds["places"] + self.seconds[".metadata"] + self.seconds["compact file"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate all sizes and write the tables."""
    parser = command(__doc__)
    parser.add_argument("--ranks", default="64,256,1024,4096,16384", help="separated by commas; multiples of 64")
    parser.add_argument("--tensors", type=int, default=600, help="of each rank")
    parser.add_argument("--writers", type=int, default=1, help="files of each rank")
    parser.add_argument("--checkpoints", type=int, default=500, help="that retention decides about")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    costs = []
    for ranks in map(int, options.ranks.split(",")):
        if ranks % (TENSOR * PIPELINE):
            parser.error(f"--ranks: {ranks} is no multiple of {TENSOR * PIPELINE}")
        costs.append(simulate(ranks, options.tensors, options.writers, options.checkpoints))
    report = {"machine": platform.platform(), "python": platform.python_version(), "jobs": [_entry(c) for c in costs]}
    hand_out(report, markdown(costs), options)
    return 0


def _entry(cost: Cost) -> dict[str, Any]:
    return asdict(cost) | {"first_plan_seconds": cost.first_plan, "metadata_seconds": cost.metadata}


def simulate(ranks: int, tensors: int, writers: int = 1, checkpoints: int = 500) -> Cost:
    """Plan a first save of a job, make its metadata, read them back, and decide what retention keeps.

    Args:
        ranks: of the job.
        tensors: of each rank.
        writers: files of each rank.
        checkpoints: that retention decides about.
    """
    cost = Cost(ranks, ranks * tensors)
    planned = _plan(cost, tensors, writers)
    cost.written = len(planned)
    compact, metadata = _finish(cost, planned)
    cost.bytes[".metadata"], cost.bytes["compact file"] = len(metadata), len(compact)
    _read(cost, compact, metadata)
    files = ranks * writers
    cost.bytes["manifest"] = len(cost.timed("manifest", lambda: _manifest(files).to_json()))
    cost.timed("retention", lambda: _retain(checkpoints))
    return cost


def _plan(cost: Cost, tensors: int, writers: int) -> Any:
    """What all ranks write."""
    from bridge.training.checkpointing.formats.coverage import problem_of
    from bridge.training.checkpointing.formats.plan_files import stored_table
    from bridge.training.checkpointing.formats.shard_table import Packed, ShardTable
    from bridge.training.checkpointing.formats.shares import written_by

    begun = time.process_time()
    told = [Packed.of_rows(*_rows(rank, cost.ranks, tensors)) for rank in range(cost.ranks)]
    cost.describe_us_per_item = (time.process_time() - begun) / max(1, cost.items) * 1e6
    cost.bytes["gathered"] = sum(packed.size for packed in told)
    cost.bytes["scattered"] = cost.ranks * -(-tensors // 8)
    cost.bytes["repeat, each rank"] = VOTE_BYTES
    groups = list(_groups(cost.ranks))
    table = cost.timed("unpack", lambda: ShardTable.of(told))
    written = cost.timed("share out", lambda: written_by(table, groups))
    problem = cost.timed("validate", lambda: problem_of(table, written))
    if problem is not None:
        raise RuntimeError(f"the simulated job is not whole: {problem}")
    fingerprints = [f"{rank:064x}" for rank in range(cost.ranks)]
    return cost.timed("lay out", lambda: stored_table(table, written, writers, fingerprints))


def _finish(cost: Cost, planned: Any) -> tuple[bytes, bytes]:
    """The compact file, and `.metadata`."""
    from bridge.training.checkpointing.io.compact import placed
    from bridge.training.checkpointing.io.metadata_file import metadata_bytes

    places = _places(planned)
    cost.bytes["places gathered"] = sum(len(part.packed) for part in places)
    filled = cost.timed("places", lambda: placed(planned, [part.columns() for part in places]))
    metadata = cost.timed(".metadata", lambda: metadata_bytes(filled, Path("/checkpoints")))
    return cost.timed("compact file", lambda: filled.to_bytes(metadata)), metadata


def _read(cost: Cost, compact: bytes, metadata: bytes) -> None:
    from bridge.training.checkpointing.io.stored import StoredByTable
    from bridge.training.checkpointing.io.table import StoredTable

    cost.timed("read the compact file", lambda: StoredByTable(StoredTable.from_bytes(compact, metadata)))


def _rows(rank: int, ranks: int, tensors: int) -> tuple[list[tuple[str, Any, tuple[int, ...]]], list[bool]]:
    """The key, kind and offset of every shard of a rank, and which of them are main replicas."""
    from bridge.training.checkpointing.io.table import Spec

    replicas = ranks // (TENSOR * PIPELINE)
    tensor, replica, stage = rank % TENSOR, rank // TENSOR % replicas, rank // (TENSOR * replicas)
    shape = (HIDDEN // TENSOR, HIDDEN)
    weight = Spec("", "torch.bfloat16", "torch.strided", False, (HIDDEN, HIDDEN), shape, (TENSOR, 1))
    whole = (HIDDEN, HIDDEN * replicas)
    moment = Spec("", "torch.float32", "torch.strided", False, whole, shape, (TENSOR, replicas))
    rows: list[tuple[str, Any, tuple[int, ...]]] = []
    main = []
    for number in range(tensors):
        layer, half = stage * tensors + number, number % 2
        offset = (tensor * shape[0], replica * shape[1] if half else 0)
        name = "optimizer.state.exp_avg.decoder" if half else "decoder"
        rows.append((f"{name}.layers.{layer}.mlp.linear_fc1.weight", moment if half else weight, offset))
        main.append(bool(half) or replica == 0)
    return rows, main


def _groups(ranks: int) -> Iterator[tuple[int, ...]]:
    """By rank, its data-parallel group."""
    replicas = ranks // (TENSOR * PIPELINE)
    for rank in range(ranks):
        tensor, stage = rank % TENSOR, rank // (TENSOR * replicas)
        first = stage * TENSOR * replicas + tensor
        yield tuple(range(first, first + TENSOR * replicas, TENSOR))


def _places(planned: Any) -> list[Any]:
    """Where each rank has written what: one record behind the other."""
    import numpy as np

    from bridge.training.checkpointing.formats.planning import Places

    sizes = np.array([spec.part_bytes + RECORD_FRAMING for spec in planned.specs])[planned.spec]
    bounds = np.searchsorted(planned.rank, np.arange(len(planned.fingerprints) + 1)).tolist()
    found = []
    for rank in range(len(planned.fingerprints)):
        length = sizes[bounds[rank] : bounds[rank + 1]]
        at = np.concatenate([[0], np.cumsum(-(-length // 64) * 64)[:-1]]) if len(length) else length
        found.append(Places.of(at.astype(np.int64), length.astype(np.int64)))
    return found


def _manifest(files: int) -> Any:
    from bridge.training.checkpointing.integrity import FileRecord, Manifest

    records = tuple(FileRecord(f"__{number}_0.distcp", 1 << 30, f"{number:016x}") for number in range(files))
    return Manifest(1000, "torch_dist", files, {"tensor": TENSOR, "pipeline": PIPELINE}, {}, records)


def _retain(checkpoints: int) -> int:
    """Ask the policies about a directory of checkpoints, as after a save."""
    from bridge.training.checkpointing.retention import policies

    entries = [policies.Entry(1000 * number, float(number)) for number in range(1, checkpoints + 1)]
    wanted = (policies.MostRecent(5), policies.EveryIterations(10_000), policies.EveryHours(24))
    return len(set().union(*(policy.keeps(entries) for policy in wanted)))


def markdown(costs: Sequence[Cost]) -> str:
    """The tables of a report."""
    lines = [
        "| ranks | shards | written | on each rank, µs a shard | sharing, validating and laying out, s | metadata, s "
        "| in all, µs a shard |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        each = (cost.first_plan + cost.metadata) / cost.items * 1e6
        lines.append(
            f"| {cost.ranks:,} | {cost.items:,} | {cost.written:,} | {cost.describe_us_per_item:.1f} "
            f"| {cost.first_plan:.2f} | {cost.metadata:.2f} | {each:.1f} |"
        )
    lines += [
        "",
        "| ranks | gathered | scattered | a repeat sends, each rank | places gathered | `.metadata` | compact file "
        "| manifest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sizes = ("gathered", "scattered", "repeat, each rank", "places gathered", ".metadata", "compact file", "manifest")
    for cost in costs:
        lines.append(f"| {cost.ranks:,} | " + " | ".join(_size(cost.bytes[name]) for name in sizes) + " |")
    lines += [
        "",
        "| ranks | " + " | ".join(costs[0].seconds) + " |",
        "|" + "---|" * (len(costs[0].seconds) + 1),
    ]
    for cost in costs:
        lines.append(f"| {cost.ranks:,} | " + " | ".join(f"{value:.2f}" for value in cost.seconds.values()) + " |")
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    power = min(3, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {('B', 'kB', 'MB', 'GB')[power]}"


if __name__ == "__main__":
    sys.exit(main())
