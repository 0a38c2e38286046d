"""The mean of a model's tensors over several iterations of a run, as a checkpoint or as safetensors files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from bridge.training.checkpointing import commit, ownership
from bridge.training.checkpointing.catalog.contents import part_of
from bridge.training.checkpointing.conversion.destination import (
    check_destination,
    claim,
    manifest_of,
    move_trackers,
    tracking,
)
from bridge.training.checkpointing.conversion.plan import Part, Piece, PlanError, Tensor, batches_of, divide
from bridge.training.checkpointing.conversion.stores import FSDP_DTENSOR, TORCH_DIST, Store
from bridge.training.checkpointing.conversion.work import Memory
from bridge.training.checkpointing.conversion.writers import DcpWriter
from bridge.training.checkpointing.disk import as_text, available_bytes
from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    NotEnoughSpaceError,
)
from bridge.training.checkpointing.export.exporting import (
    DEFAULT_MEMORY,
    Exported,
    Limits,
    Options,
    Request,
    limits_of,
    place_of,
    quiet,
    targets_of,
    write_export,
)
from bridge.training.checkpointing.export.sources import FROM, MODEL, Opened, Report, open_checkpoint, verify
from bridge.training.checkpointing.files import sync_file, write_file
from bridge.training.checkpointing.formats.registry import format_named
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import (
    COMMON,
    RUN_CONFIG,
    TOKENIZER_DIRECTORY,
    TRAIN_STATE,
    is_iteration_directory,
    list_checkpoints,
)
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.sidecar import torch_bytes
from bridge.training.checkpointing.trackers import read_tracker

_COPIES = 12
"""Of a piece that are held at once, as it is stored: the sum in fp32, what is read, the mean, what it becomes."""
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


class AveragedStore:
    """Several checkpoints of a model as one: its tensors are their mean. A `Store` without objects."""

    def __init__(self, stores: Sequence[Store], tensors: dict[str, Tensor]) -> None:
        """
        Args:
            stores: all with these tensors.
            tensors: by key.
        """
        self._stores = tuple(stores)
        self.tensors = tensors
        self.objects: dict[str, int] = {}

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """As `Store`: sums are taken in fp32, or in the stored type if it is wider, in the order of the stores.

        Raises:
            CheckpointMismatchError: values that have no mean differ.
        """
        sums = [_summand(value) for value in self._stores[0].read(pieces)]
        for store in self._stores[1:]:
            values = store.read(pieces)
            for position, piece in enumerate(pieces):
                _add(sums[position], values[position], piece.tensor.key)
            values.clear()
        count = len(self._stores)
        return [
            (value.div_(count) if value.is_floating_point() else value).to(piece.tensor.torch_dtype)
            for value, piece in zip(sums, pieces, strict=True)
        ]

    def read_objects(self, keys: Sequence[str]) -> dict[str, Any]:
        """As `Store`; there are none."""
        raise KeyError(*keys)


def _summand(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float32) if value.is_floating_point() and value.dtype != torch.float64 else value


def _add(total: torch.Tensor, value: torch.Tensor, key: str) -> None:
    if total.is_floating_point():
        total.add_(value.to(total.dtype) if value.itemsize == 1 else value)
    elif not torch.equal(total, value):
        raise CheckpointMismatchError(
            f"{FROM}: {key} is of the type {str(value.dtype).removeprefix('torch.')}, which has no mean, and differs "
            "between the iterations"
        )


def iterations_of(source: Path, steps: Sequence[int], last: int | None) -> list[int]:
    """The iterations to take the mean of, in ascending order.

    Args:
        source: a directory of checkpoints.
        steps: those that are named.
        last: or this many of the newest; none beyond the tracked one.

    Raises:
        CheckpointNotFoundError: there are not that many.
        CheckpointMismatchError: it is not clear which, or there are less than two.
    """
    if is_iteration_directory(source):
        raise CheckpointMismatchError(f"{FROM}: {source} is one checkpoint; name the directory of checkpoints")
    if not source.exists():
        raise CheckpointNotFoundError(f"{FROM}: {source} does not exist")
    if bool(steps) == (last is not None):
        raise CheckpointMismatchError("name the iterations with --step, or say with --last how many; one of them")
    if last is None:
        chosen = sorted(set(steps))
    else:
        listing = list_checkpoints(source)
        tracked = read_tracker(listing)
        newest = tracked.iteration if tracked is not None and not tracked.release else None
        there = sorted(each for each in listing.iterations if newest is None or each <= newest)
        if last > len(there):
            raise CheckpointNotFoundError(f"--last is {last}, and {source} has {len(there)} checkpoints")
        chosen = there[len(there) - max(0, last) :]
    if len(chosen) < 2:
        raise CheckpointMismatchError("a mean is taken of two iterations or more; name others, or more of them")
    return chosen


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
    mean = _Mean.open(source, steps, last, memory, safe_globals)
    newest = mean.newest
    if newest.format == FSDP_DTENSOR or newest.manifest is None:
        what = "is in the format 'fsdp_dtensor'" if newest.manifest is not None else "has no manifest"
        raise CheckpointMismatchError(
            f"{FROM}: {newest.path} {what}, so the mean cannot be published as a checkpoint; export it with --format "
            "safetensors"
        )
    listing = check_destination(destination, newest.path, newest.iteration, "averaged")
    if newest.iteration in listing.iterations and not force:
        raise CheckpointSaveError(
            f"DST: {destination} has a checkpoint of iteration {newest.iteration}; give --force to replace it, or name "
            "another directory"
        )
    needed = sum(tensor.nbytes for tensor in mean.store.tensors.values())
    available = available_bytes(destination)
    if available is not None and needed > available:
        raise NotEnoughSpaceError(
            f"DST: {as_text(needed)} are needed in {destination} and {as_text(available)} are available; free space "
            "there, or name another directory"
        )
    verified = verify_source and verify(mean.sources, report or quiet)
    new = claim(destination)
    try:
        moves, trackers = tracking(listing, newest.iteration)
        path, manifest, peak = _publish(mean, newest.manifest, destination, report or quiet)
        if moves:
            trackers = move_trackers(destination, newest.iteration, path, listing)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointSaveError(f"DST: {error}") from error
    finally:
        if new:
            ownership.give_up(destination)
    return Averaged(
        path,
        newest.iteration,
        manifest.averaged,
        len(mean.store.tensors),
        manifest.total_bytes,
        moves,
        trackers,
        verified,
        peak,
        time.monotonic() - started,
    )


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
    mean = _Mean.open(source, steps, last, memory, safe_globals)
    destination = place_of(destination, mean.sources, options)
    targets, config = targets_of(mean.store, mean.newest, options)
    verified = verify_source and verify(mean.sources, report or quiet)
    request = Request(mean.store, mean.sources, targets, config, destination, options, mean.limits)
    return write_export(request, report or quiet, verified, started)


@dataclass(frozen=True)
class _Mean:
    """Checkpoints that hold the same tensors, open."""

    sources: tuple[Opened, ...]
    """In the order of their iterations."""
    store: AveragedStore
    limits: Limits

    @property
    def newest(self) -> Opened:
        return self.sources[-1]

    @classmethod
    def open(
        cls, source: Path, steps: Sequence[int], last: int | None, memory: int, safe_globals: Sequence[str]
    ) -> _Mean:
        allow(list(safe_globals))
        iterations = iterations_of(source, steps, last)
        limits = limits_of(memory, len(iterations), _COPIES)
        sources = tuple(open_checkpoint(source, step, limits.reader) for step in iterations)
        tensors = [_of_model(each) for each in sources]
        for each, found in zip(sources[:-1], tensors[:-1], strict=True):
            _require_same(each, found, sources[-1], tensors[-1])
        return cls(sources, AveragedStore([each.store for each in sources], tensors[-1]), limits)


def _of_model(opened: Opened) -> dict[str, Tensor]:
    found = {key: tensor for key, tensor in opened.store.tensors.items() if part_of(key) == MODEL}
    if not found:
        raise CheckpointMismatchError(f"{FROM}: {opened.path} holds no tensors of a model")
    return found


def _require_same(first: Opened, found: dict[str, Tensor], second: Opened, wanted: dict[str, Tensor]) -> None:
    """Check that two checkpoints hold the same tensors, however they are stored."""
    problems = [f"only {first.path.name} has {key}" for key in sorted(found.keys() - wanted.keys())]
    problems += [f"only {second.path.name} has {key}" for key in sorted(wanted.keys() - found.keys())]
    for key in sorted(found.keys() & wanted.keys()):
        one, other = found[key], wanted[key]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            problems.append(
                f"{key} is {one.dtype} {list(one.shape)} in {first.path.name} and {other.dtype} {list(other.shape)} in "
                f"{second.path.name}"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointMismatchError(f"{FROM}: a mean needs the same tensors: {'; '.join(problems[:5])}{more}")


def _publish(mean: _Mean, source: Manifest, destination: Path, report: Report) -> tuple[Path, Manifest, int]:
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

    def __init__(self, mean: _Mean, report: Report, total: int) -> None:
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
