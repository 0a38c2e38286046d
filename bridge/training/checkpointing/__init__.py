"""Saving, finding and loading checkpoints: the documented names.

The work is done in the modules beside this one; start reading with `saving` and `loading`.
"""

from bridge.training.checkpointing.contents.rng import get_rng_state
from bridge.training.checkpointing.contents.state_dict import generate_state_dict
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    NotACheckpointError,
    RankLostError,
)
from bridge.training.checkpointing.layout import TRACKER_PREFIX
from bridge.training.checkpointing.loading import load_checkpoint
from bridge.training.checkpointing.manager import (
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    create_checkpoint_manager,
)
from bridge.training.checkpointing.queue import (
    is_empty_async_queue,
    maybe_finalize_async_save,
    schedule_async_save,
)
from bridge.training.checkpointing.saving import save_checkpoint

__all__ = [
    "TRACKER_PREFIX",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointLoadContext",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointSaveContext",
    "CheckpointSaveError",
    "DefaultCheckpointManager",
    "NotACheckpointError",
    "RankLostError",
    "create_checkpoint_manager",
    "generate_state_dict",
    "get_rng_state",
    "is_empty_async_queue",
    "load_checkpoint",
    "maybe_finalize_async_save",
    "save_checkpoint",
    "schedule_async_save",
]
