"""What this process reads while it loads, for people who wait.

Linux counts the bytes that every process reads, from caches too. So whoever reads, and whatever the format, the load
itself need not be told.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.training.progress import Progress

_COUNTERS = Path("/proc/self/io")
_LOOK_SECONDS = 0.2


def bytes_read() -> int | None:
    """Bytes that this process has read since it began; None where the system does not tell."""
    try:
        for line in _COUNTERS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "rchar":
                return int(value)
    except (OSError, ValueError):
        pass
    return None


@contextmanager
def shown(progress: Progress | None, step: str, total: int) -> Iterator[None]:
    """Show how much has been read of what a step is going to read. The step does not fail because it cannot be shown.

    Args:
        progress: shows it; None shows nothing.
        step: what it is called.
        total: bytes, about; 0 if unknown.
    """
    begun = None if progress is None else bytes_read()
    if progress is None or begun is None:
        yield
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            now = bytes_read()
            if now is None:
                continue
            try:
                progress(step, min(now - begun, total) if total else now - begun, total)
            except Exception:  # whatever takes it is the user's
                return

    watcher = threading.Thread(target=look, name="load-progress", daemon=True)
    is_watched = False
    with contextlib.suppress(RuntimeError):  # there is no room for another thread
        watcher.start()
        is_watched = True
    try:
        yield
    finally:
        ended.set()
        if is_watched:
            watcher.join()
        with contextlib.suppress(Exception):
            progress.clear()


def bytes_wanted(template: Any) -> int:
    """Bytes of the tensors in a state dict, nested or not, as far as this rank holds them; 0 if they cannot be told."""
    try:
        return _bytes_wanted(template)
    except Exception:  # of a tensor of some unknown kind, which loads all the same
        return 0


def _bytes_wanted(template: Any) -> int:
    if isinstance(template, dict):
        return sum(map(_bytes_wanted, template.values()))
    if isinstance(template, list | tuple):
        return sum(map(_bytes_wanted, template))
    data = getattr(template, "data", None)  # of a shard, or a tensor's own
    local = getattr(data, "_local_tensor", data)
    nbytes = getattr(local, "nbytes", 0)
    return nbytes if isinstance(nbytes, int) else 0
