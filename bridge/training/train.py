"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from bridge import accelerator
from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.checkpointing import CheckpointError, CheckpointSaveContext, RankLostError
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.events.configured import add_configured
from bridge.training.checkpointing.events.kinds import RunEnded, RunStarted
from bridge.training.config import ConfigContainer
from bridge.training.data import IteratorBuilder, build_train_iterator
from bridge.training.flops import add_flops
from bridge.training.initialize import shut_down
from bridge.training.metrics import MetricsFile, StepMetrics, log_step
from bridge.training.optimizer import required_train_iters
from bridge.training.rerun import Position, StepFailed, position_of
from bridge.training.save_decisions import Decision, SaveDecisions, SaveKind, watched_signals
from bridge.training.setup import Run, setup
from bridge.training.signals import CaughtSignals
from bridge.training.step import train_step
from bridge.training.step_watch import StepWatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOutcome:
    """How a run came to its end, the same on every rank."""

    reached_end: bool
    """Whether `train.train_iters` iterations are completed; False after a planned early exit."""
    reason: str
    iteration: int
    """Completed iterations."""
    exit_code: int = 0
    """The status that the rerun state machine asks the process to exit with; 0 if it asks for none."""


def pretrain(
    cfg: ConfigContainer,
    callbacks: CallbackManager | None = None,
    iterator_builder: IteratorBuilder = build_train_iterator,
) -> TrainOutcome:
    """Train as `cfg` says: set up, load, train, save. Collective over all ranks.

    Starts torch.distributed from torchrun's variables and leaves it at the end. A caller that has started it
    keeps it, and may call this again: torch cannot reliably start a second time at the same address.

    The arguments are those of `setup`.

    Raises:
        Whatever `setup` and `train` raise. The process groups are then left as they are, because ranks that
        wait for this one would keep it from ever leaving them in order.
    """
    keeps_groups = dist.is_initialized()
    outcome = train(setup(cfg, callbacks, iterator_builder))
    if not keeps_groups:
        shut_down()
    return outcome


def train(run: Run, clock: Callable[[], float] = time.monotonic) -> TrainOutcome:
    """Run the iterations that are left, and finish every save. Collective over all ranks.

    Args:
        run: what `setup` made.
        clock: tells what depends on minutes, in seconds; it never goes back.

    Raises:
        DataExhaustedError: the data ended before `train.train_iters`.
        CheckpointError: a save failed; on every rank.
    """
    try:
        return _train(run, clock)
    except BaseException:
        # A save under way cannot be published without the other ranks: it is left to the next start.
        if run.state.async_calls_queue is not None:
            run.state.async_calls_queue.abort()
        raise
    finally:
        run.state.events.close()


def _train(run: Run, clock: Callable[[], float]) -> TrainOutcome:
    cfg, progress = run.cfg, run.state.train_state
    train_iters = required_train_iters(cfg)
    if progress.step >= train_iters:
        logger.warning("train.train_iters (%d) was reached before: iteration %d is loaded", train_iters, progress.step)
    add_configured(run.state.events, cfg.logger, Ranks.current())  # where an earlier call has ended them
    run.state.events.emit(_started(run))
    run.callback_manager.fire("on_train_start", _callback_context(run))
    with CaughtSignals(watched_signals(cfg.train, cfg.checkpoint)) as signals:
        watch = StepWatch(cfg.train, cfg.checkpoint, signals, clock)
        with (
            MetricsFile(_metrics_path(run)) as metrics_file,
            run.callback_manager.listening("on_checkpoint_save", watch.published),
        ):
            exit_reason, exit_code = _run_steps(run, train_iters, watch, metrics_file)
    run.callback_manager.fire("on_train_end", _callback_context(run))
    reached_end = progress.step >= train_iters
    reason = f"train.train_iters ({train_iters}) reached" if reached_end else str(exit_reason)
    run.state.events.emit(RunEnded(iteration=progress.step, reason=reason))
    logger.info("training ended after iteration %d: %s", progress.step, reason)
    return TrainOutcome(reached_end, reason, progress.step, exit_code)


def _run_steps(run: Run, train_iters: int, watch: StepWatch, metrics_file: MetricsFile) -> tuple[str | None, int]:
    """Iterate until something ends the run, and save what is due; return why it ended, and the status to exit with."""
    progress = run.state.train_state
    decisions = SaveDecisions.of(run.cfg.train, run.cfg.checkpoint, train_iters)
    reruns = run.cfg.rerun_state_machine.rerun_mode != "disabled"
    decision, position, exit_code = Decision(), None, 0
    first = decisions.after_load(run.state.loaded_kind, is_over=progress.step >= train_iters)
    _carry_out(run, first, watch)
    while decision.exit_reason is None and progress.step < train_iters:
        run.manager.finalize_async_saves(run.state, blocking=False)
        position = position_of(run.train_data_iterator) if reruns else None
        failed = _iterate(run, metrics_file, train_iters)
        if failed is not None:
            decision, exit_code = decisions.after_failed_step(failed.reason, failed.save), failed.exit_code
            break
        position = None
        moment = watch.agree(progress.step)
        decision = decisions.after_step(moment)
        if decision.exit_reason is None:
            asked = moment.requested or run.cfg.checkpoint.save_signal in moment.signals
            _carry_out(run, decision, watch, must_be_made=asked)
    _finish_saves(run, decision, watch, position)
    return decision.exit_reason, exit_code


def _finish_saves(run: Run, last: Decision, watch: StepWatch, position: Position | None) -> None:
    """Make the run's last save, if there is one, and wait until all are published."""
    with _raising_afterwards(_wait_for_saves(run) if last.save is not None else None):
        _carry_out(run, last, watch, position)
        run.manager.finalize_async_saves(run.state, blocking=True, terminate=True)


@contextlib.contextmanager
def _raising_afterwards(failed: CheckpointError | None) -> Iterator[None]:
    """Raise an earlier save's failure when something else has been done; only log it where that fails as well."""
    try:
        yield
    except BaseException:
        if failed is not None:
            logger.error("an earlier save had failed too: %s", failed)
        raise
    if failed is not None:
        raise failed


def _wait_for_saves(run: Run) -> CheckpointError | None:
    """Wait for the saves under way, for which the next one would be left out; return what one of them failed for."""
    if run.cfg.checkpoint.async_when_busy != "skip":
        return None
    try:
        run.manager.finalize_async_saves(run.state, blocking=True)
    except RankLostError:
        raise
    except CheckpointError as error:
        return error
    return None


def _carry_out(
    run: Run, decision: Decision, watch: StepWatch, position: Position | None = None, must_be_made: bool = False
) -> None:
    """Save what was decided.

    Args:
        run: the run.
        decision: what is saved.
        watch: is told.
        position: of the data iterator, in place of where it is.
        must_be_made: whether somebody has asked for it, so that it is not left out while another is written.
    """
    if decision.save is None:
        return
    if must_be_made and decision.save == "persistent":
        failed = _wait_for_saves(run)
        with _raising_afterwards(failed):
            _carry_out(run, decision, watch, position)
            if failed is not None:
                run.manager.finalize_async_saves(run.state, blocking=True)
        return
    cfg, iteration = run.cfg.checkpoint, run.state.train_state.step
    queue = run.state.async_calls_queue
    # A save that is left out may be due again at every step; the first in a row is warned of.
    may_be_left_out = cfg.async_when_busy == "skip" and queue is not None and len(queue) > 0
    level = logging.DEBUG if may_be_left_out else logging.INFO
    logger.log(level, "saving a %s checkpoint of iteration %d: %s", decision.save, iteration, decision.why)
    if decision.save == "persistent":
        watch.saving(iteration)
    begun = 0 if queue is None else queue.scheduled
    _save(run, decision.save, position)
    is_busy = queue is not None and len(queue) > 0 and queue.scheduled == begun
    was_left_out = cfg.async_when_busy == "skip" and is_busy
    if decision.save == "persistent" and not was_left_out:
        watch.saved()


def _iterate(run: Run, metrics_file: MetricsFile, train_iters: int) -> StepFailed | None:
    """One iteration, with everything that counts it; or why it could not be made, and then nothing has changed."""
    progress = run.state.train_state
    started = time.perf_counter()
    update_num_microbatches(progress.consumed_train_samples, verbose=True)
    batch_size = get_current_global_batch_size()
    lr = get_canonical_lr_for_logging(run.optimizer.param_groups)
    result = train_step(run.cfg, run.model, run.optimizer, run.scheduler, run.train_data_iterator)
    accelerator.synchronize()
    if result.failed is not None:
        return result.failed

    progress.step += 1
    progress.consumed_train_samples += batch_size
    if not result.updated:
        progress.skipped_train_samples += batch_size
    progress.floating_point_operations_so_far = add_flops(
        progress.floating_point_operations_so_far, batch_size * run.flops_per_sequence
    )
    for name, value in (("loss", result.loss), ("grad_norm", result.grad_norm)):
        if value is not None:
            run.state.metrics[name] = value
    if _is_last_rank() and result.loss is not None:
        metrics = StepMetrics(
            iteration=progress.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            consumed_train_samples=progress.consumed_train_samples,
            seconds=time.perf_counter() - started,
            skipped=not result.updated,
        )
        metrics_file.write(metrics)
        if progress.step % run.cfg.logger.log_interval == 0:
            log_step(metrics, train_iters, tokens=batch_size * run.cfg.model.seq_length)
    run.callback_manager.fire("on_train_step_end", _callback_context(run))
    return None


def _save(run: Run, kind: SaveKind, position: Position | None) -> None:
    if run.cfg.ddp.overlap_param_gather and not run.cfg.ddp.use_megatron_fsdp:
        # The optimizer's new parameters may still be on their way to the other ranks.
        for chunk in run.model:
            chunk.start_param_sync(force_sync=True)
    context = CheckpointSaveContext(
        run.state,
        run.model,
        run.optimizer,
        run.scheduler,
        run.state.train_state.floating_point_operations_so_far,
        train_data_iterator=run.train_data_iterator if position is None else position,
        non_persistent_ckpt=kind == "non-persistent",
        pg_collection=run.pg_collection,
    )
    run.manager.save(context, run.callback_manager)


def _started(run: Run) -> RunStarted:
    path = run.cfg.logger.metrics_path
    metrics_path = None if path is None else str(Path(path).absolute())
    return RunStarted(iteration=run.state.train_state.step, world_size=dist.get_world_size(), metrics_path=metrics_path)


def _callback_context(run: Run) -> CallbackContext:
    return CallbackContext(run.state, run.model, run.optimizer, run.scheduler)


def _is_last_rank() -> bool:
    """The rank that reports: it is in the last pipeline stage, where the loss is."""
    return bool(dist.get_rank() == dist.get_world_size() - 1)


def _metrics_path(run: Run) -> Path | None:
    path = run.cfg.logger.metrics_path
    return Path(path) if path is not None and _is_last_rank() else None
