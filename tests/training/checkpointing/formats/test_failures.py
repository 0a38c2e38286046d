"""Which errors of torch and megatron-core mean damage, and which that a checkpoint does not fit."""

import pickle
import traceback
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.formats.failures import load_error

DIRECTORY = Path("iter_0000004")


def failed(step: str, **causes: BaseException) -> CheckpointException:
    """torch's exception for `rank0=…, rank1=…`."""
    return CheckpointException(step, {int(rank[4:]): (e, traceback.StackSummary()) for rank, e in causes.items()})


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        ("read", OSError(5, "Input/output error")),
        ("read", EOFError("Ran out of input")),
        ("read", pickle.UnpicklingError("invalid load key")),
        ("read", RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory")),
        ("read", KeyError("no such storage")),
        ("plan", AssertionError("metadata is None; global metadata read failed: Ran out of input")),
    ],
)
def test_what_cannot_be_read_is_damage_whatever_the_strictness(step: str, cause: BaseException) -> None:
    error = load_error(failed(step, rank1=cause), DIRECTORY, "raise_all")
    assert type(error) is CheckpointDamagedError
    assert str(error).startswith("the checkpoint in iter_0000004 cannot be read: ")
    assert str(error).endswith("(rank 1)")
    assert "strictness" not in str(error)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointingException("Unexpected keys (not found in the checkpoint)"),
        failed("plan", rank0=KeyError("w from model not in state dict")),
        failed("plan", rank0=CheckpointingException("Global shape mismatch for loaded")),
        failed("read", rank0=AssertionError("req w mismatch sizes [2] vs [3]")),
        failed("read", rank0=RuntimeError("CUDA out of memory")),
    ],
)
def test_keys_and_shapes_that_differ_are_a_mismatch_with_the_setting(error: BaseException) -> None:
    found = load_error(error, DIRECTORY, "raise_all")
    assert type(found) is CheckpointMismatchError
    assert str(found).startswith("the checkpoint in iter_0000004 does not fit this run: ")
    assert str(found).endswith("(checkpoint.dist_ckpt_strictness is 'raise_all')")


def test_one_ranks_damage_decides_and_equal_causes_are_told_once() -> None:
    error = failed("plan", rank0=KeyError("w"), rank1=OSError("gone"), rank2=OSError("gone"))
    assert str(load_error(error, DIRECTORY, "log_all")) == (
        "the checkpoint in iter_0000004 cannot be read: KeyError: 'w' (rank 0); OSError: gone (rank 1, 2)"
    )
