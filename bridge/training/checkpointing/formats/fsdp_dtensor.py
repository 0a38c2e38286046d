"""The documented functions of `fsdp_dtensor`, a format that this version does not have: each refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from bridge.training.checkpointing.errors import CheckpointError


def get_save_and_finalize_callbacks(writer: Any, save_state_dict_ret: Any) -> NoReturn:
    """An asynchronous save's request.

    Raises:
        CheckpointError: always, in this version.
    """
    del writer, save_state_dict_ret
    _refuse("get_save_and_finalize_callbacks")


def preprocess_fsdp_dtensor_state_dict(cfg: Any, raw_state_dict: dict[str, Any], model: Any) -> NoReturn:
    """A state dict in the form that is saved.

    Raises:
        CheckpointError: always, in this version.
    """
    del cfg, raw_state_dict, model
    _refuse("preprocess_fsdp_dtensor_state_dict")


def save_fsdp_dtensor_checkpoint(
    checkpoint_path: str | Path,
    state_dict: dict[str, Any],
    *,
    cfg: Any,
    model: Any,
    storage_writer: Any | None = None,
    barrier: bool = True,
) -> NoReturn:
    """Save a state dict of DTensors.

    Raises:
        CheckpointError: always, in this version.
    """
    del checkpoint_path, state_dict, cfg, model, storage_writer, barrier
    _refuse("save_fsdp_dtensor_checkpoint")


def create_fsdp_dtensor_storage_writer(checkpoint_path: str) -> NoReturn:
    """The storage writer of a save.

    Raises:
        CheckpointError: always, in this version.
    """
    del checkpoint_path
    _refuse("_create_fsdp_dtensor_storage_writer")


def load_fsdp_dtensor_checkpoint(
    load_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int | None,
    release: bool = False,
    checkpoint_path_override: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    cfg: Any | None = None,
) -> NoReturn:
    """Load a state dict of DTensors.

    Raises:
        CheckpointError: always, in this version.
    """
    del load_dir, ckpt_cfg, rank0, sharded_state_dict, iteration, release
    del checkpoint_path_override, checkpointing_context, cfg
    _refuse("load_fsdp_dtensor_checkpoint")


def _refuse(function: str) -> NoReturn:
    raise CheckpointError(f"{function}: the format fsdp_dtensor is not available in this version; use torch_dist")
