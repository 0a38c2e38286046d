"""Messages of a job with many ranks: who speaks, and how a line looks."""

from __future__ import annotations

import logging
import sys
import warnings

EVERY_RANK = {"every_rank": True}
"""Pass this as `extra` to log a message below WARNING from a rank other than 0."""


class _RankFilter(logging.Filter):
    """What every rank would say alike is said by rank 0; warnings and errors are never held back."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self._rank == 0 or record.levelno >= logging.WARNING or getattr(record, "every_rank", False)


def configure_logging(level: str, rank: int, world_size: int) -> None:
    """Send messages of `level` and above to standard error, each with time and rank.

    Below WARNING only rank 0 speaks. Megatron-Core's own messages are shown from ERROR on, or all of them at
    level DEBUG.
    """
    where = f" [rank {rank}]" if world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_RankFilter(rank))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("megatron").setLevel(logging.DEBUG if level == "DEBUG" else logging.ERROR)


def quiet_library_warnings() -> None:
    """Hide what torch and Megatron-Core warn of at every start and no user can act on; call before importing."""
    for module in ("megatron", "torch", "nvidia_resiliency_ext"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")
