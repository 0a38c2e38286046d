"""Tensors of a checkpoint as safetensors files: for other programs, without the run, within a memory budget."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.conversion.plan import Piece, PlanError, Tensor, shares_of
from bridge.training.checkpointing.conversion.stores import Store
from bridge.training.checkpointing.conversion.work import Memory
from bridge.training.checkpointing.disk import as_text, available_bytes
from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSaveError,
    NotACheckpointError,
    NotEnoughSpaceError,
)
from bridge.training.checkpointing.export import safetensors_file
from bridge.training.checkpointing.export.hugging_face import layout_for
from bridge.training.checkpointing.export.plan import (
    CONFIG,
    INDEX,
    Target,
    as_stored,
    files_of,
    pieces_of,
    with_dtype,
)
from bridge.training.checkpointing.export.publishing import published, require_free
from bridge.training.checkpointing.export.sources import Opened, Report, model_tensors, open_checkpoint, verify
from bridge.training.checkpointing.export.tokenizer_files import NAMES as TOKENIZER_NAMES
from bridge.training.checkpointing.export.tokenizer_files import tokenizer_files
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.safety.safe_globals import allow

DEFAULT_MEMORY = 1 << 30
"""Bytes."""
DEFAULT_SHARD = 5_000_000_000
"""Bytes of values in a file."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""torch's names of the types that values can be converted to."""
_COPIES = 6
"""Of a piece that are held at once, as it is stored: itself, the chunks of a Zarr array, and its values in fp32."""


@dataclass(frozen=True)
class Options:
    """How tensors are written."""

    dtype: str | None = None
    """`fp32`, `bf16` or `fp16`, of all floating-point values; None leaves them as they are stored."""
    hf_layout: bool = False
    """Names, shapes and `config.json` as Hugging Face's transformers has them."""
    include: tuple[str, ...] = ()
    """Keys as a shell matches them, of all tensors; empty is the model's tensors."""
    shard_bytes: int = DEFAULT_SHARD
    force: bool = False
    """Replace an export that is there."""


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    path: Path
    iterations: tuple[int, ...]
    """Of the checkpoints that it was made of."""
    files: dict[str, int]
    """All files with their bytes."""
    tensors: int
    value_bytes: int
    """Of all tensors as they are written."""
    model_type: str | None
    """Hugging Face's name of the kind of model; None where the names are megatron-core's."""
    verified: bool
    """Whether every file of the source was compared with its manifest."""
    peak_bytes: int
    """The most values and buffers that were held at once."""
    seconds: float


def export(
    source: Path,
    destination: Path,
    options: Options | None = None,
    *,
    step: int | None = None,
    memory: int = DEFAULT_MEMORY,
    verify_source: bool = True,
    safe_globals: Sequence[str] = (),
    report: Report | None = None,
) -> Exported:
    """Write tensors of a checkpoint as safetensors files, into a directory that appears as a whole.

    Args:
        source: a checkpoint, or a directory of checkpoints, of which the tracked one is taken; it is only read.
        destination: the new directory.
        options: which tensors, and how.
        step: the iteration to take from a directory of checkpoints.
        memory: bytes of values and buffers that are held at most. The program itself comes on top.
        verify_source: compare the source's files with its manifest first.
        safe_globals: further classes, as dotted paths, that the checkpoint may hold: `checkpoint.safe_globals`.
        report: told of the progress.

    Raises:
        CheckpointNotFoundError, NotACheckpointError: there is nothing to export.
        CheckpointDamagedError, UnsafeCheckpointError: the source cannot be trusted.
        CheckpointMismatchError: it has no such tensors, or no form that was asked for.
        DirectoryInUseError: another export writes there.
        NotEnoughSpaceError: the file system has too little room.
        CheckpointSaveError: the files cannot be written, or something else is there. Nothing was published.
    """
    started = time.monotonic()
    options = options or Options()
    allow(list(safe_globals))
    limits = limits_of(memory, 1, _COPIES)
    opened = open_checkpoint(source, step, limits.reader)
    destination = place_of(destination, [opened], options)
    targets, config = targets_of(opened.store, opened, options)
    verified = verify_source and verify([opened], report or quiet)
    request = Request(opened.store, (opened,), targets, config, destination, options, limits)
    return write_export(request, report or quiet, verified, started)


@dataclass(frozen=True)
class Limits:
    """How memory is used."""

    total: int
    reader: int
    """Bytes of each reader's buffers."""
    readers: int
    piece: int
    """Bytes that pieces which are read at once may weigh."""
    copies: int
    """Of a piece, as it is stored, that are held at once."""


def limits_of(memory: int, readers: int, copies: int) -> Limits:
    """Divide a memory budget, in bytes.

    Args:
        memory: the budget.
        readers: checkpoints that are open.
        copies: of a piece, as it is stored, that are held at once.

    Raises:
        CheckpointSaveError: it is too small.
    """
    try:
        shares = shares_of(memory, readers)
    except PlanError as error:
        raise CheckpointSaveError(f"--memory-gib: {error}") from error
    return Limits(memory, shares.reader, readers, (memory - readers * shares.reader) // copies, copies)


def quiet(step: str, done: int, total: int) -> None:
    """Tells nobody."""
    del step, done, total


def place_of(destination: Path, sources: Sequence[Opened], options: Options) -> Path:
    """Where the new directory is going to be; nothing is made.

    Raises:
        CheckpointSaveError: something is there.
        NotACheckpointError: it would lie in a checkpoint that is read.
    """
    place = destination.resolve()
    for each in sources:
        if each.path.resolve() in (place, *place.parents):
            raise NotACheckpointError(f"DST: {destination} lies in the checkpoint that is to be exported; name another")
    require_free(place, force=options.force)
    return place


def targets_of(store: Store, opened: Opened, options: Options) -> tuple[list[Target], dict[str, Any] | None]:
    """The tensors to write, and with Hugging Face's names the content of `config.json`.

    Raises:
        CheckpointMismatchError: there are none, or they have no form that was asked for.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise CheckpointMismatchError(f"--dtype: {options.dtype!r} is not one of {', '.join(DTYPES)}")
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    if options.hf_layout:
        if options.include:
            raise CheckpointMismatchError("--include: with --hf-layout all of the model is written; leave one out")
        tensors = model_tensors(store)
        layout = layout_for(opened.config, tensors, f"{opened.path}")
        targets = with_dtype(layout.targets, dtype)
        return targets, {**layout.config, "torch_dtype": targets[0].dtype}
    targets = with_dtype(as_stored(_selected(store, opened, options.include)), dtype)
    return targets, None


def _selected(store: Store, opened: Opened, patterns: Sequence[str]) -> list[Tensor]:
    if not patterns:
        selected = list(model_tensors(store).values())
        if not selected:
            raise CheckpointMismatchError(
                f"SRC: {opened.path} holds no tensors of a model; choose others with --include"
            )
        return selected
    keys = {pattern: [key for key in store.tensors if fnmatchcase(key, pattern)] for pattern in patterns}
    for pattern, found in keys.items():
        if not found:
            raise CheckpointMismatchError(
                f"--include: no tensor in {opened.path} matches {pattern!r}; bridge-ckpt inspect --all lists them"
            )
    return [store.tensors[key] for key in dict.fromkeys(key for found in keys.values() for key in found)]


@dataclass(frozen=True)
class Request:
    """An export, planned."""

    store: Store
    sources: tuple[Opened, ...]
    """The checkpoints that the store reads."""
    targets: list[Target]
    config: dict[str, Any] | None
    """Of `config.json`; None where there is to be none."""
    destination: Path
    options: Options
    limits: Limits


def write_export(request: Request, report: Report, verified: bool, started: float) -> Exported:
    """Write what was planned.

    Args:
        request: the plan.
        report: told of the progress.
        verified: whether the sources were compared with their manifests.
        started: when the work began, of `time.monotonic`.

    Raises:
        CheckpointError: as `export`.
    """
    if request.options.shard_bytes < 1:
        raise CheckpointSaveError("--shard-gb: a file needs room for at least one byte")
    destination, config = request.destination, request.config
    total = sum(each.nbytes for each in request.targets)
    _require_room(destination, total)
    files = files_of(request.targets, request.options.shard_bytes)
    beside = tokenizer_files(request.sources[-1]) if request.options.hf_layout else {}
    metadata = _metadata(request.sources, beside)
    headers = {name: safetensors_file.header_of(group, metadata) for name, group in files.items()}
    values = _Values(request.store, request.limits, report, total)
    try:
        with published(destination, force=request.options.force) as directory:
            sizes = {
                name: safetensors_file.write(directory / name, headers[name], values.of(group))
                for name, group in files.items()
            }
            for name, data in {**beside, **_described(files, total, config)}.items():
                write_file(directory / name, data)
                sizes[name] = len(data)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointSaveError(f"DST: writing {destination} failed: {error}; nothing was published") from error
    return Exported(
        destination,
        tuple(each.iteration for each in request.sources),
        sizes,
        len(request.targets),
        total,
        None if config is None else config["model_type"],
        verified,
        values.memory.peak,
        time.monotonic() - started,
    )


def _require_room(destination: Path, needed: int) -> None:
    available = available_bytes(destination.parent)
    if available is not None and needed > available:
        raise NotEnoughSpaceError(
            f"DST: {as_text(needed)} are needed in {destination.parent} and {as_text(available)} are available; free "
            "space there, or name another directory"
        )


def _metadata(sources: Sequence[Opened], beside: Collection[str]) -> dict[str, str]:
    """What each file says about itself; transformers wants to know that the values are torch's."""
    found = {"format": "pt", "iterations": json.dumps([each.iteration for each in sources])}
    return {**found, TOKENIZER_NAMES: json.dumps(sorted(beside))} if beside else found


def _described(files: dict[str, list[Target]], total: int, config: dict[str, Any] | None) -> dict[str, bytes]:
    """The files that describe the values, by name."""
    found: dict[str, Any] = {}
    if len(files) > 1:
        weights = {each.name: name for name, group in files.items() for each in group}
        found[INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    if config is not None:
        found[CONFIG] = config
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in found.items()}


class _Values:
    """Reads what is written, no more at once than memory allows."""

    def __init__(self, store: Store, limits: Limits, report: Report, total: int) -> None:
        self._store, self._limits, self._report, self._total = store, limits, report, total
        self._done = 0
        self.memory = Memory(limits.total)

    def of(self, targets: Sequence[Target]) -> Iterator[torch.Tensor]:
        """Values of tensors, piece after piece.

        Raises:
            CheckpointError: they cannot be read, or a piece does not fit into memory.
        """
        with self.memory.hold(self._limits.readers * self._limits.reader, "the reader"):
            for batch in self._batches(targets):
                held = self._limits.copies * sum(piece.weight for piece, _ in batch)
                with self.memory.hold(held, f"a piece of {batch[0][0].tensor.key}"):
                    values = self._store.read([piece for piece, _ in batch])
                    values.reverse()
                    for _, target in batch:
                        yield values.pop().to(target.torch_dtype)
                self._done += sum(piece.nbytes // piece.tensor.itemsize * t.torch_dtype.itemsize for piece, t in batch)
                self._report("exporting", self._done, self._total)

    def _batches(self, targets: Sequence[Target]) -> Iterator[list[tuple[Piece, Target]]]:
        batch: list[tuple[Piece, Target]] = []
        weight = 0
        for target in targets:
            for piece in self._pieces(target):
                if batch and weight + piece.weight > self._limits.piece:
                    yield batch
                    batch, weight = [], 0
                batch.append((piece, target))
                weight += piece.weight
        if batch:
            yield batch

    def _pieces(self, target: Target) -> Iterator[Piece]:
        try:
            yield from pieces_of(target, self._limits.piece)
        except PlanError as error:
            raise CheckpointSaveError(f"--memory-gib: {error}; give more memory") from error
