"""Making ready where a run saves: the save directory, and the tier of its non-persistent checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.tiers import NonPersistentTier
from bridge.training.checkpointing.tiers.availability import RankLocalStore
from bridge.training.checkpointing.tiers.global_directory import SETTING, GlobalTier, directory_of
from bridge.training.checkpointing.tiers.rank_local import RankLocalTier
from bridge.training.checkpointing.tiers.session import session_of, take_over

logger = logging.getLogger(__name__)

TIER = "non_persistent_tier"
"""Key of the checkpointing context: the tier of this process's non-persistent checkpoints."""

LOCAL_MANAGER = "local_checkpoint_manager"
"""Key of the checkpointing context: the manager of local or in-memory checkpoints, of nvidia-resiliency-ext's kind."""


def prepare(
    checkpoint_config: Any, context: dict[str, Any], groups: Any, chunks: int, ranks: Ranks
) -> NonPersistentTier | None:
    """Make the save directory and the configured non-persistent tier ready, once for a context. Collective.

    Args:
        checkpoint_config: checkpoint configuration, with `save`.
        context: the checkpointing context.
        groups: process groups of this run.
        chunks: model chunks of this rank.
        ranks: all ranks.

    Returns:
        The tier of non-persistent checkpoints; None if none is configured.

    Raises:
        CheckpointSaveError: a directory cannot be made or written.
        DirectoryInUseError: another run saves there.
    """
    kind = checkpoint_config.non_persistent_ckpt_type
    session = prepare_directories(checkpoint_config, context, ranks)
    if kind is None:
        return None
    if TIER not in context:
        if kind == "global":
            context[TIER] = GlobalTier(directory_of(checkpoint_config))
        else:
            store = prepare_store(checkpoint_config, context, session, ranks)
            context[TIER] = RankLocalTier(store, kind, Layout.of(groups, chunks), groups.dp_cp)
    tier: NonPersistentTier = context[TIER]
    return tier


def prepare_directories(checkpoint_config: Any, context: dict[str, Any], ranks: Ranks) -> str:
    """Make ready the directories that rank 0 looks after; return the run's session. Collective; raises as `prepare`."""
    save_dir = Path(checkpoint_config.save).expanduser()
    kind = checkpoint_config.non_persistent_ckpt_type

    def make_ready() -> str:
        commit.recover_once(save_dir, context)
        session = session_of(save_dir) if kind is not None else ""
        if kind == "global":
            directory = directory_of(checkpoint_config)
            commit.recover_once(directory, context, SETTING)
            take_over(directory, session, SETTING)
        return session

    return ranks.first("preparing checkpoint.save", make_ready)


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
    """Free what the context's tier holds only while the run lasts. Collective; trouble is only logged."""
    context.pop(TIER, None)
    store = context.pop(LOCAL_MANAGER, None)
    if store is None:
        return
    try:
        ranks.run("releasing the memory of checkpoints", getattr(store, "release", lambda: None))
    except CheckpointError as error:
        logger.warning("the memory of in-memory checkpoints is freed later: %s", error)
