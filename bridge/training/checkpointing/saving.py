"""save_checkpoint: destination → contents → write → commit.

Every phase is collective and ends in agreement, so a failure on one rank is the same error on all of
them and nothing is published. An asynchronous save differs in two points only: the write runs in a
forked process, and the commit runs when the queue finds it done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.callbacks import CallbackContext, CallbackManager, CheckpointInfo
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.collecting import LiveObjects
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.failures.attempting import attempt
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.preparing import begin_to_save, prepare
from bridge.training.checkpointing.queue import finish_saves, is_empty_async_queue, queue_of
from bridge.training.checkpointing.resolve import NAMES
from bridge.training.checkpointing.retention.policies import MostRecent, policies_of
from bridge.training.checkpointing.retention.sweeper import needed_again, sweep_after_save
from bridge.training.checkpointing.retention.trash import trash_of
from bridge.training.checkpointing.save_plans import SaveJob, plan_save
from bridge.training.checkpointing.tiers import NonPersistentTier
from bridge.training.checkpointing.tiers.global_directory import directory_of
from bridge.training.checkpointing.tiers.rank_local import RankLocalTier
from bridge.training.checkpointing.transaction import Committed, SaveTarget, SaveTask

logger = logging.getLogger(__name__)


def save_checkpoint(
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    num_floating_point_operations_so_far: int,
    checkpointing_context: dict[str, Any] | None = None,
    pipeline_rank: int | None = None,
    tensor_rank: int | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any | None = None,
    preprocess_common_state_dict_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    prebuilt_state_dict: dict[str, Any] | None = None,
    pg_collection: Any | None = None,
    callback_manager: CallbackManager | None = None,
    module_name: str | None = None,
) -> None:
    """Save a checkpoint of the present state as `<checkpoint.save>/iter_N`.

    A synchronous save has published the checkpoint when it returns. An asynchronous one
    (`checkpoint.async_save`) returns when the state has been captured; `maybe_finalize_async_save`
    publishes it. If an earlier asynchronous save is still under way, it is finished first.

    Args:
        state: GlobalState: configuration, train state, tokenizer and queue.
        model: model chunks of this rank.
        optimizer: megatron-core optimizer, or None for a checkpoint without one.
        opt_param_scheduler: its parameter scheduler, or None.
        num_floating_point_operations_so_far: FLOPs spent, saved with the train state.
        checkpointing_context: kept by the caller between saves; holds the format's strategy.
        pipeline_rank: accepted for compatibility; the rank comes from `pg_collection`.
        tensor_rank: likewise.
        non_persistent_ckpt: save to the tier that `checkpoint.non_persistent_ckpt_type` names instead.
        train_data_iterator: saved if it has a `save_state` method.
        preprocess_common_state_dict_fn: applied to the common state before it is compared between ranks.
        prebuilt_state_dict: used instead of generating the state dict, as `generate_state_dict` returns it; its
            factories may have been expanded, and `model` may then be empty. Consumed: its sections are changed.
        pg_collection: process groups; by default those of megatron-core's parallel_state.
        callback_manager: hears `on_checkpoint_save` once the checkpoint is published.
        module_name: puts the random states' key into a namespace.

    Raises:
        ConfigError: the checkpoint settings contradict one another.
        CheckpointError: some rank failed. Every rank raises; the trackers and older checkpoints are untouched.
            With `checkpoint.on_save_failure: warn` most failures are logged and not raised. The failure of an
            earlier asynchronous save is raised when this one is published.
    """
    del pipeline_rank, tensor_rank
    cfg = state.cfg.checkpoint
    cfg.check()
    if cfg.save is None:
        raise CheckpointSaveError("checkpoint.save is not set; name the directory to save checkpoints in")
    started = time.monotonic()
    context = {} if checkpointing_context is None else checkpointing_context
    ranks = Ranks.current().waiting(cfg.wait_timeout_minutes)
    groups = pg_collection or default_pg_collection()
    preparation = prepare(cfg, context, groups, len(model), ranks)
    tier = preparation.tier
    target = _target(cfg, tier, state.train_state.step, non_persistent_ckpt)
    earlier = _finish_earlier_saves(state) if target.kind != "in_memory" else None
    live = LiveObjects(
        state,
        model,
        optimizer,
        opt_param_scheduler,
        num_floating_point_operations_so_far,
        train_data_iterator,
        groups,
        module_name,
    )

    def announce(committed: Committed) -> None:
        preparation.newest[committed.kind == "persistent"] = committed.iteration
        _announce(committed, state, model, optimizer, opt_param_scheduler, callback_manager)
        ranks.first("removing older checkpoints", lambda: _retain(committed, state, context))

    job = SaveJob(
        target,
        tier,
        live,
        context,
        announce,
        started,
        preparation.start,
        prebuilt_state_dict,
        preprocess_common_state_dict_fn,
    )
    # A caller that keeps no context goes on from its last save each time, as far as anybody can tell.
    resumed = target.iteration if checkpointing_context is None or state.resumed_at is None else state.resumed_at

    def save() -> None:
        begin_to_save(preparation, cfg, resumed, persistent=not non_persistent_ckpt, ranks=ranks)
        task = plan_save(job, ranks)
        try:
            _carry_out(task, state, ranks)
        except BaseException:
            task.abandon()
            raise

    background = _in_background(cfg, target)
    attempt(save, state, persistent=not non_persistent_ckpt, background=background, earlier=earlier)


def _target(cfg: Any, tier: NonPersistentTier | None, iteration: int, non_persistent: bool) -> SaveTarget:
    """Where this save goes."""
    if not non_persistent:
        return SaveTarget(Path(cfg.save).expanduser(), iteration)
    if tier is None:
        raise CheckpointSaveError(
            "a non-persistent save was asked for and checkpoint.non_persistent_ckpt_type is not set; "
            "set it to 'global', 'local' or 'in_memory'"
        )
    directory = tier.store.snapshot_path(iteration).parent if isinstance(tier, RankLocalTier) else directory_of(cfg)
    return SaveTarget(directory, iteration, tier.kind)


def _carry_out(save: SaveTask, state: Any, ranks: Ranks) -> None:
    """Write and publish a planned save, or with `async_save` start the writing and leave the rest to the queue."""
    label = f"the {NAMES[save.target.kind]} of iteration {save.target.iteration}"
    policy = FailurePolicy.of(state.cfg.checkpoint)

    def write() -> Any:
        return with_retries(f"writing {label}", save.write, policy, ranks.rank)

    if not _in_background(state.cfg.checkpoint, save.target):
        save.accept(ranks.run(f"writing {label}", write))
        save.publish()
        return
    queue_of(state).schedule(
        AsyncRequest(write, (), [save.publish]),
        label,
        receive=save.accept,
        abandon=save.abandon,
        persistent=save.target.kind == "persistent",
        stall_seconds=state.cfg.checkpoint.writer_stall_seconds,
    )
    if ranks.is_first:
        stall = time.monotonic() - save.started
        logger.info("capturing %s held up training for %.2f s; writing it in the background", label, stall)


def _in_background(cfg: Any, target: SaveTarget) -> bool:
    """Whether a save is written while training goes on."""
    # Copying into memory is what a background writer would have to wait for, too.
    return bool(cfg.async_save) and target.kind != "in_memory"


def _finish_earlier_saves(state: Any) -> CheckpointError | None:
    """One save at a time: the earlier one's checkpoint is published before the next is captured.

    Returns:
        Its failure, if that is to be raised.
    """
    if is_empty_async_queue(state):
        return None
    begun = time.monotonic()
    failed = finish_saves(state, state.cfg.checkpoint, blocking=True)
    waited = time.monotonic() - begun
    if waited > 0.1 and Ranks.current().is_first:
        logger.warning(
            "training waited %.1f s for the previous asynchronous save; raise checkpoint.save_interval or write faster",
            waited,
        )
    return failed


def _retain(committed: Committed, state: Any, context: dict[str, Any]) -> None:
    """Let older checkpoints go that nothing keeps. Rank 0; never raises, because the new one is published."""
    cfg, trash = state.cfg.checkpoint, trash_of(context)
    if committed.kind == "persistent":
        in_use = needed_again(cfg, state.loaded_from, state.base_checkpoint)
        sweep_after_save(committed.path.parent, committed.iteration, policies_of(cfg), trash, in_use)
    elif committed.kind == "non_persistent_global":
        sweep_after_save(committed.path.parent, committed.iteration, (MostRecent(1),), trash)


def _announce(
    committed: Committed,
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    callback_manager: CallbackManager | None,
) -> None:
    """Log and call back. The checkpoint is published: nothing that fails here may undo or hide that."""
    if Ranks.current().is_first:
        logger.info(
            "saved the %s of iteration %d to %s: %.1f MiB in %.2f s",
            NAMES[committed.kind],
            committed.iteration,
            committed.path,
            committed.total_bytes / 2**20,
            committed.seconds,
        )
    if callback_manager is None:
        return
    info = CheckpointInfo(committed.path, committed.iteration, committed.kind)
    try:
        callback_manager.fire(
            "on_checkpoint_save", CallbackContext(state, model, optimizer, scheduler, checkpoint=info)
        )
    except Exception:
        logger.exception("a callback failed; the checkpoint of iteration %d is published all the same", info.iteration)
