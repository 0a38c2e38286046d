"""Whole models and adapters: which of the two a checkpoint holds, and whether that is what a load is for.

An adapter-only checkpoint says so in its `content_metadata`, under `adapters`: the settings of PEFT, and the
checkpoint of the base model that they were trained on. Without that mark, in a checkpoint that another program
wrote, a section `peft` in its configuration tells. Pure functions of plain values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.errors import CheckpointMismatchError

CONTENT_KEY = "adapters"
"""In `content_metadata`, only of adapter-only checkpoints."""

_FREE_TO_CHANGE = frozenset({"dropout", "linear_in_init", "_target_"})
"""Settings that do not change what saved adapters mean."""


@dataclass(frozen=True)
class Adapters:
    """What is known of adapters: those in a checkpoint, or those of the run."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The section `peft` of the configuration, as plain values; empty where it is not known."""
    base: str | None = None
    """Directory of the base model's checkpoint; None where it is not known."""

    def mark(self) -> dict[str, Any]:
        """What an adapter-only checkpoint says in its `content_metadata`."""
        return {CONTENT_KEY: {"settings": dict(self.settings), "base": self.base}}


def adapters_of_run(settings: Any | None, base: str | None) -> Adapters:
    """The adapters of a run.

    Args:
        settings: the section `peft` of its configuration.
        base: directory of the checkpoint that its base model came from.
    """
    return Adapters({} if settings is None else dataclasses.asdict(settings), base)


def saved_adapters(content_metadata: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Adapters | None:
    """What the adapters in a checkpoint are; None if it holds a whole model.

    Args:
        content_metadata: the checkpoint's; None where it has none.
        config: its saved configuration; None where it has none.
    """
    mark = (content_metadata or {}).get(CONTENT_KEY)
    if isinstance(mark, Mapping):
        return Adapters(mark.get("settings") or {}, mark.get("base"))
    # The settings of another program's PEFT have names of their own, which say nothing here.
    return Adapters() if (config or {}).get("peft") is not None else None


def require_adapters(path: Path, saved: Adapters | None, wanted: Adapters | None) -> None:
    """Refuse adapters where a whole model is wanted, a whole model where adapters are, and other adapters.

    Args:
        path: the checkpoint, for messages.
        saved: what it holds; None for a whole model.
        wanted: what the run loads into; None for a whole model.

    Raises:
        CheckpointMismatchError: they do not fit.
    """
    if saved is not None and wanted is None:
        base = f", which is {saved.base}" if saved.base else ""
        raise CheckpointMismatchError(
            f"{path} holds only the adapters of a run with peft, and no model; set checkpoint.pretrained_checkpoint to "
            f"the base model that they were trained on{base}, and checkpoint.load to the adapters"
        )
    if saved is None and wanted is not None:
        raise CheckpointMismatchError(
            f"{path} holds a whole model, and a run with peft continues from adapters only; set "
            "checkpoint.pretrained_checkpoint to the model, and checkpoint.load to the directory that this run saves to"
        )
    if saved is not None and wanted is not None:
        _require_same_settings(path, saved.settings, wanted.settings)


def _require_same_settings(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [
        f"peft.{name} was {_comparable(saved[name])!r} and is {_comparable(wanted[name])!r}"
        for name in saved
        if name in wanted and name not in _FREE_TO_CHANGE and _comparable(saved[name]) != _comparable(wanted[name])
    ]
    if changed:
        raise CheckpointMismatchError(
            f"the adapters in {path} are others than this run's: {', '.join(changed)}; keep the settings, or "
            "start other adapters with another checkpoint.load"
        )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def other_base(saved: Adapters | None, wanted: Adapters | None) -> str | None:
    """The base model that saved adapters were trained on, if it is known and not the run's."""
    if saved is None or wanted is None or saved.base is None or wanted.base is None:
        return None
    return saved.base if Path(saved.base).resolve() != Path(wanted.base).resolve() else None
