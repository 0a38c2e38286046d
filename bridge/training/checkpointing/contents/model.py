"""The model's part: sharded state dicts of its chunks, and loading them back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from bridge.training.checkpointing.contents import fsdp_dtensor, torch_fsdp2
from bridge.training.checkpointing.contents.extra_state import without_extra_state
from bridge.training.checkpointing.contents.glu import model_glu_sizes, process_model_state_dict
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.plans.resharding import FSDP_DTENSOR

logger = logging.getLogger(__name__)


def model_section(index: int, count: int) -> str:
    """The section of a model chunk: `model` for the only one, `model0`, `model1` … with virtual pipelining."""
    return "model" if count == 1 else f"model{index}"


def generate_model_state_dict(
    model: list[Any],
    model_sd_kwargs: Mapping[str, Any] | None = None,
    ckpt_format: str = "torch_dist",
    *,
    pg_collection: Any | None = None,
) -> dict[str, Any]:
    """The model sections of a checkpoint, to save or as a template to load.

    Gated layers that the model interleaves are contiguous in it; see `contents.glu`.

    Args:
        model: model chunks of this rank, wrapped or not.
        model_sd_kwargs: passed on to each chunk's `sharded_state_dict`.
        ckpt_format: most formats store sharded state dicts. For `fsdp_dtensor` the section is the raw state
            dict of the only chunk, which `preprocess_fsdp_dtensor_state_dict` prepares for storage.
        pg_collection: accepted for compatibility; the shards follow from the model.

    Returns:
        State dicts by section name.

    Raises:
        CheckpointMismatchError: a gated layer cannot be divided into the model's blocks.
    """
    del pg_collection
    if ckpt_format == FSDP_DTENSOR:
        if len(model) != 1 or not fsdp_dtensor.is_megatron_fsdp(model[0]):
            raise CheckpointMismatchError(
                "checkpoint.ckpt_format is 'fsdp_dtensor', which needs one model chunk under Megatron FSDP; "
                "set ddp.use_megatron_fsdp: true, or ckpt_format to 'torch_dist'"
            )
        return {model_section(0, 1): fsdp_dtensor.model_section(model[0])}
    routed, shared = model_glu_sizes(model)
    sections: dict[str, Any] = {}
    for index, (wrapped, chunk) in enumerate(zip(model, unwrap_model(model), strict=True)):
        if torch_fsdp2.is_torch_fsdp2(wrapped):
            section = torch_fsdp2.model_section(wrapped, model_sd_kwargs or {})
        else:
            section = chunk.sharded_state_dict(**(model_sd_kwargs or {}))
        if routed is not None or shared is not None:
            section = process_model_state_dict(section, routed, shared, interleave=False)
        sections[model_section(index, len(model))] = section
    return sections


def load_model_state_dict(model: list[Any], state_dict: Mapping[str, Any], strict: bool) -> None:
    """Load every model section into its chunk.

    Args:
        model: model chunks of this rank, wrapped or not.
        state_dict: a loaded checkpoint with the sections of `generate_model_state_dict`.
        strict: as in `load_module_state_dict`.

    Raises:
        CheckpointMismatchError: a section is absent, or does not fit its chunk.
    """
    for index, chunk in enumerate(model):
        section = model_section(index, len(model))
        if section not in state_dict:
            raise CheckpointMismatchError(f"the checkpoint has no section {section!r}, which this rank's model needs")
        try:
            load_module_state_dict(chunk, state_dict[section], strict)
        except CheckpointMismatchError as error:
            raise CheckpointMismatchError(f"the section {section!r} does not fit this rank's model: {error}") from error


def load_module_state_dict(module: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Load a state dict into a module. With `strict`, only extra states may be missing or left over.

    Args:
        module: wrapped or not.
        state_dict: its state dict.
        strict: whether keys that are no extra state must be those of the module.

    Raises:
        CheckpointMismatchError: shapes differ, or with `strict` the keys do. The module may be loaded in part.
    """
    (target,) = unwrap_model([module])
    state_dict = torch_fsdp2.loadable(target, state_dict)
    try:
        target.load_state_dict(state_dict, strict=strict)
        return
    except RuntimeError as error:
        mismatch = error
    try:
        left = target.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        raise CheckpointMismatchError(str(error)) from error
    if left is None or without_extra_state([*left.missing_keys, *left.unexpected_keys]):
        raise CheckpointMismatchError(str(mismatch)) from mismatch
    logger.warning(
        "extra states differ and start afresh: missing in the checkpoint %s; unknown to the module %s",
        list(left.missing_keys) or "none",
        list(left.unexpected_keys) or "none",
    )
