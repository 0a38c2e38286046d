"""How two checkpoints differ: in configuration, in structure, and in values, which are read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.contents.run_config import read_run_config
from bridge.training.checkpointing.conversion.comparing import same
from bridge.training.checkpointing.conversion.plan import Piece, PlanError, Tensor, pieces_of
from bridge.training.checkpointing.conversion.stores import FORMATS, Store, open_store
from bridge.training.checkpointing.detection import format_of, get_checkpoint_format
from bridge.training.checkpointing.errors import CheckpointMismatchError

DEFAULT_MEMORY = 1 << 30
"""Bytes."""
_COPIES = 6
"""Of a piece: both values as they are stored, in double precision, their difference, and one more."""
_READER = 4
"""One part in so many is for the readers' buffers."""
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Values:
    """How the values of one tensor differ."""

    key: str
    elements: int
    different: int
    """Elements that are not the same, bit by bit in what they mean: two that are not a number are the same."""
    largest: float
    """Difference, without its sign; infinite or not a number where values are."""
    mean: float
    """Of the differences without their signs."""
    relative: float
    """Norm of the difference over the norm of the first one's values; infinite where that is zero."""
    not_finite: tuple[int, int]
    """Elements in each that are infinite or not a number."""


@dataclass(frozen=True)
class Changed:
    """Something that is in both and not the same."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Differences:
    """How two checkpoints differ."""

    first: Path
    second: Path
    config: tuple[Changed, ...]
    """Settings, as `section.key`; None stands for one that is absent."""
    common: tuple[str, ...]
    """Keys of the common state whose values differ."""
    only_first: tuple[str, ...]
    """Tensors and objects."""
    only_second: tuple[str, ...]
    structure: tuple[Changed, ...]
    """Tensors of another shape or type: `float32 [4, 2]`."""
    objects: tuple[str, ...]
    """Objects whose values differ."""
    values: tuple[Values, ...]
    """Tensors with different values, the largest relative difference first."""
    compared: int
    """Tensors whose values were compared."""

    @property
    def are_equal(self) -> bool:
        """Whether structure and values are the same; the configurations may differ."""
        return not (self.only_first or self.only_second or self.structure or self.objects or self.values)


def compare(
    first: Path,
    second: Path,
    *,
    pattern: str = "*",
    values: bool = True,
    memory: int = DEFAULT_MEMORY,
    report: Report | None = None,
) -> Differences:
    """Compare two checkpoints, which may be in different formats.

    Args:
        first: one checkpoint.
        second: another.
        pattern: compare only the tensors and objects whose keys match, as in a shell.
        values: compare values too, and not only configuration and structure.
        memory: bytes of values and buffers that are held at once; the program itself comes on top.
        report: told how many bytes of how many are compared.

    Raises:
        CheckpointError: one is damaged, or in a format that cannot be compared.
        CheckpointMismatchError: the memory is too small for a chunk.
    """
    stores = [_open(path, memory // _READER // 2) for path in (first, second)]
    keys = [_keys(store, pattern) for store in stores]
    tensors = [key for key in sorted(keys[0] & keys[1]) if key in stores[0].tensors and key in stores[1].tensors]
    structure = [
        Changed(key, _described(a), _described(b))
        for key in tensors
        if _described(a := stores[0].tensors[key]) != _described(b := stores[1].tensors[key])
    ]
    comparable = [key for key in tensors if stores[0].tensors[key].shape == stores[1].tensors[key].shape]
    objects = sorted(key for key in keys[0] & keys[1] if key in stores[0].objects and key in stores[1].objects)
    found = list(_compared(stores, comparable, memory, report or _quiet)) if values else []
    return Differences(
        first,
        second,
        tuple(config_changes(read_run_config(first), read_run_config(second))),
        tuple(_changed_common(first, second)) if values else (),
        tuple(sorted(keys[0] - keys[1])),
        tuple(sorted(keys[1] - keys[0])),
        tuple(structure),
        tuple(_changed_objects(stores, objects)) if values else (),
        tuple(sorted((each for each in found if each.different), key=_by_size)),
        len(found),
    )


def config_changes(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> list[Changed]:
    """The settings in which two configurations differ, by name."""
    settings = [dict(_flat(config or {})) for config in (first, second)]
    names = sorted(settings[0].keys() | settings[1].keys())
    pairs = ((name, settings[0].get(name), settings[1].get(name)) for name in names)
    return [Changed(name, a, b) for name, a, b in pairs if a != b]


def _quiet(step: str, done: int, total: int) -> None:
    del step, done, total


def _open(path: Path, reader_bytes: int) -> Store:
    name = get_checkpoint_format(path)
    if name not in FORMATS:
        raise CheckpointMismatchError(f"{path} is in the format {name!r}; only {', '.join(FORMATS)} can be compared")
    return open_store(path, name, max(reader_bytes, 320 << 10))


def _keys(store: Store, pattern: str) -> set[str]:
    return {key for key in (*store.tensors, *store.objects) if fnmatchcase(key, pattern)}


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _changed_common(first: Path, second: Path) -> Iterator[str]:
    states = [format_of(path).read_common(path) for path in (first, second)]
    for key in sorted({str(key) for state in states for key in state}):
        if not same(*(state.get(key) for state in states)):
            yield key


def _changed_objects(stores: Sequence[Store], keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        values = [store.read_objects([key])[key] for store in stores]
        if not same(*values):
            yield key


def _compared(stores: Sequence[Store], keys: Sequence[str], memory: int, report: Report) -> Iterator[Values]:
    limit = (memory - memory // _READER) // _COPIES
    total, done = sum(stores[0].tensors[key].nbytes for key in keys), 0
    for key in keys:
        pair = [store.tensors[key] for store in stores]
        sums = _Sums()
        for pieces in _pieces(pair, limit):
            sums.add(*(store.read([piece])[0] for store, piece in zip(stores, pieces, strict=True)))
            done += pieces[0].nbytes
            report("comparing", done, total)
        yield sums.values(key)


def _pieces(pair: Sequence[Tensor], limit: int) -> Iterator[tuple[Piece, Piece]]:
    """The same boxes of both, of whole chunks of the one that is stored in chunks that are read as a whole."""
    coarse = max(pair, key=lambda tensor: math.prod(tensor.chunk))
    # In double precision a value takes eight bytes.
    share = max(1, limit * coarse.itemsize // 8)
    try:
        for piece in pieces_of(coarse, share):
            yield Piece(pair[0], piece.offset, piece.shape), Piece(pair[1], piece.offset, piece.shape)
    except PlanError as error:
        raise CheckpointMismatchError(f"--memory-gib: {error}; give more") from error


@dataclass
class _Sums:
    elements: int = 0
    different: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    reference: float = 0.0
    not_finite: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        a, b = first.to(torch.float64), second.to(torch.float64)
        self.elements += a.numel()
        finite = [torch.isfinite(value) for value in (a, b)]
        for index, mask in enumerate(finite):
            self.not_finite[index] += int(mask.numel() - int(mask.sum()))
        differs = ~((a == b) | (torch.isnan(a) & torch.isnan(b)))
        count = int(differs.sum())
        self.reference += float((a * a)[finite[0]].sum())
        if not count:
            return
        self.different += count
        delta = (a - b)[differs].abs()
        self.largest = max(self.largest, float(delta.max())) if not bool(delta.isnan().any()) else math.nan
        self.total += float(delta.sum())
        self.squares += float((delta * delta).sum())

    def values(self, key: str) -> Values:
        relative = 0.0 if not self.squares else math.inf
        if self.reference:
            relative = math.sqrt(self.squares / self.reference)
        mean = self.total / self.elements if self.elements else 0.0
        first, second = self.not_finite
        return Values(key, self.elements, self.different, self.largest, mean, relative, (first, second))


def _by_size(values: Values) -> tuple[float, str]:
    return (-values.relative if math.isfinite(values.relative) else -math.inf, values.key)
