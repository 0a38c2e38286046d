"""Rules between the settings of `checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config.schema import Violation, at_least

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def checkpoint_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    """All rules of the section."""
    yield from _save_rules(checkpoint)
    yield from _load_rules(checkpoint)
    yield from _non_persistent_rules(checkpoint)
    yield from _replication_rules(checkpoint)
    path = checkpoint.custom_manager_class
    if path is not None and not _DOTTED_PATH.fullmatch(path):
        yield Violation(
            "checkpoint.custom_manager_class",
            path,
            "is not a dotted path",
            "write module.ClassName, as in mypackage.checkpoint.MyCheckpointManager",
        )


def _save_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    # 0 is documented: neither saves at an interval nor a save at the end.
    yield from at_least("checkpoint", checkpoint, 0, "save_interval")
    yield from at_least("checkpoint", checkpoint, 1, "storage_writers_per_rank")
    yield from at_least("checkpoint", checkpoint, -1, "most_recent_k")
    if checkpoint.save is not None and not checkpoint.save:
        yield Violation("checkpoint.save", checkpoint.save, "names no directory", "set a directory, or null")
    if checkpoint.async_save and not checkpoint.save:
        yield Violation(
            "checkpoint.async_save",
            True,
            "has nothing to save without checkpoint.save",
            "set checkpoint.save to a directory, or async_save to false",
        )
    if checkpoint.async_save and checkpoint.ckpt_format != "torch_dist":
        yield Violation(
            "checkpoint.async_save",
            True,
            f"does not work with checkpoint.ckpt_format {checkpoint.ckpt_format!r}",
            "set ckpt_format to 'torch_dist', or async_save to false",
        )


def _load_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    yield from at_least("checkpoint", checkpoint, 0, "ckpt_step")
    if checkpoint.load is not None and not checkpoint.load:
        yield Violation("checkpoint.load", checkpoint.load, "names no directory", "set a directory, or null")
    if checkpoint.ckpt_step is not None and not checkpoint.load:
        yield Violation(
            "checkpoint.ckpt_step",
            checkpoint.ckpt_step,
            "names an iteration of no directory",
            "set checkpoint.load to the directory that holds it, or ckpt_step to null",
        )
    if checkpoint.exit_on_missing_checkpoint and not (checkpoint.load or checkpoint.pretrained_checkpoint):
        yield Violation(
            "checkpoint.exit_on_missing_checkpoint",
            True,
            "has no checkpoint to miss",
            "set checkpoint.load to a directory, or exit_on_missing_checkpoint to false",
        )
    if checkpoint.load_main_params_from_ckpt and checkpoint.load_optim:
        yield Violation(
            "checkpoint.load_main_params_from_ckpt",
            True,
            "contradicts checkpoint.load_optim true, which restores the main parameters themselves",
            "set load_optim to false, or load_main_params_from_ckpt to false",
        )


def _non_persistent_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    yield from at_least("checkpoint", checkpoint, 1, "non_persistent_save_interval")
    kind = checkpoint.non_persistent_ckpt_type
    if checkpoint.non_persistent_save_interval is not None and kind is None:
        yield Violation(
            "checkpoint.non_persistent_save_interval",
            checkpoint.non_persistent_save_interval,
            "has no kind of checkpoint to save",
            "set checkpoint.non_persistent_ckpt_type, or the interval to null",
        )
    if kind == "global" and not (checkpoint.non_persistent_global_ckpt_dir or checkpoint.save):
        yield Violation(
            "checkpoint.non_persistent_ckpt_type",
            kind,
            "has no directory",
            "set checkpoint.non_persistent_global_ckpt_dir or checkpoint.save",
        )
    if kind == "local" and not checkpoint.non_persistent_local_ckpt_dir:
        yield Violation(
            "checkpoint.non_persistent_ckpt_type",
            kind,
            "has no directory",
            "set checkpoint.non_persistent_local_ckpt_dir to a directory on each node",
        )


def _replication_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    yield from at_least("checkpoint", checkpoint, 1, "replication_jump")
    yield from at_least("checkpoint", checkpoint, 2, "replication_factor")
    if not checkpoint.replication:
        return
    if checkpoint.non_persistent_ckpt_type != "local":
        yield Violation(
            "checkpoint.replication",
            True,
            "copies local checkpoints and there are none",
            "set checkpoint.non_persistent_ckpt_type to 'local', or replication to false",
        )
    if checkpoint.replication_jump is None:
        yield Violation(
            "checkpoint.replication",
            True,
            "needs to know which ranks hold copies",
            "set checkpoint.replication_jump to the ranks of one node",
        )
