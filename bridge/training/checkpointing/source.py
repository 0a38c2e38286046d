"""Looking at storage for a load: which checkpoint it is, whether it is whole, and what it says about itself.

All of this runs on rank 0 only. Nothing is cached: trackers and checkpoints change.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
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
from bridge.training.checkpointing.detection import format_of, found_in
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    NotACheckpointError,
)
from bridge.training.checkpointing.integrity import Level, Manifest, find_damage, read_manifest
from bridge.training.checkpointing.layout import (
    COMMON,
    MANIFEST,
    RELEASE,
    RUN_CONFIG,
    TRAIN_STATE,
    Listing,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
    parse_iteration_name,
)
from bridge.training.checkpointing.marks import is_marked, problem_of
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.adapters import saved_adapters
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.plans.resharding import saved_form
from bridge.training.checkpointing.resolve import (
    Offer,
    Older,
    Source,
    reject_step_of_iteration_directory,
    resolve,
    stand_ins,
)
from bridge.training.checkpointing.safety.containment import require_contained
from bridge.training.checkpointing.starts import Starts, starts_or_none
from bridge.training.checkpointing.trackers import read_tracker, sound_tracker
from bridge.training.checkpointing.verification import Unverified, require_undamaged

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
    *,
    check_trackers: bool = False,
    fallback: bool = False,
    unmarked: Collection[str] = (),
) -> Source | None:
    """The checkpoint to load from `load_dir`, or None if none was ever published there.

    Args:
        load_dir: a directory of checkpoints, or one checkpoint.
        ckpt_step: explicit iteration.
        own_paths: what this run itself writes; below `load_dir` it means nothing.
        setting: the setting that names `load_dir`, for messages.
        check_trackers: hold the trackers against each other and against the checkpoint that they name.
        fallback: where a tracker is damaged, or what it names is gone, go by what is left.
        unmarked: names of checkpoints whose mark of damage does not count, because it is about to be taken off.

    Raises:
        CheckpointError: as `resolve`, or a tracker is unreadable.
    """
    if load_dir.exists() and not load_dir.is_dir():
        raise NotACheckpointError(f"{setting}: {load_dir} is not a directory")
    if is_iteration_directory(load_dir):
        reject_step_of_iteration_directory(load_dir, ckpt_step)
        return Source(load_dir, load_dir.name == RELEASE, f"{setting} names this one checkpoint")
    listing = list_checkpoints(load_dir, own_paths)
    tracked, problem = None, ""
    if ckpt_step is None:
        tracked, problem = sound_tracker(listing, fallback=fallback) if check_trackers else (read_tracker(listing), "")

    def is_whole(iteration: int) -> bool:
        path = load_dir / iteration_name(iteration)
        try:
            if path.name not in unmarked and is_marked(path):
                raise CheckpointDamagedError(f"{path} is marked as damaged: {problem_of(path)}")
            require_whole(path)
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
            return False
        return True

    try:
        source = resolve(listing, tracked, ckpt_step, is_whole, setting, lambda: left_behind_in(listing))
    except CheckpointDamagedError as error:
        older = older_sources(listing, tracked.iteration) if fallback and tracked is not None else []
        if not older:
            raise
        logger.error("GOING BACK to %s: %s", older[0].path, error)
        return older[0]
    if source is None and problem:
        raise CheckpointDamagedError(f"{problem}; and there is no checkpoint in {load_dir}")
    return source


def older_sources(listing: Listing, below: int, offers: Iterable[Offer] = ()) -> list[Source]:
    """The checkpoints that may stand in for that of iteration `below`, the best first; none has been opened.

    Args:
        listing: the directory of persistent checkpoints.
        below: the iteration of one that is damaged or gone.
        offers: the complete checkpoints of other tiers.
    """
    starts = starts_or_none(listing.path)
    older = [each for each in _judged(listing, starts) if each.iteration < below and each.path.is_dir()]
    return stand_ins(older, [offer for offer in offers if offer.iteration <= below], below)


def left_behind_in(listing: Listing) -> set[int]:
    """The iterations of a directory that a rollback has left behind, as far as the run's starts tell."""
    starts = starts_or_none(listing.path)
    if not starts.entries:
        return set()
    return {each.iteration for each in _judged(listing, starts) if each.left_behind}


def _judged(listing: Listing, starts: Starts) -> list[Older]:
    """All checkpoints of a directory, with what the run's starts tell of them."""
    paths = [listing.path / iteration_name(iteration) for iteration in listing.iterations]
    manifests = [_readable_manifest(path) for path in paths]
    told = starts.judge(
        (iteration, 0 if manifest is None else manifest.start)
        for iteration, manifest in zip(listing.iterations, manifests, strict=True)
    )
    return [
        Older(iteration, path, None if manifest is None else manifest.created, left_behind)
        for iteration, path, manifest, left_behind in zip(listing.iterations, paths, manifests, told, strict=True)
    ]


def _readable_manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except (CheckpointDamagedError, OSError):
        return None


def require_whole(path: Path, level: Level = "sizes") -> Manifest | None:
    """Check that a checkpoint has all its files in their sizes, and nothing that leads out of it.

    Args:
        path: the checkpoint.
        level: with `off` the files are not compared with the manifest.

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
    if manifest is None:
        _require_whole_without_manifest(path)
        return None
    if level == "off":
        return manifest
    named = parse_iteration_name(path.name)
    swapped = [] if named in (None, manifest.iteration) else [f"{MANIFEST} is of iteration {manifest.iteration}"]
    problems = find_damage(path, manifest.files)
    require_undamaged(path, problems and [*swapped, *problems])
    # Small files are checked to the last bit; reading every shard twice would cost as much as the load.
    is_shard = format_of(path).is_shard
    problems = find_damage(path, (r for r in manifest.files if not is_shard(r.name)), checksums=True)
    require_undamaged(path, problems and [*swapped, *problems])
    return manifest


def examine(path: Path, level: Level) -> tuple[Manifest | None, Unverified]:
    """Check a checkpoint as `require_whole` does, and say what is left for all ranks to verify.

    Args:
        path: the checkpoint; one that is marked as damaged is to be verified in full.
        level: `checkpoint.integrity`.
    """
    level = "full" if is_marked(path) else level
    manifest = require_whole(path, level)
    if manifest is None and level == "full":
        logger.warning("%s has no %s, so its files cannot be verified", path, MANIFEST)
    if manifest is None or level == "off":
        return manifest, Unverified()
    is_shard = format_of(path).is_shard
    shards = tuple(record for record in manifest.files if is_shard(record.name))
    return manifest, Unverified(shards, every_byte=level == "full")


def describe(source: Source, level: Level = "sizes") -> tuple[Saved, Unverified]:
    """Check a checkpoint and read what it says about itself.

    Returns:
        That, and what is left for all ranks to verify.

    Raises:
        CheckpointError: as `require_whole`, or a file in it is unreadable.
    """
    manifest, unverified = examine(source.path, level)
    return _saved(source, manifest), unverified


def _saved(source: Source, manifest: Manifest | None) -> Saved:
    common = format_of(source.path).read_common(source.path)
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
        start=0 if manifest is None else manifest.start,
        checkpoint_format=None if manifest is None else manifest.checkpoint_format,
        total_bytes=None if manifest is None else manifest.total_bytes,
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
    absent = [name for name in format_of(path).files if not (path / name).is_file()]
    if absent:
        raise CheckpointDamagedError(f"{path} is damaged: it has no {', '.join(absent)}; {found_in(path)}")


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
