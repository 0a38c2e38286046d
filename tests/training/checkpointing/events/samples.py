"""Events as a run emits them, for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

from bridge.training.checkpointing.events.kinds import SaveCommitted

COMMON: dict[str, Any] = {"tier": "persistent", "checkpoint_format": "torch_dist"}
"""What the events of persistent saves have in common."""


def committed(iteration: int, time: float, directory: str = "run", **values: Any) -> SaveCommitted:
    """A save of 3 GB for which training stood still for 2 s."""
    given = {
        "blocking_seconds": 2.0,
        "background_seconds": 8.0,
        "total_bytes": 3_000_000_000,
        "write_seconds": 6.0,
        "since_seconds": 50.0,
        "metrics": {"loss": 4.0 - iteration / 10},
        **values,
    }
    return SaveCommitted(time=time, iteration=iteration, path=f"{directory}/iter_{iteration:07d}", **COMMON, **given)
