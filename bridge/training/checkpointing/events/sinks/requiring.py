"""The libraries of other programs, imported only where a run asks for them."""

from __future__ import annotations

import importlib
from typing import Any

from bridge.training.checkpointing.errors import EventSinkError


def require(module: str, setting: str, extra: str) -> Any:
    """Import a library.

    Args:
        module: its name.
        setting: the one that asks for it.
        extra: the extra of this package that installs it.

    Raises:
        EventSinkError: it is not installed, or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EventSinkError(
            f"{setting} needs the package {module.partition('.')[0]}, which cannot be imported ({error}); install it "
            f"with: pip install 'bridge[{extra}]', or leave {setting} out"
        ) from error
