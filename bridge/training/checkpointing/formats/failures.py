"""What a failed load means: the checkpoint is damaged, or it is sound and does not fit. Pure functions."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    UnsafeCheckpointError,
)
from bridge.training.checkpointing.safety.safe_globals import describe

_LONGEST_REASON = 400  # characters
_BUCKET_KEY = ".bucket_idx_"
"""In the keys of `dp_reshardable` optimizer state."""

_UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, UnicodeError, ImportError)
_GARBLED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What unpickling raises beside: these mean damage only where nothing but reading is done."""
_READING = "read"
"""torch's name of the step that reads the data, after the plan has compared keys and shapes."""
_ARCHIVE = ("PytorchStreamReader", "zip archive", "Invalid magic number", "corrupt")
"""In the messages of the RuntimeErrors that torch raises for a file that is not, or no longer, what it wrote."""
_NO_METADATA = "metadata is None"
"""How the AssertionError begins that torch raises when `.metadata` cannot be read."""


def load_error(error: BaseException, directory: Path, strictness: str) -> CheckpointError:
    """The error to raise for one of megatron-core's or torch's while a checkpoint's shards are loaded.

    Args:
        error: one of their two exceptions; torch's holds what each failing rank met, so all ranks decide alike.
        directory: the checkpoint.
        strictness: the value of `checkpoint.dist_ckpt_strictness`, which decides about keys that differ.

    Returns:
        An error of ours if that is what a rank met, an UnsafeCheckpointError first. Else a CheckpointDamagedError
        if any rank could not read, or a CheckpointMismatchError.
    """
    causes = _causes(error)
    if (own := _own_error(causes)) is not None:
        return own
    step = str(error.args[0]) if causes and error.args else ""
    if any(is_damage(cause, step) for cause in causes.values()):
        return unreadable(directory, reason_of(error))
    return CheckpointMismatchError(
        f"the checkpoint in {directory} does not fit this run: {_explained(reason_of(error))} "
        f"(checkpoint.dist_ckpt_strictness is {strictness!r})"
    )


def _own_error(causes: dict[int, BaseException]) -> CheckpointError | None:
    own = {rank: cause for rank, cause in causes.items() if isinstance(cause, CheckpointError)}
    if not own:
        return None
    worst = min(own.values(), key=lambda cause: not isinstance(cause, UnsafeCheckpointError))
    ranks = ", ".join(str(rank) for rank, cause in own.items() if str(cause) == str(worst))
    return type(worst)(f"{worst} (rank {ranks})")


def unreadable(directory: Path, reason: str) -> CheckpointDamagedError:
    """The error for a checkpoint of which a part cannot be read."""
    return CheckpointDamagedError(f"the checkpoint in {directory} cannot be read: {reason}")


def is_damage(cause: BaseException, step: str = "") -> bool:
    """Whether one rank's exception in torch's step `step` means that it could not read what is stored."""
    if isinstance(cause, _UNREADABLE):
        return True
    if isinstance(cause, AssertionError):
        return str(cause).startswith(_NO_METADATA)
    if isinstance(cause, RuntimeError):
        return any(sign in str(cause) for sign in _ARCHIVE)
    return step == _READING and isinstance(cause, _GARBLED)


def _causes(error: BaseException) -> dict[int, BaseException]:
    """By rank: torch wraps each rank's exception and traceback in a dictionary; megatron-core's has none."""
    return {rank: cause for rank, (cause, _) in sorted(getattr(error, "failures", {}).items())}


def reason_of(error: BaseException) -> str:
    """The causes of one of torch's or megatron-core's exceptions, with the ranks that met them."""
    ranks_by_cause: dict[str, list[str]] = {}
    for rank, cause in _causes(error).items():
        # The advice that torch appends to a file it cannot read would only mislead.
        text = describe(cause) if isinstance(cause, _UNREADABLE) else f"{type(cause).__name__}: {cause}"
        ranks_by_cause.setdefault(_shortened(text), []).append(str(rank))
    if not ranks_by_cause:
        return _shortened(str(error))
    return "; ".join(f"{cause} (rank {', '.join(ranks)})" for cause, ranks in ranks_by_cause.items())


def _explained(reason: str) -> str:
    """With the settings that decide how an optimizer's flat buffers are divided, where these are what differs."""
    if _BUCKET_KEY not in reason:
        return reason
    return (
        f"{reason}; the optimizer's buffers were divided into other buckets: keep ddp.bucket_size, "
        "ddp.overlap_grad_reduce and ddp.grad_reduce_in_fp32 as they were, or save with "
        "checkpoint.dist_ckpt_optim_fully_reshardable: true"
    )


def _shortened(text: str) -> str:
    """Without the lists of all keys that torch and megatron-core append."""
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"
