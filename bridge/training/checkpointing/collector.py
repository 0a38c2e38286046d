"""Python's search for objects that refer to themselves: it takes long where there are millions of objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Let the search wait: it takes most of the time where millions of objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def collecting_new_objects_only() -> Iterator[None]:
    """Let a search that somebody asks for, as megatron-core does in each save, see only what has been made meanwhile.

    Nothing changes for programs that have switched the collector off, which may rely on that search, or that have
    frozen objects themselves.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
