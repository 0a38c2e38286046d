"""Looking at storage for a load: which checkpoint it is, whether it is whole, and what it says about itself.

All of this runs on rank 0 only. Nothing is cached: trackers and checkpoints change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.contents.dataloader import saved_data_parallel_size
from bridge.training.checkpointing.contents.legacy import (
    ARGS,
    content_metadata_of,
    counters_of,
    extract_megatron_lm_args,
)
from bridge.training.checkpointing.contents.rerun import RERUN
from bridge.training.checkpointing.contents.run_config import read_run_config, value_at
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.detection import get_checkpoint_format, read_metadata
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    NotACheckpointError,
)
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.integrity import Manifest, find_damage, read_manifest
from bridge.training.checkpointing.layout import (
    COMMON,
    LEGACY_TRACKER,
    MANIFEST,
    MCORE_METADATA,
    PAYLOAD_METADATA,
    RELEASE,
    RUN_CONFIG,
    TRACKER,
    TRAIN_STATE,
    Listing,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
    parse_iteration_name,
)
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.adapters import saved_adapters
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.plans.resharding import saved_form
from bridge.training.checkpointing.resolve import Source, Tracked, reject_step_of_iteration_directory, resolve
from bridge.training.checkpointing.safety.containment import require_contained

logger = logging.getLogger(__name__)

_SIZES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
    "data": "data_parallel_size",
}
"""Where a configuration's `model` section says the sizes of a Layout; the last only in that of Megatron-LM."""


def find_source(
    load_dir: Path,
    ckpt_step: int | None,
    own_paths: Iterable[Path] = (),
    setting: str = "checkpoint.load",
) -> Source | None:
    """The checkpoint to load from `load_dir`, or None if none was ever published there.

    Args:
        load_dir: a directory of checkpoints, or one checkpoint.
        ckpt_step: explicit iteration.
        own_paths: what this run itself writes; below `load_dir` it means nothing.
        setting: the setting that names `load_dir`, for messages.

    Raises:
        CheckpointError: as `resolve`, or a tracker is unreadable.
    """
    if load_dir.exists() and not load_dir.is_dir():
        raise NotACheckpointError(f"{setting}: {load_dir} is not a directory")
    if is_iteration_directory(load_dir):
        reject_step_of_iteration_directory(load_dir, ckpt_step)
        return Source(load_dir, load_dir.name == RELEASE, f"{setting} names this one checkpoint")
    listing = list_checkpoints(load_dir, own_paths)
    tracked = read_tracker(listing) if ckpt_step is None else None

    def is_whole(iteration: int) -> bool:
        try:
            require_whole(load_dir / iteration_name(iteration))
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
            return False
        return True

    return resolve(listing, tracked, ckpt_step, is_whole, setting)


def read_tracker(listing: Listing) -> Tracked | None:
    """What the tracker says: ours if there is one, else Megatron-LM's, else None.

    Raises:
        CheckpointDamagedError: the tracker is there but unreadable.
    """
    if listing.has_tracker:
        step = int(read_train_state(listing.path / TRACKER)["step"])
        return Tracked(step, False, TRACKER)
    if not listing.has_legacy_tracker:
        return None
    iteration, release = read_metadata(listing.path / LEGACY_TRACKER)
    return Tracked(iteration, release, LEGACY_TRACKER)


def require_whole(path: Path) -> Manifest | None:
    """Check that a checkpoint has all its files in their sizes, and nothing that leads out of it.

    Returns:
        Its manifest; None for a checkpoint that another program wrote.

    Raises:
        UnsafeCheckpointError: a link leads out of the checkpoint.
        CheckpointDamagedError: files are missing or of another size.
        CheckpointMismatchError: the format is not one that this version reads.
        NotACheckpointError: the directory is no checkpoint at all.
    """
    if path.is_dir():
        require_contained(path)
    manifest = read_manifest(path)
    if manifest is not None:
        # Small files are checked to the last bit; reading every shard twice would cost as much as the load.
        problems = find_damage(path, manifest.files)
        problems = problems or find_damage(path, (r for r in manifest.files if not _is_shard(r.name)), checksums=True)
        if problems:
            raise CheckpointDamagedError(f"{path} is damaged: {'; '.join(problems)}")
    else:
        _require_whole_without_manifest(path)
    backend = get_checkpoint_format(path)
    if backend != "torch_dist":
        raise CheckpointMismatchError(
            f"{path} is in the format {backend!r}, and this version reads 'torch_dist' (checkpoint.ckpt_format)"
        )
    return manifest


def describe(source: Source) -> Saved:
    """Check a checkpoint and read what it says about itself.

    Raises:
        CheckpointError: as `require_whole`, or a file in it is unreadable.
    """
    manifest = require_whole(source.path)
    common = torch_dist.read_common(source.path)
    config = _configuration(source.path, common)
    has_train_state = (source.path / TRAIN_STATE).exists()
    counters = read_train_state(source.path / TRAIN_STATE) if has_train_state else counters_of(common)
    if manifest is not None:
        _require_one_iteration(source.path, manifest.iteration, int(counters["step"]), common.get("iteration"))
        layout = Layout.from_sizes(manifest.parallel_sizes)
    else:
        sizes = {size: value_at(config, "model", key, None) for size, key in _SIZES.items()}
        sizes["expert_tensor"] = sizes["expert_tensor"] or sizes["tensor"]
        layout = Layout.from_sizes(sizes)
    return Saved(
        iteration=int(counters["step"]),
        release=source.release,
        layout=layout,
        layout_is_known=manifest is not None or config is not None,
        content_metadata=content_metadata_of(common),
        has_optimizer=bool(value_at(config, "checkpoint", "save_optim", "optimizer" in common)),
        has_rng=bool(value_at(config, "checkpoint", "save_rng", False)),
        has_train_state=has_train_state,
        counters={} if has_train_state else counters,
        has_rerun_state=bool(common.get(RERUN)),
        data_iterator_ranks=saved_data_parallel_size(source.path),
        data_parallel_random_init=bool(value_at(config, "rng", "data_parallel_random_init", False)),
        optimizer_form=saved_form(common.get("optimizer")),
        precision=value_at(config, "model", "precision", None),
        # Ours say so by a mark; only where another program wrote the checkpoint does its configuration decide.
        adapters=saved_adapters(content_metadata_of(common), config if manifest is None else None),
    )


def _configuration(path: Path, common: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration that the checkpoint was saved with, or what Megatron-LM's arguments tell of it."""
    config = read_run_config(path)
    if config is None and ARGS in common:
        return extract_megatron_lm_args(common)
    if config is None:
        logger.warning(
            "%s has neither %s nor Megatron-LM's arguments: the parallel sizes that it was saved with are unknown. "
            "Random states start afresh, and optimizer state that is bound to those sizes is taken to fit this run's; "
            "set checkpoint.load_optim: false to take only the model",
            path,
            RUN_CONFIG,
        )
    return config


def _require_whole_without_manifest(path: Path) -> None:
    if not path.is_dir():
        raise NotACheckpointError(f"{path} is not a directory")
    config = read_run_config(path)
    if config is not None and str(config.get("_target_", "")).startswith("bridge."):
        raise CheckpointDamagedError(f"{path} is damaged: {MANIFEST} is missing, the last file that a save writes")
    absent = [name for name in (MCORE_METADATA, PAYLOAD_METADATA, COMMON) if not (path / name).is_file()]
    if absent:
        found = sorted(entry.name for entry in path.iterdir())
        content = ", ".join(found[:10]) + (" …" if len(found) > 10 else "") if found else "nothing"
        problem = f"it has no {', '.join(absent)}; found in it: {content}"
        if any(name in found for name in (MCORE_METADATA, PAYLOAD_METADATA, COMMON, RUN_CONFIG, TRAIN_STATE)):
            raise CheckpointDamagedError(f"{path} is damaged: {problem}")
        raise NotACheckpointError(f"{path} is not a checkpoint: {problem}")


def _is_shard(name: str) -> bool:
    return name.endswith(".distcp")


def _require_one_iteration(path: Path, manifest: int, train_state: int, common: Any) -> None:
    """Refuse a checkpoint whose files, or whose name, belong to different iterations."""
    found = {
        "its directory's name": parse_iteration_name(path.name),
        MANIFEST: manifest,
        TRAIN_STATE: train_state,
        COMMON: common,
    }
    known = {name: iteration for name, iteration in found.items() if iteration is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} says {iteration}" for name, iteration in known.items())
        raise CheckpointDamagedError(f"{path} is mixed up: {listed}")
