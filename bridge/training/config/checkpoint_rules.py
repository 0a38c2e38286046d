"""Rules between the settings of `checkpoint`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.config.object_storage_rules import object_storage_rules
from bridge.training.config.schema import Violation, at_least, multiple_of, show

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


LONGEST_RETRY_WAIT = 60.0
"""Seconds. Other ranks wait meanwhile, and take a rank for lost that does not come back for long."""


def checkpoint_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    """All rules of the section."""
    yield from _format_rules(checkpoint)
    yield from _save_rules(checkpoint)
    yield from _waiting_rules(checkpoint)
    yield from _load_rules(checkpoint)
    yield from _retention_rules(checkpoint)
    yield from _non_persistent_rules(checkpoint)
    yield from _in_memory_rules(checkpoint)
    yield from _replication_rules(checkpoint)
    yield from object_storage_rules(checkpoint)
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
    minutes = checkpoint.save_interval_minutes
    if minutes is not None and minutes <= 0:
        yield Violation("checkpoint.save_interval_minutes", minutes, "is too small", "set it to a number above 0")
    if checkpoint.save_signal is not None and not checkpoint.save:
        yield Violation(
            "checkpoint.save_signal",
            checkpoint.save_signal,
            "has nothing to save without checkpoint.save",
            "set checkpoint.save to a directory, or save_signal to null",
        )
    yield from at_least("checkpoint", checkpoint, 1, "storage_writers_per_rank")
    yield from at_least("checkpoint", checkpoint, 1, "max_save_failures")
    yield from at_least("checkpoint", checkpoint, 0, "save_retries")
    seconds = checkpoint.save_retry_seconds
    if seconds < 0:
        yield Violation("checkpoint.save_retry_seconds", seconds, "is too small", "set it to 0 or more")
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


def _format_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    name = checkpoint.ckpt_format
    if name in ("torch_dist", "zarr", "fsdp_dtensor") or _DOTTED_PATH.fullmatch(name) or _is_registered(name):
        return
    yield Violation(
        "checkpoint.ckpt_format",
        name,
        "is no format of this version, and no save strategy is registered for it with megatron-core",
        "set it to 'torch_dist', 'zarr' or 'fsdp_dtensor', or to the dotted path of a save strategy",
    )


def _is_registered(backend: str) -> bool:
    # Where nobody has imported the registry, nobody has registered anything.
    registry = sys.modules.get("megatron.core.dist_checkpointing.strategies.base")
    return registry is not None and any(name == backend for name, _ in registry.default_strategies["save_sharded"])


def retry_wait(seconds: float, retry: int) -> float:
    """Seconds before a failed step is tried again.

    Args:
        seconds: before the first further try; doubled with each, up to `LONGEST_RETRY_WAIT` or this.
        retry: number of the further try, from 1.
    """
    # The power is bounded too: a float has no room for that of the thousandth try.
    return float(min(max(LONGEST_RETRY_WAIT, seconds), seconds * 2 ** min(retry - 1, 32)))


def _waiting_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    for field in ("wait_timeout_minutes", "writer_stall_seconds"):
        value = getattr(checkpoint, field)
        if value <= 0:
            yield Violation(f"checkpoint.{field}", value, "is too small", "set it to a number above 0")
    retries = checkpoint.save_retries
    longest = retry_wait(checkpoint.save_retry_seconds, retries) if retries > 0 else 0
    if 0 < checkpoint.writer_stall_seconds <= longest:
        yield Violation(
            "checkpoint.writer_stall_seconds",
            checkpoint.writer_stall_seconds,
            f"is not above the {longest:g} s that a writer waits before its last try",
            "raise it, or lower save_retries or save_retry_seconds",
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


def _retention_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    most_recent, hours = checkpoint.most_recent_k, checkpoint.retain_every_hours
    if most_recent == 0:
        yield Violation(
            "checkpoint.most_recent_k", 0, "would keep nothing to resume from", "set it to 1 or more, or -1 to keep all"
        )
    yield from at_least("checkpoint", checkpoint, -1, "most_recent_k")
    yield from at_least("checkpoint", checkpoint, 1, "save_retain_interval", "retain_best_k")
    yield from multiple_of(
        "checkpoint.save_retain_interval", checkpoint.save_retain_interval, "save_interval", checkpoint.save_interval
    )
    if hours is not None and hours <= 0:
        yield Violation("checkpoint.retain_every_hours", hours, "is too small", "set it to a number above 0")
    yield from _best_rules(checkpoint)
    listed = checkpoint.retain_iterations
    if listed is not None and any(iteration < 0 for iteration in listed):
        yield Violation("checkpoint.retain_iterations", listed, "has a number below 0", "list iterations")
    limits = (checkpoint.save_retain_interval, hours, checkpoint.retain_best_k)
    if listed is not None and most_recent == -1 and limits == (None, None, None):
        yield Violation(
            "checkpoint.retain_iterations",
            listed,
            "has no effect where everything is kept",
            "set checkpoint.most_recent_k, for one, or leave this at null",
        )


def _best_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    if checkpoint.retain_best_k is not None and not checkpoint.retain_best_metric:
        yield Violation(
            "checkpoint.retain_best_k",
            checkpoint.retain_best_k,
            "does not say what is best",
            "set checkpoint.retain_best_metric to the name of a metric, as in 'loss'",
        )
    if checkpoint.retain_best_k is None:
        for field, idle in (("retain_best_metric", None), ("retain_best_mode", "min")):
            if getattr(checkpoint, field) != idle:
                yield Violation(
                    f"checkpoint.{field}",
                    getattr(checkpoint, field),
                    "has no effect without checkpoint.retain_best_k",
                    f"set that, or leave this at {show(idle)}",
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
    if kind is not None and not checkpoint.save:
        yield Violation(
            "checkpoint.non_persistent_ckpt_type",
            kind,
            "belongs to a run that saves persistent checkpoints too, and checkpoint.save is not set",
            "set checkpoint.save to a directory, or non_persistent_ckpt_type to null",
        )
    directory = checkpoint.non_persistent_global_ckpt_dir
    if kind == "global" and directory and checkpoint.save and Path(directory) == Path(checkpoint.save):
        yield Violation(
            "checkpoint.non_persistent_global_ckpt_dir",
            directory,
            "is checkpoint.save, where all but the newest checkpoint would be deleted",
            "set it to another directory, or to null for `non_persistent` inside checkpoint.save",
        )
    if kind == "local" and not checkpoint.non_persistent_local_ckpt_dir:
        yield Violation(
            "checkpoint.non_persistent_ckpt_type",
            kind,
            "has no directory",
            "set checkpoint.non_persistent_local_ckpt_dir to a directory on each node",
        )


def _in_memory_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    for field in ("in_memory_limit_gib", "in_memory_release_minutes"):
        value = getattr(checkpoint, field)
        if value is not None and value <= 0:
            yield Violation(f"checkpoint.{field}", value, "is too small", "set it to a number above 0")


def _replication_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    yield from at_least("checkpoint", checkpoint, 1, "replication_jump")
    yield from at_least("checkpoint", checkpoint, 2, "replication_factor")
    if not checkpoint.replication:
        return
    if checkpoint.non_persistent_ckpt_type not in ("local", "in_memory"):
        yield Violation(
            "checkpoint.replication",
            True,
            "copies local or in-memory checkpoints and there are none",
            "set checkpoint.non_persistent_ckpt_type to 'local' or 'in_memory', or replication to false",
        )
    if checkpoint.replication_jump is None:
        yield Violation(
            "checkpoint.replication",
            True,
            "needs to know which ranks hold copies",
            "set checkpoint.replication_jump to the ranks of one node",
        )


def replication_world_rules(checkpoint: CheckpointConfig, world_size: int) -> Iterator[Violation]:
    """Ranks replicate in groups of `replication_factor`, `replication_jump` apart, and every rank is in one."""
    jump, factor = checkpoint.replication_jump, checkpoint.replication_factor
    if not checkpoint.replication or jump is None or jump < 1 or factor < 2:
        return
    if world_size % (jump * factor):
        yield Violation(
            "checkpoint.replication_jump",
            jump,
            f"times replication_factor {factor} does not divide the {world_size} ranks",
            "change one of them, or set checkpoint.replication to false",
        )
