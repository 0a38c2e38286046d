"""The goals, and what the benchmarks have measured of them. Pure: from the JSON of the parts to rows of a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Parts = Mapping[str, Mapping[str, Any]]
FIXED_MEMORY = 64e6
"""Bytes beside the state that an asynchronous save may take."""


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    part: str
    """That has measured it."""
    measure: str
    wanted: str
    measured: str
    met: bool
    noisy: bool


def goals_of(parts: Parts) -> list[Goal]:
    """The goals whose parts have been run."""
    found = []
    for part, lines in _LINES.items():
        if part in parts:
            noisy = bool(parts[part]["noisy"])
            found += [Goal(part, *line, noisy) for line in lines(parts[part]["report"])]
    return found


Line = tuple[str, str, str, bool]


def _load(report: Mapping[str, Any]) -> Iterator[Line]:
    large, small = (report["workloads"][name] for name in ("large", "small"))
    for workload, wanted in ((large, 6), (small, 40)):
        stock = _wall(workload, "megatron / own")
        measure = f"load, {workload['tensors']:,} tensors, against megatron-core"
        yield measure, f"≥ {wanted} times as fast", f"{stock:.1f} times", stock >= wanted
    dcp = _wall(large, "dcp / dcp direct")
    yield "load, large tensors, against torch DCP", "≥ 6 times as fast", f"{dcp:.1f} times", dcp >= 6
    raw = _wall(large, "own / raw")
    yield "load, large tensors, against reading the bytes", "≤ 1.4 times the time", f"{raw:.2f} times", raw <= 1.4
    each = statistics.median(small["seconds"]["own"]["wall"]) / small["tensors"] * 1e6
    yield "load, small tensors, a tensor", "< 12 µs", f"{each:.1f} µs", each < 12


def _resharding(report: Mapping[str, Any]) -> Iterator[Line]:
    for name, load in report["loads"].items():
        read = load["ways"]["direct"]["amplification"]
        if read is not None:
            yield f"resharding load, {name}: read of what is needed", "≤ 1.05", f"{read:.2f}", read <= 1.05
        times = load["ratios"]["megatron / direct"]
        yield (
            f"resharding load, {name}, against megatron-core",
            "≥ 3 times as fast",
            f"{times:.1f} times",
            times >= 3,
        )


def _save(report: Mapping[str, Any]) -> Iterator[Line]:
    large, small = (report["workloads"][name] for name in ("large", "small"))
    raw = _wall(large, "manager / raw")
    yield "save, large tensors, against writing and syncing", "≤ 1.1 times the time", f"{raw:.2f} times", raw <= 1.1
    for workload, wanted in ((large, 1), (small, 15)):
        stock, dcp = (_wall(workload, pair) for pair in ("megatron / manager", "dcp / manager"))
        yield (
            f"save, {workload['tensors']:,} tensors, against megatron-core and torch DCP",
            "never slower" if wanted == 1 else f"≥ {wanted} times as fast",
            f"{stock:.1f} and {dcp:.1f} times as fast",
            min(stock, dcp) >= wanted,
        )


def _training(report: Mapping[str, Any]) -> Iterator[Line]:
    ratios, state = report["ratios"], report["state"]
    copy = ratios["direct / copy"]
    yield "training time lost by an asynchronous save", "≤ 1.3 times one copy", f"{copy:.2f} times", copy <= 1.3
    dcp = [ratios[f"dcp {how} / direct"] for how in ("thread", "process")]
    yield (
        "the same, of torch DCP in a thread and in a process, which copy",
        "≥ 5 times as much",
        f"{dcp[0]:.1f} and {dcp[1]:.1f} times",
        min(dcp) >= 5,
    )
    fork = ratios["megatron / direct"]
    yield "the same, of megatron-core, which forks", "not less", f"{fork:.1f} times", fork >= 1
    ours = report["ways"]["direct"]
    extra, later = ours["extra memory"], ours["extra memory, second half"]
    yield (
        f"extra memory over {ours['saves']} asynchronous saves, at most",
        "the state and 64 MB",
        f"{extra:.2f} of the state ({extra * state / 1e6:,.0f} MB)",
        extra * state <= state + FIXED_MEMORY,
    )
    yield (
        "the same in the second half of the saves",
        "not more",
        f"{later:.2f} of the state",
        later <= extra,
    )


def _checksums(report: Mapping[str, Any]) -> Iterator[Line]:
    more = report["with / without"]["xxh3"]["wall"] - 1
    yield (
        "checksums of the manifest, of a save's time",
        "≤ 5 %",
        f"{max(0.0, more):.1%}".replace("%", " %"),
        more <= 0.05,
    )


def _repeat_save(report: Mapping[str, Any]) -> Iterator[Line]:
    tensors = report["tensors"]
    seconds = statistics.median(report["seconds"]["reused"][2:])
    wanted = 2e-3 + tensors * 1e-6
    yield (
        f"planning a repeated save of {tensors:,} tensors",
        f"≤ {wanted * 1e3:.0f} ms",
        f"{seconds * 1e3:.0f} ms",
        seconds <= wanted,
    )


def _scale(report: Mapping[str, Any]) -> Iterator[Line]:
    for job in report["jobs"]:
        name = f"first plan, {job['ranks']:,} ranks with {job['items'] // job['ranks']:,} tensors each"
        seconds = job["first_plan_seconds"] + job["metadata_seconds"]
        yield f"{name}: processor time of rank 0", "≤ 8 s", f"{seconds:.1f} s", seconds <= 8
        size, sent = job["bytes"]["compact file"], job["bytes"]["repeat, each rank"]
        yield f"{name}: metadata beside `.metadata`", "≤ 30 MB", f"{size / 1e6:.1f} MB", size <= 30e6
        yield "sent by a rank to repeat a plan", "whatever the number of tensors", f"{sent} bytes", sent <= 64


def _start(report: Mapping[str, Any]) -> Iterator[Line]:
    # To the first step: differences of less than the noise may come out below zero.
    more = statistics.median(report["seconds"]["ours"]) + max(0.0, statistics.median(report["seconds"]["saving"]))
    yield "from the import of megatron-core to the first step, added", "≤ 0.3 s", f"{more:.2f} s", more <= 0.3


def _wall(workload: Mapping[str, Any], pair: str) -> float:
    return float(workload["ratios"][pair]["wall"])


_LINES: dict[str, Callable[[Mapping[str, Any]], Iterator[Line]]] = {
    "load": _load,
    "resharding": _resharding,
    "save": _save,
    "training": _training,
    "repeat_save": _repeat_save,
    "scale": _scale,
    "checksums": _checksums,
    "start": _start,
}
