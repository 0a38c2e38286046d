"""The drawings of the report, as inline SVG. Pure: values in, text out.

Each drawing can be walked through with the arrow keys: what has `data-tip` is a point, and the page reads it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from bridge.training.checkpointing.events.report import scales
from bridge.training.checkpointing.events.report.view import LossPoint, SaveRow, View

WIDE, NARROW = 960, 470
"""Widths of a drawing that has a row of the page to itself, and of one that shares it."""
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 34
BARS = 240
"""Saves that a drawing of bars has room for; more of them would be thinner than a pixel."""
LIVES = 60
"""Checkpoints that the drawing of retention has room for."""


@dataclass(frozen=True)
class Frame:
    """The place for a drawing, and how values lie in it."""

    height: float
    low_x: float
    high_x: float
    low_y: float
    high_y: float
    width: float = WIDE

    @property
    def right(self) -> float:
        """Of the drawing proper."""
        return self.width - RIGHT

    @property
    def floor(self) -> float:
        """Of the drawing proper."""
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        """From the left."""
        span = self.high_x - self.low_x or 1.0
        return LEFT + (self.right - LEFT) * (value - self.low_x) / span

    def y(self, value: float) -> float:
        """From the top."""
        span = self.high_y - self.low_y or 1.0
        return self.floor - (self.floor - TOP) * (value - self.low_y) / span


def saves_chart(saves: Sequence[SaveRow]) -> str:
    """A bar for each save: what training waited for, and above it what went on meanwhile."""
    shown = [save for save in saves if save.blocking is not None or save.status == "unfinished"][-BARS:]
    if not shown:
        return ""
    highest = max((save.blocking or 0.0) + (save.background or 0.0) for save in shown)
    frame = Frame(260, 0, len(shown), 0, _above(highest))
    parts = [*_grid(frame, scales.ticks(0, frame.high_y), " s"), *_iterations(frame, shown)]
    for index, save in enumerate(shown):
        stall, background = save.blocking or 0.0, save.background or 0.0
        bars = [_bar(frame, index, 0, stall, "failed" if save.status == "failed" else "stall")]
        bars.append(_bar(frame, index, stall, stall + background, "background"))
        if save.status != "published":
            x, y = frame.x(index + 0.5), frame.y(stall + background) - 4
            bars.append(f'<path class="trouble" d="M{x - 5:.1f},{y - 9:.1f} h10 l-5,9 z"/>')
        parts.append(_point(save_tip(save), bars))
    return _svg("saves", "Timeline of saves: seconds that each of them took", frame, parts)


def sizes_chart(saves: Sequence[SaveRow]) -> str:
    """A bar for the size of each published checkpoint."""
    shown = [save for save in saves if save.status == "published" and save.total_bytes is not None][-BARS:]
    if not shown:
        return ""
    highest = max(save.total_bytes or 0 for save in shown)
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if highest >= u), (1, "B"))
    frame = Frame(190, 0, len(shown), 0, _above(highest / unit), NARROW)
    parts = [*_grid(frame, scales.ticks(0, frame.high_y, 4), f" {name}"), *_iterations(frame, shown)]
    for index, save in enumerate(shown):
        bar = _bar(frame, index, 0, (save.total_bytes or 0) / unit, "size")
        parts.append(_point(f"iteration {save.iteration}: {scales.size(save.total_bytes)}", [bar]))
    return _svg("sizes", "Sizes of the checkpoints", frame, parts)


def rates_chart(saves: Sequence[SaveRow]) -> str:
    """A point for the speed at which each checkpoint was written."""
    shown = [save for save in saves if save.gigabytes_per_second is not None][-BARS:]
    if not shown:
        return ""
    frame = Frame(190, 0, len(shown), 0, _above(max(save.gigabytes_per_second or 0.0 for save in shown)), NARROW)
    places = [(frame.x(index + 0.5), frame.y(save.gigabytes_per_second or 0.0)) for index, save in enumerate(shown)]
    parts = [*_grid(frame, scales.ticks(0, frame.high_y, 4), " GB/s"), *_iterations(frame, shown)]
    parts.append(_line(places, "rate"))
    for (x, y), save in zip(places, shown, strict=True):
        tip = f"iteration {save.iteration}: {scales.rate(save.gigabytes_per_second)}"
        parts.append(_point(tip, [f'<circle class="rate" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>']))
    return _svg("rates", "Speed at which the checkpoints were written", frame, parts)


def retention_chart(saves: Sequence[SaveRow], made: float) -> str:
    """A line from each checkpoint's publication to its deletion, or to now."""
    shown = [save for save in saves if save.status == "published" and save.time is not None][-LIVES:]
    if not shown:
        return ""
    begin = min(save.time or 0.0 for save in shown)
    last = max(max(save.time or 0.0, save.deleted or 0.0) for save in shown)
    # A run that ended long ago is not squeezed to the left edge.
    end = min(made, last + max(1.0, 0.08 * (last - begin))) if made > last else last + 1.0
    row = 13.0
    height = TOP + BOTTOM + row * len(shown)
    frame = Frame(height, begin, end, 0, len(shown))
    parts = _time_grid(frame)
    every = max(1, -(-len(shown) // 30))
    for index, save in enumerate(shown):
        y = frame.y(index + 0.5)
        left = frame.x(save.time or begin)
        right = max(left + 3, frame.x(save.deleted if save.deleted is not None else end))
        gone = save.deleted is not None
        kind = "deleted" if gone else "kept" if save.is_there else "replaced"
        state = f"deleted {scales.moment(save.deleted)}" if gone else "is there" if save.is_there else "is gone"
        tip = f"iteration {save.iteration} ({save.tier}), published {scales.moment(save.time)}, {state}"
        marks = [f'<rect class="{kind}" x="{left:.1f}" y="{y - 4:.1f}" width="{right - left:.1f}" height="8" rx="3"/>']
        parts.append(_point(tip, marks))
        if index % every == 0:
            parts.append(_text(LEFT - 8, y + 4, str(save.iteration), "end"))
    return _svg("retention", "Lives of the checkpoints: from publication to deletion", frame, parts)


def loss_chart(view: View) -> str:
    """The loss by iteration, with the saves below it and the points from which a run went on."""
    points = [point for piece in view.losses for point in piece]
    if not points:
        return ""
    low, high = min(p.loss for p in points), max(p.loss for p in points)
    margin = 0.06 * (high - low) or 0.5
    first, last = min(p.iteration for p in points), max(p.iteration for p in points)
    frame = Frame(280, first, last if last > first else first + 1, low - margin, high + margin)
    parts = _grid(frame, scales.ticks(frame.low_y, frame.high_y), "")
    for tick in scales.ticks(frame.low_x, frame.high_x, 8):
        if tick == int(tick):
            parts.append(_text(frame.x(tick), frame.floor + 20, scales.number(tick), "middle"))
    for piece in view.losses:
        parts.append(_line([(frame.x(p.iteration), frame.y(p.loss)) for p in piece], "loss"))
        if len(piece) == 1 or view.losses_are_of_saves:
            parts += [_loss_point(frame, p) for p in piece]
    parts += _loss_marks(frame, view)
    return _svg("loss", "Loss by iteration, with saves and resume points", frame, parts)


def save_tip(save: SaveRow) -> str:
    """A save in one line."""
    what = {"published": "", "failed": ", FAILED", "unfinished": ", UNFINISHED"}[save.status]
    parts = [f"iteration {save.iteration} ({save.tier}){what}", scales.moment(save.time)]
    parts.append(f"stall {scales.seconds(save.blocking)}")
    parts.append(f"background {scales.seconds(save.background)}")
    if save.total_bytes is not None:
        parts.append(scales.size(save.total_bytes))
    if save.gigabytes_per_second is not None:
        parts.append(scales.rate(save.gigabytes_per_second))
    if save.share is not None:
        parts.append(f"{scales.percent(save.share)} of the time since the save before")
    return ", ".join(parts)


def _loss_point(frame: Frame, point: LossPoint) -> str:
    circle = f'<circle class="loss" cx="{frame.x(point.iteration):.1f}" cy="{frame.y(point.loss):.1f}" r="3"/>'
    return _point(f"iteration {point.iteration}: loss {scales.number(point.loss)}", [circle])


def _loss_marks(frame: Frame, view: View) -> list[str]:
    parts = []
    floor = frame.floor
    for save in view.saves:
        if save.status == "published" and frame.low_x <= save.iteration <= frame.high_x:
            x = frame.x(save.iteration)
            kind = "tick" if save.is_there else "tick gone"
            parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{floor - 6:.1f}" y2="{floor:.1f}"/>')
    for count, iteration in enumerate(view.resumes, 1):
        x = frame.x(min(max(iteration, frame.low_x), frame.high_x))
        marks = [
            f'<line class="resume" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:.1f}" y2="{floor:.1f}"/>',
            f'<path class="resume" d="M{x - 5:.1f},{TOP:.1f} h10 l-5,8 z"/>',
        ]
        parts.append(_point(f"start {count + 1}: went on from iteration {iteration}", marks))
    return parts


def _above(highest: float) -> float:
    return 1.08 * highest if highest > 0 else 1.0


def _bar(frame: Frame, index: int, low: float, high: float, kind: str) -> str:
    slot = (frame.right - LEFT) / (frame.high_x - frame.low_x)
    width = min(28.0, max(1.5, slot * 0.7))
    x, top, bottom = frame.x(index + 0.5) - width / 2, frame.y(high), frame.y(low)
    height = max(bottom - top, 0.0)
    return f'<rect class="{kind}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _grid(frame: Frame, values: Iterable[float], unit: str) -> list[str]:
    parts = []
    for value in values:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{scales.number(value)}{unit}", "end"))
    return parts


def _time_grid(frame: Frame) -> list[str]:
    parts = []
    for value in scales.time_ticks(frame.low_x, frame.high_x):
        x = frame.x(value)
        if LEFT <= x <= frame.right:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.floor:.1f}"/>')
            label = scales.clock(value, frame.high_x - frame.low_x)
            parts.append(_text(min(x, frame.right - 24), frame.floor + 20, label, "middle"))
    return parts


def _iterations(frame: Frame, shown: Sequence[SaveRow]) -> list[str]:
    """Iterations below the bars, as many as there is room for."""
    every = max(1, -(-len(shown) // (14 if frame.width == WIDE else 7)))
    return [
        _text(frame.x(index + 0.5), frame.floor + 20, str(save.iteration), "middle")
        for index, save in enumerate(shown)
        if index % every == 0
    ]


def _line(places: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{kind}" points="{path}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _point(tip: str, marks: Iterable[str]) -> str:
    tip = escape(tip, quote=True)
    return f'<g class="point" data-tip="{tip}"><title>{tip}</title>{"".join(marks)}</g>'


def _svg(name: str, title: str, frame: Frame, parts: Iterable[str]) -> str:
    return (
        f'<svg id="{name}" class="chart" viewBox="0 0 {frame.width:.0f} {frame.height:.0f}" role="img" tabindex="0" '
        f'aria-label="{escape(title, quote=True)}; arrow keys read out its points">{"".join(parts)}</svg>'
    )
