"""Extra state: what modules save beside their tensors, which a checkpoint may lack without losing the model."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

EXTRA_STATE = "_extra_state"


def is_extra_state(key: str) -> bool:
    """Whether a state dict key belongs to a module's extra state (as TransformerEngine's scaling factors do)."""
    return EXTRA_STATE in key


def without_extra_state(keys: Iterable[str]) -> list[str]:
    """The keys that are no extra state, in their order."""
    return [key for key in keys if not is_extra_state(key)]


def is_model_section(section_key: str) -> bool:
    """Whether a section of a checkpoint holds a model chunk: `model`, or `model0`, … with virtual pipelining."""
    return section_key == "model" or (section_key.startswith("model") and section_key[len("model") :].isdecimal())


def delete_extra_state(state_dict: Any) -> Any:
    """Remove every extra state from the model sections of a checkpoint, or from the state dict of a model.

    Args:
        state_dict: either; changed in place. A value that is no mapping stays as it is, and so does every
            other section of a checkpoint.

    Returns:
        The same object.
    """
    if not isinstance(state_dict, MutableMapping):
        return state_dict
    sections = [state_dict[key] for key in state_dict if isinstance(key, str) and is_model_section(key)]
    for section in sections or [state_dict]:
        if isinstance(section, MutableMapping):
            for key in [key for key in section if isinstance(key, str) and is_extra_state(key)]:
                del section[key]
    return state_dict
