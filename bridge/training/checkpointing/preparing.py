"""Making ready where a run saves: the save directory, and the tier of its non-persistent checkpoints."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointError, RankLostError
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.retention.trash import trash_of
from bridge.training.checkpointing.starts import Starts, read_starts, write_starts
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
    """Earlier starts of the run."""
    tier: NonPersistentTier | None = None
    """Of non-persistent checkpoints."""
    has_saved: bool = False
    """Whether the save directory knows that this start has saved something."""
    newest: dict[bool, int] = field(default_factory=dict)
    """Iteration of the newest checkpoint that this start has published, persistent (True) or in another tier."""

    @property
    def start(self) -> int:
        """Number of this start."""
        return self.starts.next


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
    save_dir = Path(checkpoint_config.save).expanduser()
    kind = checkpoint_config.non_persistent_ckpt_type

    def make_ready() -> tuple[str, Starts]:
        commit.recover_once(save_dir, context)
        session = session_of(save_dir) if kind is not None or (save_dir / SESSION).is_file() else ""
        if kind == "global":
            tier = GlobalTier.of(checkpoint_config, session, trash_of(context))
            tier.take_over()
            commit.recover_once(tier.directory, context, SETTING)
        return session, read_starts(save_dir)

    return ranks.first("preparing checkpoint.save", make_ready)


def begin_to_save(
    preparation: Preparation, checkpoint_config: Any, resumed: int, *, persistent: bool, ranks: Ranks
) -> None:
    """Before the first save of a start: remember the start, and delete what the run has left behind. Collective.

    Args:
        preparation: of this start.
        checkpoint_config: checkpoint configuration, with `save`.
        resumed: the iteration that the run has gone on from.
        persistent: whether the save is a persistent one, which trouble with other tiers does not stop.
        ranks: all ranks.

    Raises:
        CheckpointError: the save directory cannot be written; or the save is not persistent, and its tier is in
            trouble. Every rank raises, and the next save tries again.
    """
    if preparation.has_saved or not preparation.session:
        return
    save_dir, policy = Path(checkpoint_config.save).expanduser(), FailurePolicy.of(checkpoint_config)
    starts, phase = preparation.starts.followed_by(preparation.start, resumed), "remembering the start"

    def remember() -> None:
        commit.make_ready(save_dir)  # it may have been deleted since the start
        write_starts(save_dir, starts)

    ranks.first(phase, lambda: with_retries(phase, remember, policy, rank=0))
    try:
        if preparation.tier is not None:
            preparation.tier.forget_newer(resumed, ranks)
    except RankLostError:
        raise
    except CheckpointError as error:
        if not persistent:
            raise
        if ranks.is_first:
            logger.warning(
                "non-persistent checkpoints that the run has left behind stay until its next save: %s", error
            )
        return
    preparation.has_saved = True


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
