"""Entering a spawned process: what its imports warn of is hidden before anything is imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bridge.training.logs import configure_logging, quiet_library_warnings


def enter(function: str, *arguments: Any) -> None:
    """Call a function of bridge in a spawned process.

    Args:
        function: its dotted path.
        arguments: plain ones, so that passing them imports nothing.
    """
    configure_logging("WARNING", rank=0, world_size=1)
    quiet_library_warnings()
    from bridge import accelerator

    accelerator.enable()
    module, _, name = function.rpartition(".")
    getattr(import_module(module), name)(*arguments)
