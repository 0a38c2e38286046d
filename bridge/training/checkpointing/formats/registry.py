"""Formats by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.formats import Format

_PACKAGE = __package__

_MODULES = {
    "torch_dist": "torch_dist",
    "zarr": "zarr",
    "fsdp_dtensor": "fsdp_dtensor",
}
"""The module of this package that has each format; it is imported when it is needed."""


def format_named(name: str) -> Format:
    """The format of a value of `checkpoint.ckpt_format`.

    Args:
        name: one of this version's formats, a backend whose save strategy is registered with megatron-core, or the
            dotted path of such a strategy.

    Raises:
        CheckpointMismatchError: there is no such format.
    """
    found = format_of_this_version(name) or _custom().format_to_save(name)
    if found is None:
        raise CheckpointMismatchError(
            f"there is no format {name!r}: this version has {_known()}, and no save strategy is registered for "
            f"{name!r} with megatron-core (checkpoint.ckpt_format)"
        )
    return found


def format_to_read(backend: str) -> Format:
    """The format of a checkpoint, by the name that it has there; its load strategies are registered then.

    Raises:
        CheckpointMismatchError: there is no such format.
    """
    found = format_of_this_version(backend) or _custom().format_to_read(backend)
    if found is None:
        raise CheckpointMismatchError(
            f"there is no format {backend!r}: this version has {_known()}, and no load strategy is registered for "
            f"{backend!r} with megatron-core; set checkpoint.ckpt_format to the dotted path of a strategy whose module "
            "registers one"
        )
    return found


def format_of_this_version(name: str) -> Format | None:
    """A format by its name; None if this version has none of that name. Nothing that users have made is looked for."""
    return import_module(f"{_PACKAGE}.{_MODULES[name]}").FORMAT if name in _MODULES else None


def _custom() -> Any:
    return import_module(f"{_PACKAGE}.custom")  # which imports most of this package


def _known() -> str:
    return ", ".join(repr(name) for name in _MODULES)


def require_format(name: str, ranks: Ranks) -> None:
    """Make sure that a run's format can be used; a user's own strategies are registered then. Collective.

    Raises:
        CheckpointMismatchError: as `format_named`. Every rank raises.
    """
    ranks.run("finding the format", lambda: format_named(name))
