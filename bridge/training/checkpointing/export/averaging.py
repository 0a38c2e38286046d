"""The mean of a model's tensors over several iterations of a run, as a checkpoint or as safetensors files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.catalog.contents import part_of
from bridge.training.checkpointing.conversion.destination import (
    check_destination,
    claimed,
    manifest_of,
    move_trackers,
    tracking,
)
from bridge.training.checkpointing.conversion.plan import Part, Piece, PlanError, batches_of, divide
from bridge.training.checkpointing.conversion.stores import FSDP_DTENSOR, TORCH_DIST
from bridge.training.checkpointing.conversion.work import Memory
from bridge.training.checkpointing.conversion.writers import DcpWriter
from bridge.training.checkpointing.disk import as_text, available_bytes
from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSaveError,
    NotEnoughSpaceError,
)
from bridge.training.checkpointing.export.exporting import (
    DEFAULT_MEMORY,
    Exported,
    Options,
    Request,
    place_of,
    quiet,
    targets_of,
    write_export,
)
from bridge.training.checkpointing.export.mean import Mean
from bridge.training.checkpointing.export.sources import FROM, MODEL, Opened, Report, verify
from bridge.training.checkpointing.files import sync_file, write_file
from bridge.training.checkpointing.formats.registry import format_named
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import (
    COMMON,
    RUN_CONFIG,
    TOKENIZER_DIRECTORY,
    TRAIN_STATE,
    Listing,
)
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.sidecar import torch_bytes

_OF_THE_RUN = frozenset({"optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine"})
"""Keys of the common state that belong to one point of the run, and not to the model."""


@dataclass(frozen=True)
class Averaged:
    """What came of a mean that was published as a checkpoint."""

    path: Path
    iteration: int
    """It is published under that of the newest checkpoint."""
    iterations: tuple[int, ...]
    """That it is the mean of."""
    tensors: int
    total_bytes: int
    """Of all files."""
    trackers_moved: bool
    trackers: str
    """What became of the trackers, in words."""
    verified: bool
    """Whether every file of the sources was compared with its manifest."""
    peak_bytes: int
    """The most values and buffers that were held at once."""
    seconds: float


def average(
    source: Path,
    destination: Path,
    *,
    steps: Sequence[int] = (),
    last: int | None = None,
    memory: int = DEFAULT_MEMORY,
    verify_source: bool = True,
    force: bool = False,
    safe_globals: Sequence[str] = (),
    report: Report | None = None,
) -> Averaged:
    """Publish the mean of a model over several iterations as a checkpoint of the format `torch_dist`.

    It has the model, and what is needed beside it: no optimizer, no random states, no position in the data. A run
    starts from it with `checkpoint.pretrained_checkpoint` or `checkpoint.finetune`.

    Args:
        source: a directory of checkpoints; it is only read.
        destination: another one, which need not exist.
        steps: the iterations.
        last: or how many of the newest.
        memory: bytes of values and buffers that are held at most. The program itself comes on top.
        verify_source: compare the sources' files with their manifests first.
        force: replace a checkpoint of this iteration that the destination has.
        safe_globals: further classes, as dotted paths, that the checkpoints may hold: `checkpoint.safe_globals`.
        report: told of the progress.

    Raises:
        CheckpointNotFoundError, NotACheckpointError: there are no such checkpoints, or the destination is something
            else.
        CheckpointDamagedError, UnsafeCheckpointError: a source cannot be trusted.
        CheckpointMismatchError: the checkpoints do not hold the same tensors.
        DirectoryInUseError: a run saves in the destination.
        NotEnoughSpaceError: the file system has too little room.
        CheckpointSaveError: the checkpoint cannot be written. Nothing was published.
    """
    started = time.monotonic()
    mean = Mean.open(source, steps, last, memory, safe_globals)
    manifest = _publishable(mean)
    listing = _checked(mean, destination, force=force)
    verified = verify_source and verify(mean.sources, report or quiet)
    with claimed(destination):
        try:
            moves, trackers = tracking(listing, mean.newest.iteration)
            path, written, peak = _publish(mean, manifest, destination, report or quiet)
            if moves:
                trackers = move_trackers(destination, mean.newest.iteration, path, listing)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointSaveError(f"DST: {error}") from error
    return Averaged(
        path,
        written.iteration,
        written.averaged,
        len(mean.store.tensors),
        written.total_bytes,
        moves,
        trackers,
        verified,
        peak,
        time.monotonic() - started,
    )


def _publishable(mean: Mean) -> Manifest:
    """The manifest of the newest checkpoint, by which that of the mean is made.

    Raises:
        CheckpointMismatchError: it has none, or a format in which a mean cannot be published.
    """
    newest = mean.newest
    if newest.format != FSDP_DTENSOR and newest.manifest is not None:
        return newest.manifest
    what = "is in the format 'fsdp_dtensor'" if newest.manifest is not None else "has no manifest"
    raise CheckpointMismatchError(
        f"{FROM}: {newest.path} {what}, so the mean cannot be published as a checkpoint; export it with --format "
        "safetensors"
    )


def _checked(mean: Mean, destination: Path, *, force: bool) -> Listing:
    """What the destination holds, if the mean may be put there and has room.

    Raises:
        CheckpointError: as `average`.
    """
    iteration = mean.newest.iteration
    listing = check_destination(destination, mean.newest.path, iteration, "averaged")
    if iteration in listing.iterations and not force:
        raise CheckpointSaveError(
            f"DST: {destination} has a checkpoint of iteration {iteration}; give --force to replace it, or name "
            "another directory"
        )
    needed = sum(tensor.nbytes for tensor in mean.store.tensors.values())
    available = available_bytes(destination)
    if available is not None and needed > available:
        raise NotEnoughSpaceError(
            f"DST: {as_text(needed)} are needed in {destination} and {as_text(available)} are available; free space "
            "there, or name another directory"
        )
    return listing


def export_average(
    source: Path,
    destination: Path,
    options: Options | None = None,
    *,
    steps: Sequence[int] = (),
    last: int | None = None,
    memory: int = DEFAULT_MEMORY,
    verify_source: bool = True,
    safe_globals: Sequence[str] = (),
    report: Report | None = None,
) -> Exported:
    """Write the mean of a model over several iterations as safetensors files.

    The arguments are those of `average` and of `exporting.export`.

    Raises:
        CheckpointError: as these two.
    """
    started = time.monotonic()
    options = options or Options()
    mean = Mean.open(source, steps, last, memory, safe_globals)
    destination = place_of(destination, mean.sources, options)
    targets, config = targets_of(mean.store, mean.newest, options)
    verified = verify_source and verify(mean.sources, report or quiet)
    request = Request(mean.store, mean.sources, targets, config, destination, options, mean.limits)
    return write_export(request, report or quiet, verified, started)


def _publish(mean: Mean, source: Manifest, destination: Path, report: Report) -> tuple[Path, Manifest, int]:
    """Write everything and rename it; return the path, the manifest, and the most bytes held."""
    newest = mean.newest
    objects = [(key, size) for key, size in newest.store.objects.items() if part_of(key) == MODEL]
    try:
        parts = divide(mean.store.tensors.values(), objects, mean.limits.piece)
    except PlanError as error:
        raise CheckpointSaveError(f"--memory-gib: {error}; give more memory") from error
    staging = commit.begin_staging(destination, newest.iteration)
    try:
        writing = _Writing(mean, report, sum(part.nbytes for part in parts))
        writer = DcpWriter(staging, has_sharded_objects=True)
        written = [writer.write(part.number, writing.values(part), writing.objects(part)) for part in parts]
        files = [record for each in written for record in each.files]
        for name in writer.finish(mean.store.tensors.values(), written):
            sync_file(staging / name)
            files.append(FileRecord.of(staging, name))
        files += _write_sidecars(newest, staging)
        manifest = replace(
            manifest_of(source, TORCH_DIST, sorted(files, key=lambda record: record.name), destination),
            created=time.time(),
            metrics={},
            averaged=tuple(each.iteration for each in mean.sources),
        )
        commit.seal(staging, manifest)
        return commit.publish(staging, newest.iteration), manifest, writing.memory.peak
    except BaseException:
        commit.abandon(staging)
        raise


class _Writing:
    """Reads parts of a mean, no more at once than memory allows."""

    def __init__(self, mean: Mean, report: Report, total: int) -> None:
        self._mean, self._report, self._total = mean, report, total
        self._done = 0
        self.memory = Memory(mean.limits.total)

    def values(self, part: Part) -> Iterator[list[tuple[Piece, torch.Tensor]]]:
        limits = self._mean.limits
        with self.memory.hold(limits.readers * limits.reader, "the readers"):
            for batch in batches_of(part, limits.piece):
                held = limits.copies * sum(piece.weight for piece in batch)
                with self.memory.hold(held, f"a piece of {batch[0].tensor.key}"):
                    values = list(zip(batch, self._mean.store.read(batch), strict=True))
                    yield values
                    values.clear()
                self._count(sum(piece.nbytes for piece in batch))

    def objects(self, part: Part) -> Iterator[tuple[str, Any]]:
        for key, size in part.objects:
            yield key, self._mean.newest.store.read_objects([key])[key]
            self._count(size)

    def _count(self, size: int) -> None:
        self._done += size
        self._report("averaging", self._done, self._total)


def _write_sidecars(newest: Opened, staging: Path) -> list[FileRecord]:
    """What a model needs beside its tensors, as the newest checkpoint has it."""
    common = format_named(newest.format).read_common(newest.path)
    files = {COMMON: torch_bytes({key: value for key, value in common.items() if key not in _OF_THE_RUN})}
    if newest.config is not None:
        files[RUN_CONFIG] = _without_run_state(newest.config)
    names = [] if newest.manifest is None else [record.name for record in newest.manifest.files]
    for name in names:
        if name == TRAIN_STATE or name.startswith(f"{TOKENIZER_DIRECTORY}/"):
            files[name] = contained_file(newest.path, name)[0].read_bytes()
    for name, data in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(staging / name, data)
    return [FileRecord.of_bytes(name, data).sampled(staging) for name, data in files.items()]


def _without_run_state(config: dict[str, Any]) -> bytes:
    """`run_config.yaml` of a checkpoint that has neither an optimizer nor random states, by which loads go."""
    checkpoint = {**(config.get("checkpoint") or {}), "save_optim": False, "save_rng": False}
    text: str = yaml.safe_dump(
        {**config, "checkpoint": checkpoint}, default_flow_style=False, sort_keys=True, width=float("inf")
    )
    return text.encode()
