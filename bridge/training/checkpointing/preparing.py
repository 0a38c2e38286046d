"""Making ready where a run saves: the save directory, and the tier of its non-persistent checkpoints."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from bridge.training.checkpointing import commit, recovery
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaveError,
    RankLostError,
)
from bridge.training.checkpointing.events.recording import Pace
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.io.background_writer import BACKGROUND_WRITER
from bridge.training.checkpointing.objects.places import save_directory, upload_url
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.retention.trash import trash_of
from bridge.training.checkpointing.starts import STARTS, Starts, read_starts, starts_to_go_on, write_starts
from bridge.training.checkpointing.tiers import NonPersistentTier
from bridge.training.checkpointing.tiers.availability import RankLocalStore
from bridge.training.checkpointing.tiers.global_directory import SETTING, GlobalTier
from bridge.training.checkpointing.tiers.rank_local import RankLocalTier
from bridge.training.checkpointing.tiers.session import SESSION, session_of

logger = logging.getLogger(__name__)

PREPARATION = "preparation"
"""Key of the checkpointing context: what has been made ready for this process's saves and loads."""

LOCAL_MANAGER = "local_checkpoint_manager"
"""Key of the checkpointing context: the manager of local or in-memory checkpoints, of nvidia-resiliency-ext's kind."""


@dataclass
class Preparation:
    """What is ready for a run's saves and loads, from the first of them to the end of the process."""

    place: tuple[Any, ...]
    """The settings that it was made for."""
    session: str
    """Of the save directory; empty if it never had non-persistent checkpoints."""
    starts: Starts
    """The starts of the run, this one included if it was counted for this preparation."""
    tier: NonPersistentTier | None = None
    """Of non-persistent checkpoints."""
    is_behind: bool = False
    """Whether the tier may hold what the run has left behind by going on from where this start did."""
    newest: dict[bool, int] = field(default_factory=dict)
    """Iteration of the newest checkpoint that this start has published, persistent (True) or in another tier."""
    pace: Pace = field(default_factory=Pace)
    """When training last went on."""


def prepare(checkpoint_config: Any, context: dict[str, Any], groups: Any, chunks: int, ranks: Ranks) -> Preparation:
    """Make the save directory and the configured non-persistent tier ready, once for a context. Collective.

    Args:
        checkpoint_config: checkpoint configuration, with `save`.
        context: the checkpointing context.
        groups: process groups of this run.
        chunks: model chunks of this rank.
        ranks: all ranks.

    Raises:
        CheckpointSaveError: a directory cannot be made or written.
        DirectoryInUseError: another run saves there.
    """
    cfg = checkpoint_config
    kind = cfg.non_persistent_ckpt_type
    place = (cfg.save, kind, cfg.non_persistent_global_ckpt_dir, cfg.non_persistent_local_ckpt_dir)
    known: Preparation | None = context.get(PREPARATION)
    if known is not None and known.place == place:
        return known
    session, starts = prepare_directories(cfg, context, ranks)
    if upload_url(cfg) is not None:
        # Imported where it is needed: most runs can do without object storage.
        from bridge.training.checkpointing.objects.beginning import begin_uploads

        ranks.first("preparing the uploads", lambda: begin_uploads(cfg, context))
    tier: NonPersistentTier | None = None
    if kind == "global":
        tier = GlobalTier.of(cfg, session, trash_of(context))
    elif kind is not None:
        store = prepare_store(cfg, context, session, ranks)
        tier = RankLocalTier(store, kind, Layout.of(groups, chunks), groups.dp_cp)
    context[PREPARATION] = Preparation(place, session, starts, tier)
    return context[PREPARATION]  # type: ignore[no-any-return]


def prepare_directories(checkpoint_config: Any, context: dict[str, Any], ranks: Ranks) -> tuple[str, Starts]:
    """Make ready the directories that rank 0 looks after. Collective; raises as `prepare`.

    Returns:
        The run's session, and its earlier starts.
    """
    save_dir = save_directory(checkpoint_config)
    kind = checkpoint_config.non_persistent_ckpt_type

    def make_ready() -> tuple[str, Starts]:
        recovery.recover_once(save_dir, context)
        session = session_of(save_dir) if kind is not None or (save_dir / SESSION).is_file() else ""
        if kind == "global":
            tier = GlobalTier.of(checkpoint_config, session, trash_of(context))
            tier.take_over()
            recovery.recover_once(tier.directory, context, SETTING)
        try:
            return session, starts_to_go_on(save_dir)
        except OSError as error:
            raise CheckpointSaveError(
                f"checkpoint.save: {save_dir} cannot be made ready, because what it knows of the run's starts cannot "
                f"be read: {error}; make {save_dir / STARTS} readable, or move it away if it is no file"
            ) from error

    return ranks.first("preparing checkpoint.save", make_ready)


def begin_to_save(preparation: Preparation, state: Any, iteration: int, *, persistent: bool, ranks: Ranks) -> int:
    """Before the first save of a start: count it, and delete what the run has left behind. Collective.

    A start lasts from a load to the next one in the same process, whatever is prepared anew in between.

    Args:
        preparation: for this save.
        state: GlobalState: where the run has gone on from, and the starts that were counted since.
        iteration: of this save.
        persistent: whether it is a persistent one, which trouble with other tiers does not stop.
        ranks: all ranks.

    Returns:
        The number of the start.

    Raises:
        CheckpointError: the save directory cannot be written; or the save is not persistent, and its tier is in
            trouble. Every rank raises, and the next save tries again.
    """
    place = str(save_directory(state.cfg.checkpoint))
    # A caller that has loaded nothing goes on from its first save, as far as anybody can tell.
    resumed = iteration if state.resumed_at is None else state.resumed_at
    if place not in state.counted_starts:
        preparation.starts = _count(preparation.starts, state, place, resumed, ranks)
        preparation.is_behind = True
        state.counted_starts[place] = preparation.starts.entries[-1].number
    if preparation.is_behind:
        preparation.is_behind = not _forget_newer(preparation.tier, resumed, persistent, ranks)
    return int(state.counted_starts[place])


def _count(known: Starts, state: Any, place: str, resumed: int, ranks: Ranks) -> Starts:
    """Note in the save directory that another start saves, and where it has gone on from. Collective."""
    save_dir, phase = save_directory(state.cfg.checkpoint), "remembering the start"

    def remember() -> Starts:
        commit.make_ready(save_dir)  # it may have been deleted since it was made ready
        try:
            # Another preparation of this process may have counted meanwhile.
            starts = max(known, read_starts(save_dir), key=lambda found: found.next)
        except CheckpointDamagedError:
            starts = known
        origin, source = state.resumed_start
        source = source if origin == place else 0
        starts = starts.followed_by(max(starts.next, source + 1), resumed, source)
        write_starts(save_dir, starts)
        return starts

    policy = FailurePolicy.of(state.cfg.checkpoint)
    return ranks.first(phase, lambda: with_retries(phase, remember, policy, rank=0))


def _forget_newer(tier: NonPersistentTier | None, resumed: int, persistent: bool, ranks: Ranks) -> bool:
    """Delete what the tier has of later iterations, and say whether that is done. Collective."""
    try:
        if tier is not None:
            tier.forget_newer(resumed, ranks)
    except RankLostError:
        raise
    except CheckpointError as error:
        if not persistent:
            raise
        if ranks.is_first:
            logger.warning(
                "non-persistent checkpoints that the run has left behind stay until its next save: %s", error
            )
        return False
    return True


def prepare_store(checkpoint_config: Any, context: dict[str, Any], session: str, ranks: Ranks) -> RankLocalStore:
    """The context's store of local or in-memory snapshots, made where it has none. Collective."""
    if LOCAL_MANAGER not in context:
        context[LOCAL_MANAGER] = ranks.run(
            "preparing the store of snapshots", lambda: _make_store(checkpoint_config, session)
        )
    store: RankLocalStore = context[LOCAL_MANAGER]
    return store


def _make_store(checkpoint_config: Any, session: str) -> RankLocalStore:
    # Imported where they are needed: they need nvidia-resiliency-ext, which other runs can do without.
    if checkpoint_config.non_persistent_ckpt_type == "local":
        from bridge.training.checkpointing.tiers.local import make_local_manager

        return make_local_manager(checkpoint_config, session)
    from bridge.training.checkpointing.tiers.memory.in_memory import make_in_memory_manager

    return make_in_memory_manager(checkpoint_config, session)


def release(context: dict[str, Any], ranks: Ranks) -> None:
    """Free what the context's tier holds only while the run lasts. Collective; trouble is only logged.

    In-memory checkpoints that are newer than every persistent one are left to their keepers, for a restart.
    """
    writer = context.pop(BACKGROUND_WRITER, None)
    if writer is not None:
        writer.close()
    preparation: Preparation | None = context.pop(PREPARATION, None)
    store = context.pop(LOCAL_MANAGER, None)
    newest = {} if preparation is None else preparation.newest
    is_needed = newest.get(False, -1) > newest.get(True, -1)
    if is_needed and ranks.is_first and hasattr(store, "close"):
        logger.warning(
            "leaving the in-memory checkpoint of iteration %d to its keepers: no persistent one is as new",
            newest[False],
        )
    method = getattr(store, "close" if is_needed else "release", None)
    if method is None:
        return
    try:
        ranks.run("releasing the memory of checkpoints", method)
    except CheckpointError as error:
        logger.warning("the memory of in-memory checkpoints is freed later: %s", error)
