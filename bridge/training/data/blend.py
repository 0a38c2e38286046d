"""Which datasets a run draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.training.data.errors import DatasetError

if TYPE_CHECKING:
    from bridge.training.config import DatasetConfig


@dataclass(frozen=True)
class Blend:
    """Which datasets to draw from: path prefixes without .bin/.idx, and how often to draw from each."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    """One positive number for each path, in any unit; None draws from each in proportion to its size."""


def blend_from_config(cfg: DatasetConfig) -> Blend:
    """The blend that `dataset.path` and `dataset.weights` describe.

    Raises:
        DatasetError: no path, or weights that do not fit.
    """
    if not cfg.path:
        raise DatasetError(
            "dataset.path is not set; give the path prefix of an indexed dataset (scripts/prepare_data.py "
            "makes DIR/text_document), or set dataset.mock=true"
        )
    paths = (cfg.path,) if isinstance(cfg.path, str) else tuple(cfg.path)
    if cfg.weights is None:
        return Blend(paths)
    if len(cfg.weights) != len(paths):
        raise DatasetError(
            f"dataset.weights has {len(cfg.weights)} entries and dataset.path has {len(paths)}; expected one "
            "weight for each path"
        )
    if not all(0 < weight < float("inf") for weight in cfg.weights):
        raise DatasetError(f"dataset.weights is {list(cfg.weights)}; expected positive numbers")
    return Blend(paths, tuple(map(float, cfg.weights)) if len(paths) > 1 else None)
