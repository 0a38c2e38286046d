"""The model's part: sharded state dicts of its chunks, and loading them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.utils import unwrap_model

from bridge.training.checkpointing.errors import CheckpointMismatchError


def model_section(index: int, count: int) -> str:
    """The section of a model chunk: `model` for the only one, `model0`, `model1` … with virtual pipelining."""
    return "model" if count == 1 else f"model{index}"


def generate_model_state_dict(
    model: list[Any],
    model_sd_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The model sections of a checkpoint.

    Args:
        model: model chunks of this rank, wrapped or not.
        model_sd_kwargs: passed on to each chunk's `sharded_state_dict`.

    Returns:
        Sharded state dicts by section name.
    """
    return {
        model_section(index, len(model)): chunk.sharded_state_dict(**(model_sd_kwargs or {}))
        for index, chunk in enumerate(unwrap_model(model))
    }


def load_model_state_dict(model: list[Any], state_dict: Mapping[str, Any], strict: bool) -> None:
    """Load every model section into its chunk.

    Args:
        model: model chunks of this rank, wrapped or not.
        state_dict: a loaded checkpoint with the sections of `generate_model_state_dict`.
        strict: as in `torch.nn.Module.load_state_dict`.

    Raises:
        CheckpointMismatchError: a section is absent, or with `strict` its keys or shapes are not the model's.
    """
    for index, chunk in enumerate(unwrap_model(model)):
        section = model_section(index, len(model))
        if section not in state_dict:
            raise CheckpointMismatchError(f"the checkpoint has no section {section!r}, which this rank's model needs")
        try:
            chunk.load_state_dict(state_dict[section], strict=strict)
        except RuntimeError as error:
            raise CheckpointMismatchError(f"the section {section!r} does not fit this rank's model: {error}") from error
