"""save_checkpoint: target → contents → write → commit.

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
from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.collecting import LiveObjects, collect
from bridge.training.checkpointing.contents.extra_state import is_model_section
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.parallel import Layout, default_pg_collection
from bridge.training.checkpointing.queue import is_empty_async_queue, queue_of
from bridge.training.checkpointing.transaction import Committed, Save, SaveTarget

logger = logging.getLogger(__name__)

SAVE_STRATEGY = "save_strategy"
"""Key of the checkpointing context: the format's strategy, kept between saves."""


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
        non_persistent_ckpt: not available in this version.
        train_data_iterator: saved if it has a `save_state` method.
        preprocess_common_state_dict_fn: applied to the common state before it is compared between ranks.
        prebuilt_state_dict: used instead of generating the state dict, as `generate_state_dict` returns it; its
            factories may have been expanded, and `model` may then be empty. Consumed: its sections are changed.
        pg_collection: process groups; by default those of megatron-core's parallel_state.
        callback_manager: hears `on_checkpoint_save` once the checkpoint is published.
        module_name: puts the random states' key into a namespace.

    Raises:
        ConfigError: the checkpoint settings contradict one another.
        CheckpointError: some rank failed. Every rank raises; nothing is published, older checkpoints are untouched.
    """
    del pipeline_rank, tensor_rank
    cfg = state.cfg.checkpoint
    cfg.check()
    if cfg.save is None:
        raise CheckpointSaveError("checkpoint.save is not set; name the directory to save checkpoints in")
    if non_persistent_ckpt:
        raise CheckpointSaveError("non-persistent checkpoints are not available in this version")
    started = time.monotonic()
    context = {} if checkpointing_context is None else checkpointing_context
    ranks = Ranks.current()
    groups = pg_collection or default_pg_collection()
    _finish_earlier_saves(state)

    target = SaveTarget(Path(cfg.save).expanduser(), state.train_state.step)
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
        _announce(committed, state, model, optimizer, opt_param_scheduler, callback_manager)

    staging = ranks.first("making the staging directory", lambda: _begin(target, context))
    try:
        contents = collect(live, prebuilt_state_dict, ranks)
        payload, context[SAVE_STRATEGY] = torch_dist.plan_save(
            contents.state_dict,
            staging,
            contents.content_metadata,
            ranks,
            strategy=context.get(SAVE_STRATEGY),
            writers_per_rank=cfg.storage_writers_per_rank,
            parallelization_group=groups.dp_cp if cfg.fully_parallel_save else None,
            preprocess_common=preprocess_common_state_dict_fn,
        )
        layout = Layout.of(groups, _chunks_in(contents.state_dict))
        save = Save(target, staging, payload, contents.sidecars, layout, announce, started)
        _carry_out(save, state, ranks)
    except BaseException:
        if ranks.is_first:
            commit.abandon(staging)
        raise


def _carry_out(save: Save, state: Any, ranks: Ranks) -> None:
    """Write and publish a planned save, or with `async_save` start the writing and leave the rest to the queue."""
    label = f"the checkpoint of iteration {save.target.iteration}"
    if not state.cfg.checkpoint.async_save:
        save.accept(ranks.run(f"writing {label}", save.write))
        save.publish()
        return
    request = AsyncRequest(save.write, (), [save.publish])
    queue_of(state).schedule(request, label, receive=save.accept, abandon=save.abandon)
    if ranks.is_first:
        stall = time.monotonic() - save.started
        logger.info("capturing %s held up training for %.2f s; writing it in the background", label, stall)


def _finish_earlier_saves(state: Any) -> None:
    """One save at a time: the earlier one's checkpoint is published before the next is captured."""
    if is_empty_async_queue(state):
        return
    begun = time.monotonic()
    state.async_calls_queue.finalize(blocking=True)
    waited = time.monotonic() - begun
    if waited > 0.1 and Ranks.current().is_first:
        logger.warning(
            "training waited %.1f s for the previous asynchronous save; raise checkpoint.save_interval or write faster",
            waited,
        )


def _begin(target: SaveTarget, context: dict[str, Any]) -> Path:
    commit.recover_once(target.save_dir, context)
    return commit.begin_staging(target.save_dir, target.iteration)


def _chunks_in(state_dict: dict[str, Any]) -> int:
    """Model chunks of this rank; counted in what is saved, because a prebuilt state dict may outlive its model."""
    return sum(1 for key in state_dict if is_model_section(key))


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
            "saved the checkpoint of iteration %d to %s: %.1f MiB in %.2f s",
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
