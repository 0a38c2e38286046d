"""The check of free space for one save: where it looks, and by which size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.disk import Estimate, SharedDirectory, require_local, state_bytes
from bridge.training.checkpointing.objects.places import directory_policies, save_directory
from bridge.training.checkpointing.retention.policies import MostRecent
from bridge.training.checkpointing.retention.sweeper import needed_again
from bridge.training.checkpointing.retention.trash import trash_of
from bridge.training.checkpointing.tiers.global_directory import SETTING
from bridge.training.checkpointing.tiers.rank_local import RankLocalSave
from bridge.training.checkpointing.transaction import SaveTarget


def room_for(target: SaveTarget, state: Any, context: dict[str, Any]) -> SharedDirectory | None:
    """The directory of a save that all ranks share; None if free space is not to be checked."""
    cfg = state.cfg.checkpoint
    if not cfg.check_free_space:
        return None
    if target.kind == "non_persistent_global":
        starts_in = save_directory(cfg)
        return SharedDirectory(target.save_dir, SETTING, (MostRecent(1),), trash_of(context), starts_in=starts_in)
    in_use = needed_again(cfg, state.loaded_from, state.base_checkpoint)
    return SharedDirectory(target.save_dir, "checkpoint.save", directory_policies(cfg), trash_of(context), in_use)


def has_room_for_recent_size(room: SharedDirectory | None) -> bool:
    """Whether there is room for a checkpoint as large as the newest one there, or none is required. Rank 0 only.

    If not, the state itself is to be measured: it may have become smaller.
    """
    if room is None:
        return True
    size = room.recent_size()
    return size is not None and room.has(size)


def require_state_size(
    room: SharedDirectory | None, state_dict: Callable[[], dict[str, Any]], iteration: int, ranks: Ranks
) -> None:
    """Require room for the bytes of a sharded state dict, all ranks' together. Collective.

    Args:
        room: where; None: nothing is required.
        state_dict: returns that of this rank; local.
        iteration: of the save.
        ranks: all ranks.

    Raises:
        NotEnoughSpaceError: there is too little. Every rank raises.
    """
    if room is None:
        return
    own = ranks.collect("measuring the state", lambda: state_bytes(state_dict(), ranks))
    size = Estimate(sum(own), "the bytes of the state")
    ranks.first("checking the free space", lambda: room.require(size, iteration))


def require_snapshot_size(save: RankLocalSave, checkpoint_config: Any, ranks: Ranks) -> None:
    """Require room for what every rank writes of a local save on its own node. Collective.

    Raises:
        NotEnoughSpaceError: there is too little on some node. Every rank raises.
    """
    if save.target.kind != "local" or not checkpoint_config.check_free_space:
        return
    needed = sum(tensor.nbytes for state in save.states.values() for tensor in state.tensors)
    setting = "checkpoint.non_persistent_local_ckpt_dir"
    require_local(save.target.save_dir, needed, save.target.iteration, setting, ranks)
