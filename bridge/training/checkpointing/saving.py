"""save_checkpoint: destination → contents → write → commit.

Every phase is collective and ends in agreement, so a failure on one rank is the same error on all of
them and nothing is published. An asynchronous save differs in two points only: another process writes,
from a copy or as a fork, and what has come of that, its start included, is agreed on in the commit, which
runs when the queue finds it done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.callbacks import CallbackContext, CallbackManager, CheckpointInfo
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.collecting import LiveObjects
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.events.recording import SaveRecord, record_in, record_retention, record_skipped
from bridge.training.checkpointing.failures.attempting import attempt
from bridge.training.checkpointing.failures.policy import LASTING, FailurePolicy
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.io.background_writer import Patience
from bridge.training.checkpointing.objects.places import directory_policies, save_directory
from bridge.training.checkpointing.objects.run import not_uploaded, report_uploads_to, upload, wait_for_uploads
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.preparing import begin_to_save, prepare
from bridge.training.checkpointing.queue import finish_saves, is_empty_async_queue, queue_of
from bridge.training.checkpointing.resolve import NAMES
from bridge.training.checkpointing.retention.policies import MostRecent
from bridge.training.checkpointing.retention.sweeper import needed_again, sweep_after_save
from bridge.training.checkpointing.retention.trash import trash_of
from bridge.training.checkpointing.save_plans import SaveJob, plan_save
from bridge.training.checkpointing.tiers import NonPersistentTier
from bridge.training.checkpointing.tiers.global_directory import directory_of
from bridge.training.checkpointing.tiers.rank_local import RankLocalTier
from bridge.training.checkpointing.transaction import Committed, SaveTarget, SaveTask

logger = logging.getLogger(__name__)

_PATIENCE = 0.8
"""The part of `checkpoint.wait_timeout_minutes` for which a background writer may wait for storage."""


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
            earlier asynchronous save is raised when this one is published. That a background writer could not be
            started is raised when its checkpoint would be published.
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
    waiting_since = time.monotonic()
    earlier = _finish_earlier_saves(state, target) if target.kind != "in_memory" else None
    waited = time.monotonic() - waiting_since
    if target.kind != "in_memory" and not is_empty_async_queue(state):
        is_first = record_skipped(
            state.events, preparation.pace, target.iteration, target.kind, cfg.ckpt_format, target.save_dir
        )
        if is_first and ranks.is_first:
            logger.warning(
                "the %s of iteration %d is skipped: the one before is still being written; set "
                "checkpoint.async_when_busy to 'wait', or save less often",
                NAMES[target.kind],
                target.iteration,
            )
        if earlier is not None:
            raise earlier
        return
    background = _in_background(cfg, target)
    record = SaveRecord(
        state.events, preparation.pace, target.iteration, target.kind, cfg.ckpt_format, started + waited, background
    )
    _begin_record(record, target, state, ranks)
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
        # Ranks do not agree on this: the checkpoint is published, and what fails from here on does not concern it.
        preparation.newest[committed.kind == "persistent"] = committed.iteration
        record.committed(committed, speak=ranks.is_first)
        _announce(committed, state, model, optimizer, opt_param_scheduler, callback_manager)
        if ranks.is_first:
            _retain(committed, state, context)

    def save() -> None:
        task: SaveTask | None = None
        not_in_place = ""
        try:
            if not non_persistent_ckpt:
                report_uploads_to(state.events, context)
                not_in_place = wait_for_uploads(cfg, context, ranks)
            start = begin_to_save(preparation, state, target.iteration, persistent=not non_persistent_ckpt, ranks=ranks)
            job = SaveJob(
                target,
                tier,
                live,
                context,
                announce,
                started,
                start,
                prebuilt_state_dict,
                preprocess_common_state_dict_fn,
            )
            task = plan_save(job, ranks)
            _carry_out(task, state, ranks, record)
        except BaseException as error:
            record.failed(error, published=task is not None and task.published)
            if task is not None:
                task.abandon()
            raise
        # After the save: the state would be nowhere if it was not made for that.
        if not_in_place:
            unwritten = finish_saves(state, cfg, blocking=True) if background else None
            raise unwritten or CheckpointSaveError(not_in_place)

    attempt(save, state, persistent=not non_persistent_ckpt, background=background, earlier=earlier)


def _target(cfg: Any, tier: NonPersistentTier | None, iteration: int, non_persistent: bool) -> SaveTarget:
    """Where this save goes."""
    if not non_persistent:
        return SaveTarget(save_directory(cfg), iteration)
    if tier is None:
        raise CheckpointSaveError(
            "a non-persistent save was asked for and checkpoint.non_persistent_ckpt_type is not set; "
            "set it to 'global', 'local' or 'in_memory'"
        )
    directory = tier.store.snapshot_path(iteration).parent if isinstance(tier, RankLocalTier) else directory_of(cfg)
    return SaveTarget(directory, iteration, tier.kind)


def _begin_record(record: SaveRecord, target: SaveTarget, state: Any, ranks: Ranks) -> None:
    """Emit that the save begins; the directory is claimed by now, so its file of events is this run's."""
    if ranks.is_first and state.cfg.logger.checkpoint_events:
        record_in(state.events, save_directory(state.cfg.checkpoint))
    record.begun(target.save_dir)


def _carry_out(save: SaveTask, state: Any, ranks: Ranks, record: SaveRecord) -> None:
    """Write and publish a planned save, or with `async_save` start the writing and leave the rest to the queue."""
    label = f"the {NAMES[save.target.kind]} of iteration {save.target.iteration}"
    policy = FailurePolicy.of(state.cfg.checkpoint)

    def write() -> Any:
        return with_retries(f"writing {label}", save.write, policy, ranks.rank)

    if not record.background:
        record.captured()
        save.finish(f"writing {label}", write, record.written)
        return
    cfg = state.cfg.checkpoint
    # Before the other ranks, which may be waiting for this one, give it up.
    storage_seconds = _PATIENCE * 60.0 * cfg.wait_timeout_minutes
    patience = Patience(cfg.writer_stall_seconds, storage_seconds, policy.waits, tuple(LASTING))
    has_begun = queue_of(state).schedule(
        AsyncRequest(write, (), []),
        label,
        abandon=save.abandon,
        persistent=save.target.kind == "persistent",
        stall_seconds=cfg.writer_stall_seconds,
        storage_seconds=storage_seconds,
        failed=lambda error: record.failed(error, published=save.published),
        halted=record.halted,
        start=lambda name: save.begin(name, patience),
        finish=lambda phase, collect: save.finish(phase, collect, record.written),
        awaited=save.start_is_awaited,
    )
    record.captured(has_begun)


def _in_background(cfg: Any, target: SaveTarget) -> bool:
    """Whether a save is written while training goes on."""
    # Copying into memory is what a background writer would have to wait for, too.
    return bool(cfg.async_save) and target.kind != "in_memory"


def _finish_earlier_saves(state: Any, target: SaveTarget) -> CheckpointError | None:
    """One save at a time: the earlier one's checkpoint is published before the next is captured.

    With `async_when_busy: skip` it may be left under way, and then there is no next one. A persistent save is not
    skipped for the sake of a non-persistent one.

    Returns:
        Its failure, if that is to be raised.
    """
    skips = state.cfg.checkpoint.async_when_busy == "skip"
    if is_empty_async_queue(state):
        return None
    if skips and (target.kind != "persistent" or queue_of(state).has_persistent):
        failed = finish_saves(state, state.cfg.checkpoint, blocking=False)
        if failed is not None or not is_empty_async_queue(state):
            return failed
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
    try:
        _sweep(committed, state, context)
    except Exception:
        logger.exception("older checkpoints in %s stay until the next save", committed.path.parent)


def _sweep(committed: Committed, state: Any, context: dict[str, Any]) -> None:
    cfg, trash = state.cfg.checkpoint, trash_of(context)
    if committed.kind == "persistent":
        in_use = needed_again(cfg, state.loaded_from, state.base_checkpoint)
        upload(committed.iteration, context, in_use)
        in_use += not_uploaded(cfg, context)
        swept = sweep_after_save(committed.path.parent, committed.iteration, directory_policies(cfg), trash, in_use)
    elif committed.kind == "non_persistent_global":
        starts_in = save_directory(cfg)
        newest = (MostRecent(1),)
        swept = sweep_after_save(committed.path.parent, committed.iteration, newest, trash, starts_in=starts_in)
    else:
        return
    if swept is not None:
        record_retention(state.events, committed.path.parent, committed.iteration, committed.kind, swept)


def _announce(
    committed: Committed,
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    callback_manager: CallbackManager | None,
) -> None:
    """Call back. The checkpoint is published: nothing that fails here may undo or hide that."""
    if callback_manager is None:
        return
    info = CheckpointInfo(committed.path, committed.iteration, committed.kind)
    try:
        callback_manager.fire(
            "on_checkpoint_save", CallbackContext(state, model, optimizer, scheduler, checkpoint=info)
        )
    except Exception:
        logger.exception("a callback failed; the checkpoint of iteration %d is published all the same", info.iteration)
