"""The page and the picture of all benchmarks. Pure: from the JSON of the parts to Markdown and SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from scripts.benchmarks import gpt, resharding, training
from scripts.benchmarks._goals import Goal, Parts

BEGIN = "<!-- what follows is made by make bench -->"
END = "<!-- made by make bench up to here -->"


def filled(page: str, made: str) -> str:
    """A page with what is made between its marks replaced, or added at its end."""
    made = f"{BEGIN}\n\n{made.strip()}\n\n{END}"
    before, found, rest = page.partition(BEGIN)
    if not found:
        return f"{page.rstrip()}\n\n{made}\n".lstrip()
    return before + made + rest.partition(END)[2]


def markdown(report: Mapping[str, Any], goals: Sequence[Goal]) -> str:
    """All tables.

    Args:
        report: the JSON of all parts.
        goals: made of it.
    """
    parts: Parts = report["parts"]
    lines = [_machine(report["machine"]), ""]
    if report.get("small"):
        lines += ["Everything was tiny: these figures say that the benchmarks work, and nothing else.", ""]
    lines += ["| measure | goal | measured | |", "|---|---|---|---|"]
    for goal in goals:
        verdict = ("met" if goal.met else "**not met**") + (", noisy" if goal.noisy else "")
        lines.append(f"| {goal.measure} | {goal.wanted} | {goal.measured} | {verdict} |")
    lines += ["", _unrest(parts), ""]
    tables = {
        "training": ("Training time lost", training.markdown),
        "gpt": ("Real training state on several ranks", gpt.markdown),
        "resharding": ("Resharding", resharding.markdown),
    }
    for part, (title, table) in tables.items():
        if part in parts:
            lines += [f"### {title}", "", table(parts[part]["report"]).strip(), ""]
    return "\n".join(lines)


def _machine(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']} with {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB of memory, "
        f"Linux {machine['kernel']}, {machine['file system']}, Python {machine['python']}, torch {machine['torch']}, "
        f"megatron-core {machine['megatron-core']}."
    )


def _unrest(parts: Parts) -> str:
    busy = {name: part["busy with others"] for name, part in parts.items()}
    each = ", ".join(f"`{name}` {'unknown' if value is None else f'{value:.2f}'}" for name, value in busy.items())
    return f"Processors that other programs kept busy meanwhile, on average: {each}."


@dataclass(frozen=True)
class Group:
    """Bars that are compared with one another."""

    title: str
    bars: tuple[tuple[str, float], ...]
    """Names and seconds."""


def bars_of(parts: Parts) -> list[Group]:
    """What the picture shows."""
    groups = []
    for part, verb, ways in (
        ("load", "Load", ("raw", "own", "megatron", "dcp")),
        ("save", "Save", ("raw", "direct", "megatron", "dcp")),
    ):
        for workload in parts.get(part, {}).get("report", {}).get("workloads", {}).values():
            title = f"{verb} {workload['tensors']:,} tensors of {_size(workload['bytes'])}"
            seconds = workload["seconds"]
            groups.append(Group(title, tuple((way, statistics.median(seconds[way]["wall"])) for way in ways)))
    for name, load in parts.get("resharding", {}).get("report", {}).get("loads", {}).items():
        part_of = f"Load {load['bytes'] / 2**20:,.0f} MiB, {name}"
        groups.append(Group(part_of, tuple((w, statistics.median(f["seconds"])) for w, f in load["ways"].items())))
    if "training" in parts:
        ways = parts["training"]["report"]["ways"]
        lost = tuple((way, statistics.median(each["lost"] for each in found["rounds"])) for way, found in ways.items())
        groups.append(Group("Training time lost by an asynchronous save", lost))
    return groups


def _size(count: int) -> str:
    for power, unit in ((20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.0f} {unit}"
    return f"{count} bytes"


_WIDTH, _LEFT, _RIGHT, _ROW, _LEAST = 900, 130, 120, 20, 1e-3
_STYLE = """
    .page { fill: #ffffff; }
    .bar { fill: #b9c2d0; }
    .direct { fill: #3567b5; }
    .grid { stroke: #8a94a6; stroke-width: 0.5; stroke-dasharray: 3 4; }
    text { font: 13px system-ui, sans-serif; fill: #1d2430; }
    .name { font-weight: 600; }
    .end { text-anchor: end; }
    .mid { text-anchor: middle; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #1e2129; }
      .bar { fill: #58627a; }
      .direct { fill: #7ba6ea; }
      text { fill: #e6e9ef; }
    }"""


def picture(groups: Sequence[Group]) -> str:
    """Bars in SVG, of seconds on a logarithmic scale; what is less than a millisecond is drawn as that."""
    most = max([10 * _LEAST, *(seconds for group in groups for _, seconds in group.bars)])
    decades = math.ceil(math.log10(most / _LEAST))
    unit = (_WIDTH - _LEFT - _RIGHT) / decades
    height = 44 + sum(34 + _ROW * len(group.bars) for group in groups)
    body, top = [], 16
    for group in groups:
        body.append(f'  <text class="name" x="16" y="{top + 14}">{escape(group.title)}</text>')
        top += 24
        for name, seconds in group.bars:
            length = max(1.0, math.log10(max(seconds, _LEAST) / _LEAST) * unit)
            kind = "bar direct" if name in ("direct", "own") else "bar"
            body += [
                f'  <text class="end" x="{_LEFT - 8}" y="{top + 13}">{escape(name)}</text>',
                f'  <rect class="{kind}" x="{_LEFT}" y="{top + 2}" width="{length:.1f}" height="{_ROW - 5}" rx="2"/>',
                f'  <text x="{_LEFT + length + 6:.1f}" y="{top + 13}">{max(0.0, seconds):.3f} s</text>',
            ]
            top += _ROW
        top += 10
    grid = []
    for decade in range(decades + 1):
        x = _LEFT + decade * unit
        grid += [
            f'  <path class="grid" d="M{x:.1f} 16 V{height - 26}"/>',
            f'  <text class="mid" x="{x:.1f}" y="{height - 10}">{_LEAST * 10**decade:g} s</text>',
        ]
    title = "How long loads, saves and lost training take, by program"
    about = (
        "Bars on a logarithmic scale of seconds, shorter is better: this project is called direct or own, and the bare "
        "reading, writing or copying of the bytes is called raw or copy."
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">'
    )
    lines = [
        head,
        f'  <title id="title">{title}</title>',
        f'  <desc id="desc">{about}</desc>',
        f"  <style>{_STYLE}\n  </style>",
        f'  <rect class="page" width="{_WIDTH}" height="{height}" rx="8"/>',
        *grid,
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
