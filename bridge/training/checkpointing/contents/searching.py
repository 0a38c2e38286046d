"""megatron-core's search for objects that refer to themselves, in the middle of a save.

Its distributed optimizer searches all objects of the program whenever it makes a fully reshardable state dict: half a
second where there are millions. It does so for programs that have switched Python's collector off.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer import distrib_optimizer


class _NewObjects:
    """Stands for the module `gc` where somebody asks it for a search of everything."""

    @staticmethod
    def collect() -> int:
        """Search what has been made lately."""
        return gc.collect(1)


@contextmanager
def without_search_of_everything() -> Iterator[None]:
    """Leave old objects to Python's own collector where megatron-core's optimizer searches all of them in each save.

    Nothing changes where a program has switched the collector off, for which megatron-core does that.
    """
    if not gc.isenabled() or not hasattr(distrib_optimizer, "gc"):
        yield
        return
    own = distrib_optimizer.gc
    distrib_optimizer.gc = _NewObjects
    try:
        yield
    finally:
        distrib_optimizer.gc = own
