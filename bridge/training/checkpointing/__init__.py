"""Saving, finding and loading checkpoints: the documented names.

The work is done in the modules beside this one; start reading with `saving` and `loading`. Names with an
underscore are those of the documented API; the modules call the same things by plain names.
"""

from logging import getLogger

from bridge.training.checkpointing.contents.dataloader import maybe_save_dataloader_state
from bridge.training.checkpointing.contents.extra_state import delete_extra_state
from bridge.training.checkpointing.contents.extra_state import is_model_section as _is_model_section
from bridge.training.checkpointing.contents.fsdp_dtensor import preprocess_fsdp_dtensor_state_dict
from bridge.training.checkpointing.contents.glu import apply_to_tensor as _apply_glu_interleave_to_tensor_data
from bridge.training.checkpointing.contents.glu import deinterleave_tensor as _deinterleave_glu_tensor
from bridge.training.checkpointing.contents.glu import interleave_tensor as _interleave_glu_tensor
from bridge.training.checkpointing.contents.glu import is_gated_fc1_key as _is_swiglu_fc1_checkpoint_key
from bridge.training.checkpointing.contents.glu import model_glu_sizes as _get_model_glu_interleave_sizes
from bridge.training.checkpointing.contents.glu import (
    process_model_state_dict as _process_state_dict_for_model_glu_interleaving,
)
from bridge.training.checkpointing.contents.glu import process_state_dict as _process_state_dict_for_glu_interleaving
from bridge.training.checkpointing.contents.legacy import (
    extract_megatron_lm_args as _extract_megatron_lm_args_from_state_dict,
)
from bridge.training.checkpointing.contents.legacy import get_train_state as _get_train_state_from_state_dict
from bridge.training.checkpointing.contents.model import generate_model_state_dict as _generate_model_state_dict
from bridge.training.checkpointing.contents.model import load_module_state_dict as _load_model_state_dict
from bridge.training.checkpointing.contents.optimizer import (
    build_sharded_state_dict_metadata as _build_sharded_state_dict_metadata,
)
from bridge.training.checkpointing.contents.peft import apply_peft_adapter_filter_to_state_dict
from bridge.training.checkpointing.contents.rng import get_rng_state
from bridge.training.checkpointing.contents.state_dict import generate_state_dict
from bridge.training.checkpointing.contents.tokenizer import save_tokenizer_assets
from bridge.training.checkpointing.contents.version import get_checkpoint_version, set_checkpoint_version
from bridge.training.checkpointing.detection import find_checkpoint_rank_0, read_metadata
from bridge.training.checkpointing.detection import get_checkpoint_format as _get_checkpoint_format
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    DirectoryInUseError,
    KeeperLostError,
    MemoryLimitError,
    NotACheckpointError,
    NotEnoughSpaceError,
    ObjectStoreError,
    RankLostError,
)
from bridge.training.checkpointing.formats.fsdp_dtensor import (
    create_fsdp_dtensor_storage_writer as _create_fsdp_dtensor_storage_writer,
)
from bridge.training.checkpointing.fsdp_stages import (
    get_save_and_finalize_callbacks,
    load_fsdp_dtensor_checkpoint,
    save_fsdp_dtensor_checkpoint,
)
from bridge.training.checkpointing.layout import NON_PERSISTENT_DIRECTORY as _NON_PERSISTENT_CKPT_SUBDIR
from bridge.training.checkpointing.layout import TRACKER_PREFIX
from bridge.training.checkpointing.loading import load_checkpoint
from bridge.training.checkpointing.loading import load_checkpoint_from_path as _load_checkpoint_from_path
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
from bridge.training.checkpointing.retention.sweeper import (
    remove_old_checkpoints as cleanup_old_non_persistent_checkpoint,
)
from bridge.training.checkpointing.saving import save_checkpoint
from bridge.training.checkpointing.stages import DIRECT_ITERATION_DIRECTORY as _DIRECT_ITERATION_DIR_SENTINEL
from bridge.training.checkpointing.stages import CheckpointType, init_checkpointing_context
from bridge.training.checkpointing.stages import get_non_persistent_iteration as _get_non_persistent_iteration
from bridge.training.checkpointing.stages import load_base_checkpoint as _load_base_checkpoint
from bridge.training.checkpointing.stages import (
    load_global_dist_base_checkpoint as _load_global_dist_base_checkpoint,
)
from bridge.training.checkpointing.stages import (
    load_model_weights_from_checkpoint as _load_model_weights_from_checkpoint,
)
from bridge.training.checkpointing.stages import (
    load_non_persistent_base_checkpoint as _load_non_persistent_base_checkpoint,
)
from bridge.training.checkpointing.stages import resolve_checkpoint_iteration as _resolve_checkpoint_iteration

logger = getLogger(__name__)

_CHECKPOINT_VERSION = get_checkpoint_version()
"""The value at import, None; the present one is `get_checkpoint_version()`."""

__all__ = [
    "TRACKER_PREFIX",
    "_CHECKPOINT_VERSION",
    "_DIRECT_ITERATION_DIR_SENTINEL",
    "_NON_PERSISTENT_CKPT_SUBDIR",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointLoadContext",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointSaveContext",
    "CheckpointSaveError",
    "CheckpointType",
    "DefaultCheckpointManager",
    "DirectoryInUseError",
    "KeeperLostError",
    "MemoryLimitError",
    "NotACheckpointError",
    "NotEnoughSpaceError",
    "ObjectStoreError",
    "RankLostError",
    "_apply_glu_interleave_to_tensor_data",
    "_build_sharded_state_dict_metadata",
    "_create_fsdp_dtensor_storage_writer",
    "_deinterleave_glu_tensor",
    "_extract_megatron_lm_args_from_state_dict",
    "_generate_model_state_dict",
    "_get_checkpoint_format",
    "_get_model_glu_interleave_sizes",
    "_get_non_persistent_iteration",
    "_get_train_state_from_state_dict",
    "_interleave_glu_tensor",
    "_is_model_section",
    "_is_swiglu_fc1_checkpoint_key",
    "_load_base_checkpoint",
    "_load_checkpoint_from_path",
    "_load_global_dist_base_checkpoint",
    "_load_model_state_dict",
    "_load_model_weights_from_checkpoint",
    "_load_non_persistent_base_checkpoint",
    "_process_state_dict_for_glu_interleaving",
    "_process_state_dict_for_model_glu_interleaving",
    "_resolve_checkpoint_iteration",
    "apply_peft_adapter_filter_to_state_dict",
    "cleanup_old_non_persistent_checkpoint",
    "create_checkpoint_manager",
    "delete_extra_state",
    "find_checkpoint_rank_0",
    "generate_state_dict",
    "get_checkpoint_version",
    "get_rng_state",
    "get_save_and_finalize_callbacks",
    "init_checkpointing_context",
    "is_empty_async_queue",
    "load_checkpoint",
    "load_fsdp_dtensor_checkpoint",
    "logger",
    "maybe_finalize_async_save",
    "maybe_save_dataloader_state",
    "preprocess_fsdp_dtensor_state_dict",
    "read_metadata",
    "save_checkpoint",
    "save_fsdp_dtensor_checkpoint",
    "save_tokenizer_assets",
    "schedule_async_save",
    "set_checkpoint_version",
]
