"""The rerun state machine's part: what it has found out about a step that is to be run again.

megatron-core's machine repeats a step whose result looks wrong, and where that is not conclusive it asks for a
checkpoint, so that the next start repeats the step on another device. Mode, state and iteration go into
`common.pt`; what each rank knows is a sharded object with one shard a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.rerun_state_machine import Call, Caller, RerunMode, RerunState, get_rerun_state_machine

from bridge.training.checkpointing.errors import CheckpointMismatchError

RERUN = "rerun_state_machine"

# Which call gave the wrong result is part of the state: two tuples of names and numbers. megatron-core allows its
# enumerations, and forgets these.
torch.serialization.add_safe_globals([Call, Caller])


def rerun_is_enabled() -> bool:
    """Whether this process runs with a rerun state machine that does anything."""
    return bool(get_rerun_state_machine().get_mode() != RerunMode.DISABLED)


def get_rerun_state(ckpt_format: str = "torch_dist") -> dict[str, Any] | None:
    """What the machine wants to be saved; None unless a step is to be run again from this checkpoint.

    The position in the data is saved with the data iterator, so micro-batches are not among it.
    """
    # In every other state a resumed machine would find itself in the middle of a step that it has not begun.
    if not rerun_is_enabled() or get_rerun_state_machine().state != RerunState.WILL_RERUN_FROM_CHECKPOINT:
        return None
    return get_rerun_state_machine().state_dict(None, ckpt_format)  # type: ignore[no-any-return]


def rerun_template(ckpt_format: str = "torch_dist") -> dict[str, Any]:
    """The template to load `get_rerun_state` from a checkpoint that as many ranks saved."""
    template: dict[str, Any] = get_rerun_state_machine().state_dict(None, ckpt_format, force=True)
    return template


def set_rerun_state(section: Mapping[str, Any]) -> None:
    """Give the machine the state that a checkpoint brought, if a step is to be run again from it.

    Raises:
        CheckpointMismatchError: the section is not one that this machine understands.
    """
    machine = get_rerun_state_machine()
    try:
        if section["state"] == RerunState.WILL_RERUN_FROM_CHECKPOINT:
            machine.load_state_dict(section)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointMismatchError(
            f"the checkpoint's {RERUN} section cannot be restored: {type(error).__name__}: {error}; "
            f"set {RERUN}.rerun_mode: disabled to leave it out"
        ) from error
