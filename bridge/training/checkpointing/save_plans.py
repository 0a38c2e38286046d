"""The plan of one save: capture the state, and make of it what is written, in the form that the destination has."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.collecting import (
    Captured,
    LiveObjects,
    capture,
    collect,
    collects_alone,
    exchange,
)
from bridge.training.checkpointing.contents.extra_state import is_model_section
from bridge.training.checkpointing.disk import SharedDirectory
from bridge.training.checkpointing.failed_steps import attempt, step
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.formats import Format
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.formats.planning import SavePlanning
from bridge.training.checkpointing.formats.registry import format_named
from bridge.training.checkpointing.io.background_writer import BACKGROUND_WRITER, BackgroundWriter
from bridge.training.checkpointing.layout import new_saving_name
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.room import (
    has_room_for_recent_size,
    require_snapshot_size,
    require_state_size,
    room_for,
)
from bridge.training.checkpointing.tiers import NonPersistentTier
from bridge.training.checkpointing.tiers.global_directory import SETTING as GLOBAL_SETTING
from bridge.training.checkpointing.tiers.global_directory import GlobalTier
from bridge.training.checkpointing.tiers.rank_local import RankLocalTier, plan_rank_local_save
from bridge.training.checkpointing.transaction import Committed, Contents, Save, SaveTarget, SaveTask, numbers_among

SAVE_STRATEGY = "save_strategy"
"""Key of the checkpointing context: what the format keeps between saves."""

SAVE_FORMAT = "save_format"
"""Key of the checkpointing context: the name of the format that saves have, and the format."""

COLLECTED_ALONE = "collected_alone"
"""Key of the checkpointing context: with what no rank needs another to collect its state (`_Alone`), or None."""

SNAPSHOT_STRUCTURE = "local_checkpoint_cache"
"""Key of the checkpointing context: how ranks share the state in local and in-memory checkpoints."""

_STAGING = "making the staging directory"


@dataclass(frozen=True)
class SaveJob:
    """Everything that goes into one save."""

    target: SaveTarget
    tier: NonPersistentTier | None
    live: LiveObjects
    context: dict[str, Any]
    """The checkpointing context."""
    announce: Callable[[Committed], None]
    """Called on every rank when the checkpoint is published."""
    started: float
    """When the save began, by the monotonic clock."""
    start: int = 0
    """Number of the run's start."""
    prebuilt_state_dict: dict[str, Any] | None = None
    preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def cfg(self) -> Any:
        """The checkpoint configuration."""
        return self.live.state.cfg.checkpoint


def plan_save(job: SaveJob, ranks: Ranks) -> SaveTask:
    """Capture the state and plan its writing. Collective.

    Raises:
        CheckpointError: on every rank; nothing of the save is left.
    """
    if isinstance(job.tier, RankLocalTier) and job.target.kind == job.tier.kind:
        return _plan_snapshots(job, job.tier, ranks)
    return _plan_directory(job, ranks)


class _NotMeasured(Exception):
    """There may be too little room, and nobody has measured the state. Nothing was written."""


@dataclass(frozen=True)
class _Alone:
    """With what no rank needs another to collect its state, as all of them have found."""

    optimizer: weakref.ref[Any] | None
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, live: LiveObjects) -> _Alone | None:
        """What to remember; None where this rank may need others."""
        if not collects_alone(live):
            return None
        return cls(None if live.optimizer is None else weakref.ref(live.optimizer), _settings_of(live))

    def is_still_so(self, live: LiveObjects) -> bool:
        """Whether these are the same optimizer and settings. The same answer on every rank."""
        known, found = self.optimizer, live.optimizer
        is_same = found is None if known is None else found is not None and known() is found
        return is_same and self.settings == _settings_of(live)


def _settings_of(live: LiveObjects) -> tuple[Any, ...]:
    """Those that decide whether ranks need one another to collect their state."""
    cfg = live.state.cfg.checkpoint
    apart = live.state.cfg.rng.data_parallel_random_init
    return cfg.ckpt_format, cfg.save_optim, cfg.save_rng, cfg.dist_ckpt_optim_fully_reshardable, apart


def _plan_directory(job: SaveJob, ranks: Ranks) -> SaveTask:
    form = _format(job, ranks)
    known: _Alone | None = job.context.get(COLLECTED_ALONE)
    is_alone = known is not None and known.is_still_so(job.live)
    if is_alone and job.prebuilt_state_dict is None and not form.saves_while_planning:
        with contextlib.suppress(_NotMeasured):
            return _planned(job, form, ranks, alone=True)
    alone, _ = attempt(lambda: _Alone.of(job.live))
    all_alone = ranks.ask_with_next(alone is not None)
    save = _planned(job, form, ranks, alone=False)
    job.context[COLLECTED_ALONE] = alone if all_alone() else None
    return save


def _planned(job: SaveJob, form: Format, ranks: Ranks, *, alone: bool) -> SaveTask:
    """Begin a save, capture the state and plan its writing. Collective.

    Args:
        job: the save.
        form: its format.
        ranks: all ranks.
        alone: no rank needs another to collect its state. So they first meet where its structure is compared with that
            of the save before: who has failed until then says so there.

    Raises:
        _NotMeasured: `alone`, and the state has to be measured, which is done before it is planned. Every rank raises.
            To begin anew captures the state again, so that users' code is asked for its part of it once more.
    """
    target, cfg, groups, policy = job.target, job.cfg, job.live.groups, FailurePolicy.of(job.cfg)
    room = room_for(target, job.live.state, job.context)
    target = replace(target, checkpoint_format=form.name)
    staging = target.save_dir / new_saving_name(target.iteration, ranks.new_name())
    try:
        begun, not_begun = attempt(lambda: not ranks.is_first or _begin_staging(job, staging, room, policy))
        # Whatever has become of it: what a user's model or iterator does here may need all ranks.
        captured, not_captured = attempt(lambda: capture(job.live, job.prebuilt_state_dict))
        has_room = ranks.ask_with_next(bool(begun))
        writer = writer_of(job.context) if cfg.async_save and cfg.io_backend == "direct" else None
        has_writer = ranks.ask_with_next(writer is None or writer.is_ready)

        def require_begun() -> Captured:
            for error in (not_captured, not_begun):
                if error is not None:
                    raise error
            return captured  # type: ignore[return-value]

        contents: Callable[[], Contents]
        if alone:
            contents = cache(lambda: exchange(job.live, require_begun(), ranks)())
        else:
            contents = exchange(job.live, ranks.run("beginning the save", require_begun), ranks)
            if not has_room():
                require_state_size(room, lambda: contents().state_dict, target.iteration, ranks)
        payload, job.context[SAVE_STRATEGY] = form.plan_save(
            lambda: contents().state_dict,
            staging,
            {} if captured is None else captured.metadata,
            ranks,
            SaveOptions(
                strategy=job.context.get(SAVE_STRATEGY) or _first_planning(job.live.state),
                writers_per_rank=cfg.storage_writers_per_rank,
                parallelization_group=groups.dp_cp if cfg.fully_parallel_save else None,
                preprocess_common=job.preprocess_common,
                assume_constant_structure=cfg.ckpt_assume_constant_structure,
                io_backend=cfg.io_backend,
            ),
        )
        if alone and not has_room():
            raise _NotMeasured
        metrics = numbers_among(job.live.state.metrics)
        return Save(
            target,
            staging,
            payload,
            contents().sidecars,
            _layout(groups, contents().state_dict),
            job.announce,
            job.started,
            metrics,
            policy=policy,
            start=job.start,
            checksum=cfg.checksum,
            writer=writer,
            start_is_awaited=ranks.size == 1 or not has_writer(),
        )
    except BaseException:
        if ranks.is_first:
            commit.abandon(staging)
        raise


def _begin_staging(job: SaveJob, staging: Path, room: SharedDirectory | None, policy: FailurePolicy) -> bool:
    """Make the staging directory; whether there is room for as much as was saved lately. For rank 0."""

    def begin() -> bool:
        # The directory may have been deleted since the start of the run, and its lock with it.
        if isinstance(job.tier, GlobalTier) and job.target.kind == job.tier.kind:
            job.tier.take_over()
            commit.make_ready(staging.parent, GLOBAL_SETTING)
        else:
            commit.make_ready(staging.parent)
        commit.make_staging(staging)
        return has_room_for_recent_size(room)

    with step(_STAGING, for_all=True):
        return with_retries(_STAGING, begin, policy, rank=0)


def _format(job: SaveJob, ranks: Ranks) -> Format:
    """The format of `checkpoint.ckpt_format`. Collective, the first time."""
    name: str = job.cfg.ckpt_format
    known = job.context.get(SAVE_FORMAT)
    if known is None or known[0] != name:
        known = job.context[SAVE_FORMAT] = name, ranks.run("finding the format", lambda: format_named(name))
        job.context.pop(SAVE_STRATEGY, None)  # a plan is of the format that made it
    found: Format = known[1]
    return found


def _first_planning(state: Any) -> SavePlanning:
    """For the first save of a start. Where it goes on from a checkpoint, that one's plan may serve again."""
    return SavePlanning(None if state.loaded_from is None else Path(state.loaded_from))


def writer_of(context: dict[str, Any]) -> BackgroundWriter:
    """This rank's background writer, made where the checkpointing context has none."""
    writer: BackgroundWriter = context.setdefault(BACKGROUND_WRITER, BackgroundWriter())
    return writer


def _plan_snapshots(job: SaveJob, tier: RankLocalTier, ranks: Ranks) -> SaveTask:
    contents = collect(job.live, job.prebuilt_state_dict, ranks)
    save = plan_rank_local_save(
        contents,
        job.target,
        tier.store,
        ranks,
        algo=job.cfg.non_persistent_local_ckpt_algo,
        group=job.live.groups.dp_cp,
        layout=_layout(job.live.groups, contents.state_dict),
        announce=job.announce,
        started=job.started,
        start=job.start,
        structure=job.context.get(SNAPSHOT_STRUCTURE),
    )
    job.context[SNAPSHOT_STRUCTURE] = save.structure
    require_snapshot_size(save, job.cfg, ranks)
    return save


def _layout(groups: Any, state_dict: dict[str, Any]) -> Layout:
    # Chunks are counted in what is saved, because a prebuilt state dict may outlive its model.
    return Layout.of(groups, sum(1 for key in state_dict if is_model_section(key)))
