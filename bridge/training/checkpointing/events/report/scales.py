"""Numbers on axes and in words. Pure."""

from __future__ import annotations

import math
from datetime import datetime, timezone

_LEAST = 1e-300


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or above `low` to at or below `high`, evenly apart: at most `most` and one."""
    if not high > low:
        return [low]
    step = _round_step((high - low) / most)
    if not 0 < step < math.inf:  # so close, or so far apart, that there is nothing between
        return [low]
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _round_step(least: float) -> float:
    if not _LEAST < least < math.inf:
        return 0.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def number(value: float) -> str:
    """With about three digits: `0.25`, `12.5`, `1,200`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 10 else 2 if size >= 0.1 else 3 if size >= 0.001 else 6}f}".rstrip("0").rstrip(".")


def seconds(value: float | None) -> str:
    """A duration: `0.25 s`, `1 min 5 s`, `2 h 3 min`."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(value: float | None) -> str:
    """Bytes in powers of 1024."""
    if value is None:
        return "-"
    for scale, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.1f} {name}"
    return f"{value:.0f} B"


def rate(value: float | None) -> str:
    """Gigabytes a second."""
    return "-" if value is None else f"{value:.2f} GB/s"


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{100 * value:.2f} %"


def moment(value: float | None) -> str:
    """Unix time as date and time, UTC."""
    when = _utc(value)
    return "-" if when is None else when.strftime("%Y-%m-%d %H:%M:%S")


def clock(value: float, span: float) -> str:
    """Unix time on an axis that covers `span` seconds."""
    when = _utc(value)
    if when is None:
        return ""
    return when.strftime(
        "%b %d" if span > 4 * 86400 else "%d %b %H:%M" if span > 86400 else "%H:%M" if span > 600 else "%H:%M:%S"
    )


def time_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Moments at round seconds, minutes, hours or days (UTC), at most `most` and one."""
    if not high > low:
        return [low]
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
    least = (high - low) / most
    step = next((float(step) for step in steps if step >= least), math.ceil(least / 86400) * 86400.0)
    return [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)] or [low]


def _utc(value: float | None) -> datetime | None:
    try:
        return None if value is None else datetime.fromtimestamp(value, timezone.utc)
    except (OverflowError, OSError, ValueError):
        return None
