"""The documented functions that load a checkpoint step by step, for programs that own their loading.

`load_checkpoint` does not use them: it decides once, on rank 0, and agrees on the result. They keep the
documented signatures and return values, and are made of the same pieces.
"""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.extra_state import delete_extra_state
from bridge.training.checkpointing.contents.model import generate_model_state_dict, load_model_state_dict
from bridge.training.checkpointing.detection import format_of, format_on_all_ranks
from bridge.training.checkpointing.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.formats.read_choice import sharing_group
from bridge.training.checkpointing.formats.registry import format_named
from bridge.training.checkpointing.integrity import Level
from bridge.training.checkpointing.layout import (
    RELEASE,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
)
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.preparing import LOCAL_MANAGER, prepare_directories, prepare_store
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.source import examine, find_source, require_whole
from bridge.training.checkpointing.tiers.availability import complete_iterations
from bridge.training.checkpointing.tiers.rank_local import RankLocalTier
from bridge.training.checkpointing.trackers import read_tracker
from bridge.training.checkpointing.verification import verify

DIRECT_ITERATION_DIRECTORY = -2
"""Stands for the iteration where the path given is itself one checkpoint."""
NOTHING_FOUND = -1


class CheckpointType(Enum):
    """Types of checkpoints to save."""

    LOCAL = auto()
    GLOBAL = auto()
    FSDP_DTENSOR = auto()


BaseCheckpoint = tuple[dict[str, Any] | None, str, bool, CheckpointType | None]
"""(state dict, path, whether it is a release checkpoint, type)."""


def resolve_checkpoint_iteration(load_dir: str | None, ckpt_step_override: int | None) -> tuple[int, bool]:
    """Which iteration to load. Looks at storage on the rank that calls it.

    Args:
        load_dir: directory of checkpoints, or one checkpoint; None for nothing.
        ckpt_step_override: explicit iteration.

    Returns:
        (iteration, release). The iteration is `DIRECT_ITERATION_DIRECTORY` if `load_dir` is itself one checkpoint,
        and -1 if there is none.

    Raises:
        CheckpointNotFoundError: the explicit iteration does not exist (a FileNotFoundError).
        CheckpointError: the directory or its tracker is damaged or foreign.
    """
    if load_dir is None:
        return NOTHING_FOUND, False
    path = Path(load_dir)
    source = find_source(path, ckpt_step_override, setting="load_dir")
    if source is None:
        return NOTHING_FOUND, False
    if source.path == path:
        return DIRECT_ITERATION_DIRECTORY, False
    return (0, True) if source.release else (int(source.path.name.rsplit("_", 1)[1]), False)


def get_non_persistent_iteration(
    non_persistent_global_dir: str,
    non_persistent_ckpt_type: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
) -> int:
    """The newest iteration among the non-persistent checkpoints, or -1.

    Args:
        non_persistent_global_dir: their directory, for the type `global`.
        non_persistent_ckpt_type: `global`, `local`, `in_memory` or None.
        checkpointing_context: holds the `local_checkpoint_manager`, for the types `local` and `in_memory`.

    Raises:
        CheckpointMismatchError: the type is another one, or the context has no manager.
    """
    if non_persistent_ckpt_type is None:
        return NOTHING_FOUND
    if non_persistent_ckpt_type == "global":
        tracked = read_tracker(list_checkpoints(Path(non_persistent_global_dir)))
        return NOTHING_FOUND if tracked is None else tracked.iteration
    if non_persistent_ckpt_type in ("local", "in_memory"):
        store = _store_of(non_persistent_ckpt_type, checkpointing_context)
        return max(complete_iterations(store, Ranks.current()), default=NOTHING_FOUND)
    raise CheckpointMismatchError(
        f"checkpoint.non_persistent_ckpt_type: {non_persistent_ckpt_type!r} is none of 'global', 'local', 'in_memory'"
    )


def load_global_dist_base_checkpoint(
    load_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int | None,
    release: bool,
    checkpoint_path_override: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    is_megatron_mimo: bool = False,
    *,
    pg_collection: Any,
) -> BaseCheckpoint:
    """Load the state dict of one checkpoint in a directory of checkpoints.

    Args:
        load_dir: directory of checkpoints.
        ckpt_cfg: checkpoint configuration: strictness and `fully_parallel_load`.
        rank0: read only the common part, on the rank that calls it. Otherwise collective.
        sharded_state_dict: what to load; needed unless `rank0`.
        iteration: which iteration; without meaning with `release` or an override.
        release: load the release checkpoint.
        checkpoint_path_override: the checkpoint's own directory.
        checkpointing_context: accepted for compatibility.
        is_megatron_mimo: accepted for compatibility.
        pg_collection: process groups, with `dp_cp`.

    Returns:
        (state dict, path, release, CheckpointType.GLOBAL).

    Raises:
        CheckpointError: the checkpoint is absent, damaged, or does not fit.
    """
    del checkpointing_context, is_megatron_mimo
    allow(getattr(ckpt_cfg, "safe_globals", None))
    format_named(getattr(ckpt_cfg, "ckpt_format", "torch_dist"))  # registers a user's own strategies
    if checkpoint_path_override is not None:
        path = Path(checkpoint_path_override)
    else:
        path = Path(load_dir) / (RELEASE if release else iteration_name(iteration or 0))
    if not path.is_dir():
        raise CheckpointNotFoundError(f"there is no checkpoint {path}")
    if rank0:
        require_whole(path)
        return format_of(path).read_common(path), str(path), release, CheckpointType.GLOBAL
    if sharded_state_dict is None:
        raise CheckpointMismatchError("loading the sharded part needs sharded_state_dict, a template of what to load")
    ranks = Ranks.current()
    level: Level = getattr(ckpt_cfg, "integrity", "sizes")
    verify(path, ranks.first("examining the checkpoint", lambda: examine(path, level)[1]), ranks)
    options = LoadOptions(
        strictness=ckpt_cfg.dist_ckpt_strictness,
        parallelization_group=sharing_group(ckpt_cfg.fully_parallel_load, pg_collection.dp_cp),
        io_backend=getattr(ckpt_cfg, "io_backend", "direct"),
    )
    loaded = format_on_all_ranks(path, ranks).load(sharded_state_dict, path, ranks, options)
    return loaded.state_dict, str(path), release, CheckpointType.GLOBAL


def load_base_checkpoint(
    load_dir: str | None,
    ckpt_cfg: Any,
    rank0: bool = False,
    sharded_state_dict: dict[str, Any] | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    ignore_ckpt_step: bool = False,
    cfg: Any | None = None,
    is_megatron_mimo: bool = False,
    *,
    pg_collection: Any,
) -> BaseCheckpoint:
    """Find a checkpoint and load its state dict.

    Args:
        load_dir: directory of checkpoints, or one checkpoint.
        ckpt_cfg: checkpoint configuration.
        rank0: read only the common part, on the rank that calls it. Otherwise collective.
        sharded_state_dict: what to load; needed unless `rank0`.
        checkpointing_context: kept between saves and loads.
        ignore_ckpt_step: take the latest checkpoint whatever `ckpt_step` says.
        cfg: accepted for compatibility.
        is_megatron_mimo: accepted for compatibility.
        pg_collection: process groups.

    Returns:
        (state dict, path, release, type); (None, "", False, None) if there is no checkpoint.

    Raises:
        CheckpointNotFoundError: there is none and `exit_on_missing_checkpoint` is set, or `ckpt_step` is absent.
        CheckpointError: it is damaged, foreign, or does not fit.
    """
    del cfg

    def resolve() -> tuple[int, bool]:
        return resolve_checkpoint_iteration(load_dir, None if ignore_ckpt_step else ckpt_cfg.ckpt_step)

    iteration, release = resolve() if rank0 else Ranks.current().first("looking for a checkpoint", resolve)
    if load_dir is None or iteration == NOTHING_FOUND:
        if ckpt_cfg.exit_on_missing_checkpoint:
            raise CheckpointNotFoundError(
                f"there is no checkpoint in {load_dir}, and checkpoint.exit_on_missing_checkpoint is set"
            )
        return None, "", False, None
    return load_global_dist_base_checkpoint(
        load_dir,
        ckpt_cfg,
        rank0,
        sharded_state_dict,
        iteration,
        release,
        load_dir if iteration == DIRECT_ITERATION_DIRECTORY else None,
        checkpointing_context,
        is_megatron_mimo,
        pg_collection=pg_collection,
    )


def load_non_persistent_base_checkpoint(
    non_persistent_global_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    non_persistent_iteration: int,
    checkpointing_context: dict[str, Any] | None = None,
    *,
    pg_collection: Any,
) -> BaseCheckpoint:
    """Load the state dict of a non-persistent checkpoint.

    Args:
        non_persistent_global_dir: directory of the global ones.
        ckpt_cfg: checkpoint configuration; `non_persistent_ckpt_type` says which kind.
        rank0: read only the common part; with `global` on the rank that calls it. Otherwise collective.
        sharded_state_dict: what to load; needed unless `rank0`.
        non_persistent_iteration: which iteration.
        checkpointing_context: kept between saves and loads.
        pg_collection: process groups.

    Raises:
        CheckpointMismatchError: the kind is not one that this version loads.
        CheckpointError: as `load_global_dist_base_checkpoint`.
    """
    if ckpt_cfg.non_persistent_ckpt_type in ("local", "in_memory"):
        return _load_snapshot(
            ckpt_cfg, rank0, sharded_state_dict, non_persistent_iteration, checkpointing_context, pg_collection
        )
    if ckpt_cfg.non_persistent_ckpt_type != "global":
        raise CheckpointMismatchError(
            f"checkpoint.non_persistent_ckpt_type: {ckpt_cfg.non_persistent_ckpt_type!r} cannot be loaded; "
            "set it to 'global', 'local' or 'in_memory'"
        )
    return load_global_dist_base_checkpoint(
        non_persistent_global_dir,
        ckpt_cfg,
        rank0,
        sharded_state_dict,
        non_persistent_iteration,
        False,
        checkpointing_context=checkpointing_context,
        pg_collection=pg_collection,
    )


def _load_snapshot(
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int,
    context: dict[str, Any] | None,
    groups: Any,
) -> BaseCheckpoint:
    ranks = Ranks.current()
    store = _store_of(ckpt_cfg.non_persistent_ckpt_type, context)
    tier = RankLocalTier(store, ckpt_cfg.non_persistent_ckpt_type, group=groups.dp_cp)
    stored = tier.open(Source(store.snapshot_path(iteration), False, "it was asked for", tier.kind), ranks)
    place = str(stored.source.path)
    if rank0:
        return stored.common(), place, False, CheckpointType.LOCAL
    if sharded_state_dict is None:
        raise CheckpointMismatchError("loading the sharded part needs sharded_state_dict, a template of what to load")
    options = LoadOptions(ckpt_cfg.dist_ckpt_strictness, groups.dp_cp)
    loaded = stored.load(sharded_state_dict, ranks, options)
    return loaded.state_dict, place, False, CheckpointType.LOCAL


def _store_of(kind: str, context: dict[str, Any] | None) -> Any:
    store = (context or {}).get(LOCAL_MANAGER)
    if store is None:
        raise CheckpointMismatchError(
            f"checkpoint.non_persistent_ckpt_type is {kind!r} and the checkpointing context has no "
            f"{LOCAL_MANAGER}; make the context with init_checkpointing_context"
        )
    return store


def load_model_weights_from_checkpoint(
    checkpoint_path: str,
    model: list[Any],
    fully_parallel_load: bool = False,
    return_state_dict: bool = False,
    dist_ckpt_strictness: str = "assume_ok_unexpected",
    strict: bool = True,
) -> dict[str, Any] | tuple[dict[str, Any], set[str], set[str]] | None:
    """Load a model's weights, for inference or evaluation, from a checkpoint of ours or of Megatron-LM. Collective.

    Args:
        checkpoint_path: one checkpoint.
        model: model chunks of this rank, loaded in place.
        fully_parallel_load: data-parallel ranks share the reading and exchange what they read.
        return_state_dict: return the state dict and leave the model alone.
        dist_ckpt_strictness: what happens when keys differ.
        strict: as in `torch.nn.Module.load_state_dict`.

    Returns:
        None; or with `return_state_dict` the model sections without extra states; with a `return_*` strictness
        also the keys that only the checkpoint has and those that it lacks.

    Raises:
        CheckpointError: the checkpoint is absent, damaged, or does not fit.
    """
    path = Path(checkpoint_path)
    ranks = Ranks.current()

    def examine() -> dict[str, Any] | None:
        if not is_iteration_directory(path):
            raise CheckpointNotFoundError(f"checkpoint_path: {path} is not a checkpoint; name an iter_N directory")
        require_whole(path)
        content: dict[str, Any] | None = format_of(path).read_common(path).get("content_metadata")
        return content

    content = ranks.first("examining the checkpoint", examine)
    groups = default_pg_collection()
    metadata = {**(content or {}), "dp_cp_group": groups.dp_cp}
    template = ranks.run(
        "preparing the state to load", lambda: generate_model_state_dict(model, {"metadata": metadata})
    )
    options = LoadOptions(dist_ckpt_strictness, sharing_group(fully_parallel_load, groups.dp_cp))
    loaded = format_on_all_ranks(path, ranks).load(template, path, ranks, options)
    sections = delete_extra_state({name: loaded.state_dict[name] for name in template if name in loaded.state_dict})
    if return_state_dict:
        if loaded.unexpected is None:
            return sections  # type: ignore[no-any-return]
        return sections, set(loaded.missing or ()), set(loaded.unexpected)
    with torch.no_grad():
        ranks.run("applying the weights", lambda: load_model_state_dict(model, sections, strict and not loaded.dropped))
    return None


def init_checkpointing_context(checkpoint_config: Any) -> dict[str, Any]:
    """The context that saves and loads of one process share. Collective.

    Args:
        checkpoint_config: checkpoint configuration.

    Returns:
        A dictionary: empty, or with the `local_checkpoint_manager` of nvidia-resiliency-ext's kind where local or
        in-memory checkpoints are configured.

    Raises:
        CheckpointError: nvidia-resiliency-ext is missing, or the directories cannot be used (a RuntimeError).
    """
    context: dict[str, Any] = {}
    if checkpoint_config.non_persistent_ckpt_type in ("local", "in_memory"):
        checkpoint_config.check()
        ranks = Ranks.current()
        session, _ = prepare_directories(checkpoint_config, context, ranks)
        prepare_store(checkpoint_config, context, session, ranks)
    return context
