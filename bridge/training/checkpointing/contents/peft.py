"""Adapters: a model's part in a run that trains only what PEFT added to a frozen base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.utils import unwrap_model

from bridge.training.checkpointing.contents.extra_state import is_model_section
from bridge.training.checkpointing.contents.model import model_section
from bridge.training.checkpointing.contents.torch_fsdp2 import loadable
from bridge.training.checkpointing.errors import CheckpointMismatchError


def apply_peft_adapter_filter_to_state_dict(state_dict: dict[str, Any], peft_config: Any) -> dict[str, Any]:
    """Leave only adapters in the model sections of a state dict, and every other section as it is.

    Extra states are left out, those of adapters too: they hold nothing that a load would miss, and adapters
    that experts share would all claim the same key.

    Args:
        state_dict: as `generate_state_dict` returns it.
        peft_config: the `PEFT` that the model was adapted by; its `adapter_key_filter` decides.

    Returns:
        A new dictionary; `state_dict` is unchanged.
    """
    return {
        section: _adapters_of(content, peft_config) if is_model_section(section) else content
        for section, content in state_dict.items()
    }


def _adapters_of(section: Mapping[str, Any], peft_config: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in section.items()
        if "_extra_state" not in key and peft_config.adapter_key_filter(key)
    }


def load_adapters(model: list[Any], state_dict: Mapping[str, Any], peft: Any, strict: bool) -> None:
    """Load the adapters of every model chunk, and nothing else of it.

    Args:
        model: model chunks of this rank, wrapped or not.
        state_dict: a loaded checkpoint, its model sections filtered.
        peft: the `PEFT` that the model was adapted by.
        strict: whether the checkpoint must hold every adapter.

    Raises:
        CheckpointMismatchError: a section is absent, has other shapes than the model, holds what the model has
            not, or, with `strict`, lacks an adapter.
    """
    for index, chunk in enumerate(unwrap_model(model)):
        section = model_section(index, len(model))
        if section not in state_dict:
            raise CheckpointMismatchError(f"the checkpoint has no section {section!r}, which this rank's adapters need")
        try:
            left = chunk.load_state_dict(loadable(chunk, state_dict[section]), strict=False)
        except RuntimeError as error:
            raise CheckpointMismatchError(f"the adapters of {section!r} do not fit this rank's: {error}") from error
        missing = [key for key in left.missing_keys if "_extra_state" not in key and peft.adapter_key_filter(key)]
        if left.unexpected_keys or (strict and missing):
            raise CheckpointMismatchError(
                f"the adapters of {section!r} do not fit this rank's: missing {missing or 'none'}, "
                f"unknown to the model {left.unexpected_keys or 'none'}"
            )
