"""Looking at storage for a load: which checkpoint it is, whether it is whole, and what it says about itself.

All of this runs on rank 0 only. Nothing is cached: trackers and checkpoints change.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.contents.dataloader import saved_data_parallel_size
from bridge.training.checkpointing.contents.run_config import read_run_config, value_at
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    NotACheckpointError,
)
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
)
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plan import Saved
from bridge.training.checkpointing.resolve import Source, Tracked, reject_step_of_iteration_directory, resolve

logger = logging.getLogger(__name__)


def find_source(load_dir: Path, ckpt_step: int | None, own_files: Iterable[Path] = ()) -> Source | None:
    """The checkpoint to load from `load_dir`, or None if none was ever published there.

    Args:
        load_dir: a directory of checkpoints, or one checkpoint.
        ckpt_step: explicit iteration.
        own_files: files of this run that may lie in `load_dir` and mean nothing.

    Raises:
        CheckpointError: as `resolve`, or a tracker is unreadable.
    """
    if load_dir.exists() and not load_dir.is_dir():
        raise NotACheckpointError(f"checkpoint.load: {load_dir} is not a directory")
    if is_iteration_directory(load_dir):
        reject_step_of_iteration_directory(load_dir, ckpt_step)
        return Source(load_dir, load_dir.name == RELEASE, "checkpoint.load names this one checkpoint")
    listing = list_checkpoints(load_dir, own_files)
    tracked = read_tracker(listing) if ckpt_step is None else None

    def is_whole(iteration: int) -> bool:
        try:
            require_whole(load_dir / iteration_name(iteration))
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
            return False
        return True

    return resolve(listing, tracked, ckpt_step, is_whole)


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
    path = listing.path / LEGACY_TRACKER
    try:
        text = path.read_text(encoding="ascii").strip()
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointDamagedError(f"{path} is not a readable tracker: {error}") from error
    if text == RELEASE:
        return Tracked(0, True, LEGACY_TRACKER)
    if not text.isdecimal():
        raise CheckpointDamagedError(
            f"{path} holds {text[:40]!r} where an iteration or 'release' belongs; "
            "set checkpoint.ckpt_step to the iteration to load"
        )
    return Tracked(int(text), False, LEGACY_TRACKER)


def require_whole(path: Path) -> Manifest | None:
    """Check that a checkpoint has all its files in their sizes.

    Returns:
        Its manifest; None for a checkpoint that another program wrote.

    Raises:
        CheckpointDamagedError: files are missing or of another size.
        CheckpointMismatchError: the format is not one that this version reads.
        NotACheckpointError: the directory is no checkpoint at all.
    """
    manifest = read_manifest(path)
    if manifest is not None:
        problems = find_damage(path, manifest.files)
        if problems:
            raise CheckpointDamagedError(f"{path} is damaged: {'; '.join(problems)}")
    else:
        _require_whole_without_manifest(path)
    backend = _backend(path)
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
    config = read_run_config(source.path)
    common = _read_common(source.path)
    has_train_state = (source.path / TRAIN_STATE).exists()
    iteration = read_train_state(source.path / TRAIN_STATE)["step"] if has_train_state else common.get("iteration", 0)
    if manifest is not None:
        layout = Layout.from_sizes(manifest.parallel_sizes)
    else:
        names = {
            "tensor": "tensor_model_parallel_size",
            "pipeline": "pipeline_model_parallel_size",
            "context": "context_parallel_size",
            "expert": "expert_model_parallel_size",
        }
        layout = Layout.from_sizes({size: value_at(config, "model", key, 1) for size, key in names.items()})
    return Saved(
        iteration=int(iteration),
        release=source.release,
        layout=layout,
        layout_is_known=manifest is not None or config is not None,
        content_metadata=common.get("content_metadata"),
        has_optimizer=bool(value_at(config, "checkpoint", "save_optim", "optimizer" in common)),
        has_rng=bool(value_at(config, "checkpoint", "save_rng", False)),
        has_train_state=has_train_state,
        data_iterator_ranks=saved_data_parallel_size(source.path),
    )


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


def _backend(path: Path) -> str:
    file = path / MCORE_METADATA
    try:
        content = json.loads(file.read_text())
        return str(content["sharded_backend"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointDamagedError(f"{file} does not say which format the checkpoint is in: {error}") from error


def _read_common(path: Path) -> dict[str, Any]:
    file = path / COMMON
    try:
        common = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointDamagedError(f"{file} is not readable: {type(error).__name__}: {error}") from error
    if not isinstance(common, dict):
        raise CheckpointDamagedError(f"{file} holds a {type(common).__name__} where a dictionary belongs")
    return common
