"""How a save is planned and how a checkpoint is read, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.training.checkpointing.io.elsewhere import Shards
    from bridge.training.checkpointing.io.strategy import IoBackend


@dataclass(frozen=True)
class SaveOptions:
    """How a save is to be planned. What a format has no choice in, it leaves out of account."""

    strategy: Any | None = None
    """What `plan_save` returned beside the write of an earlier save, of the same format."""
    writers_per_rank: int = 1
    """Files that each rank writes at the same time."""
    parallelization_group: Any | None = None
    """Replicas within this group share the writing; None: the main replica writes."""
    preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """As megatron-core's `preprocess_common_before_consistancy_check`."""
    assume_constant_structure: bool = False
    """Warn where the structure has changed since the save before."""
    io_backend: IoBackend = "direct"
    """Who writes the files."""


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is to be read. What a format has no choice in, it leaves out of account."""

    strictness: str
    """One of megatron-core's `StrictHandling` values."""
    parallelization_group: Any | None = None
    """Each rank of this group reads a share and they exchange; None: everybody reads."""
    validate_access: bool = True
    """Check that the ranks' requests cover every requested tensor exactly once."""
    io_backend: IoBackend = "direct"
    """Who reads the files."""
    shards: Shards | None = None
    """Shards that are not in the directory, for a format that `reads_elsewhere`."""
