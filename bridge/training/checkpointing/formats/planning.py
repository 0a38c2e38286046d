"""Planning a `torch_dist` save: who writes which shard into which file, found out once for a structure.

Rank 0 is told by all ranks what they have, as columns of numbers. It shares out the writing, checks that it makes up
whole tensors, and tells each rank what to write; that is one gather and one scatter. Each rank then makes its own part
of the plan, and rank 0 has the whole, of which `.metadata` is made. The plan equals megatron-core's.

A plan depends on nothing but the structure of every rank's state, so it is kept, and later saves compare structures:
one exchange of a few bytes. megatron-core's own way to reuse a plan is not used: it compares nothing but the cached
plan with itself, so keys that are new never reach the file. After a load the plan of the loaded checkpoint is used, if
it was made for the same structure. What is kept of a plan names shards and holds none.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats.coverage import double_of, problem_of
from bridge.training.checkpointing.formats.loaded_plan import Offer, add_up, content_of, offers_of, sum_of_main
from bridge.training.checkpointing.formats.plan_files import files_of_rank, in_plan_order, stored_table
from bridge.training.checkpointing.formats.shard_table import Packed, ShardTable, row_of
from bridge.training.checkpointing.formats.shares import main_replicas, written_by
from bridge.training.checkpointing.formats.structure import Structure, Verdict, Vote, job_of
from bridge.training.checkpointing.io.compact import placed, read_compact, write_both
from bridge.training.checkpointing.io.framing import Frames
from bridge.training.checkpointing.io.image import FileImage
from bridge.training.checkpointing.io.table import Flags, Ints, StoredTable

logger = logging.getLogger(__name__)


_PLACES = struct.Struct("<QQ")
_AT_ONCE = 100_000
"""Shards that take a tenth of a second to be written down."""


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank writes. Shards and objects are named by their position in the rank's state."""

    name: str
    objects: tuple[tuple[Any, tuple[int, ...]], ...]
    """torch's WriteItems, each with the objects that are saved together under one key."""
    tensors: tuple[tuple[Any, int], ...]


@dataclass(frozen=True)
class Places:
    """Where one rank has written its shards, in the order of its plan."""

    count: int
    packed: bytes
    """The distances between the beginnings of records and their lengths: 64-bit integers, compressed."""

    @classmethod
    def of(cls, at: Ints, length: Ints) -> Places:
        """Of where each record begins, and how long it is, in bytes."""
        columns = np.concatenate([np.diff(at, prepend=0), length]).astype(np.int64)
        return cls(len(at), zlib.compress(columns.tobytes(), 1))

    def columns(self) -> tuple[Ints, Ints]:
        """Where each record begins, and how long it is."""
        unpacked = zlib.decompressobj().decompress(self.packed, 16 * self.count + 1)  # never more memory than that
        columns = np.frombuffer(unpacked, np.int64).reshape(2, self.count)
        return np.cumsum(columns[0]), columns[1]

    def to_bytes(self) -> bytes:
        """Its length, the number of shards and the columns."""
        return _PLACES.pack(len(self.packed), self.count) + self.packed

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[Places, bytes]:
        """What `to_bytes` has made, and what lies behind it.

        Raises:
            ValueError: it is cut short.
        """
        if len(data) < _PLACES.size:
            raise ValueError("the places of a rank's shards are cut short")
        length, count = _PLACES.unpack_from(data)
        end = _PLACES.size + length
        if len(data) < end:
            raise ValueError("the places of a rank's shards are cut short")
        return cls(count, data[_PLACES.size : end]), data[end:]


@dataclass(frozen=True)
class Plan:
    """This rank's part of a plan. Holds no values and no directory."""

    job: str
    """The fingerprint of the ranks' structures that it was made for."""
    files: tuple[PlannedFile, ...]
    numbers: dict[tuple[str, torch.Size | None], int]
    """The position of every shard in the order of the plan, by key and offset."""
    whole: StoredTable | None
    """On rank 0, what all ranks write, without the places that it will have; None elsewhere."""

    def places(self, images: Iterable[FileImage]) -> Places:
        """What rank 0 has to know of this rank's files, laid out. Local."""
        return self._places(
            [index for image in images for index in image.indices],
            [place for image in images for place in image.places()],
        )

    def _places(self, indices: Sequence[Any], places: Sequence[tuple[int, int]]) -> Places:
        if len(indices) != len(self.numbers):
            raise CheckpointSaveError(f"{len(indices)} records were written where {len(self.numbers)} were planned")
        columns = np.zeros((len(indices), 2), np.int64)
        numbers = self.numbers
        columns[[numbers[index.fqn, index.offset] for index in indices]] = np.array(places, np.int64).reshape(-1, 2)
        return Places.of(columns[:, 0], columns[:, 1])

    def reporting(self, write: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Places]]:
        """A `PayloadWrite.write` that returns places, of one that returns torch's write results."""

        def write_and_report(*arguments: Any) -> tuple[Any, Places]:
            records, results = write(*arguments)
            stored = [(result.storage_data.offset, result.storage_data.length) for result in results]
            return records, self._places([result.index for result in results], stored)

        return write_and_report

    def finish(self, directory: Path, places: Sequence[Places]) -> list[str]:
        """Write `.metadata` and what lies beside it, from all ranks' places; rank 0 only.

        Returns:
            The names of the files.
        """
        if self.whole is None:
            raise CheckpointSaveError("the plan is not whole on this rank; only rank 0 can finish a save")
        return write_both(placed(self.whole, [part.columns() for part in places]), directory)

    def bequest(self, places: Places) -> bytes | None:
        """What `inherit` needs of this rank: its places, and on rank 0 what all ranks write.

        None while that is still being made: for so many shards it takes longer than training should wait.
        """
        if self.whole is None:
            return places.to_bytes()
        if len(self.whole) <= _AT_ONCE:
            return places.to_bytes() + self._whole_bytes
        return places.to_bytes() + self._in_thread.result() if self._in_thread.done() else None

    @cached_property
    def _whole_bytes(self) -> bytes:
        return b"" if self.whole is None else self.whole.planned_bytes()

    @cached_property
    def _in_thread(self) -> Future[bytes]:
        with_thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-plan")
        future = with_thread.submit(lambda: self._whole_bytes)
        with_thread.shutdown(wait=False)
        return future


def inherit(directory: Path, bequests: Sequence[bytes]) -> list[str]:
    """`Plan.finish`, for ranks that are gone.

    Args:
        directory: the checkpoint, with the files of all ranks.
        bequests: by rank, what `Plan.bequest` has made.

    Returns:
        The names of the files.

    Raises:
        ValueError: they do not belong together.
    """
    parts = [Places.from_bytes(data) for data in bequests]
    planned = StoredTable.from_planned_bytes(parts[0][1])
    counts = np.bincount(planned.rank, minlength=len(parts)).tolist()
    if counts != [places.count for places, _ in parts]:
        raise ValueError("the places of the shards are not as many as were planned")
    try:
        table = placed(planned, [places.columns() for places, _ in parts])
    except (CheckpointSaveError, zlib.error) as error:
        raise ValueError(f"the places of the shards do not fit the plan: {error}") from error
    sizes = np.array([(directory / name).stat().st_size for name in table.files], np.int64)
    ends = np.where((table.at >= 0) & (table.length >= 0), table.at + table.length, -1)
    if ((ends < table.at) | (ends > sizes[table.file])).any():
        raise ValueError("a shard lies beyond the end of its file")
    return write_both(table, directory)


class SavePlanning:
    """What is kept between the saves of a run: the structure of the last one, and its plan."""

    def __init__(self, loaded: Path | None = None) -> None:
        """
        Args:
            loaded: the checkpoint that the run goes on from, if there is one. Its plan may be used.
        """
        self._structure: Structure | None = None
        self._validated: str | None = None
        self._plan: Any | None = None
        self._loaded = loaded
        self._stored: StoredTable | None = None
        self.frames = Frames()
        """What is known of the records of tensors."""

    @property
    def plan(self) -> Any | None:
        """The plan to use again, as far as the verdict allows it: of the format's own kind, with its `job`."""
        return self._plan

    def take_stored(self) -> StoredTable | None:
        """On rank 0, what the loaded checkpoint was planned to hold, where the verdict says that it fits. Once only:
        should it make a save fail, it does not do so again.
        """
        stored, self._stored = self._stored, None
        return stored

    def unchanged(self, structure: Structure) -> str | None:
        """The job that the kept plan was made for, if this rank's structure is still the same. Local."""
        return self._plan.job if self._plan is not None and structure == self._structure else None

    def vote(self, structure: Structure, common: Callable[[], str], ranks: Ranks) -> Vote:
        """What this rank says where the plan cannot simply be used again. Local.

        Args:
            structure: of what is to be saved.
            common: takes the checksum of the state that all ranks share.
            ranks: all ranks.
        """
        earlier = self._structure
        same = earlier is not None and structure == earlier
        # That of the earlier one is known. It belongs to the structure, so nothing that fails in between parts them.
        fingerprint = earlier.fingerprint if earlier is not None and same else structure.fingerprint
        planned = self._plan.job if self._plan is not None else None
        if ranks.is_first and self._loaded is not None:
            self._stored, self._loaded = _plan_of(self._loaded), None
        stored = None if self._stored is None else job_of(self._stored.fingerprints)
        change = "" if earlier is None or same else structure.change_from(earlier)
        checksum = common() if not same or self._validated is None else ""
        return Vote(fingerprint, self._validated, planned, change, checksum, stored)

    def note(self, structure: Structure, verdict: Verdict, plan: Any | None) -> None:
        """Keep what a successful planning has found; `plan` is None where the next save must not use it."""
        if self._validated != verdict.job:
            self._structure = structure
        self._validated, self._plan, self._stored, self._loaded = verdict.job, plan, None, None


def _plan_of(loaded: Path) -> StoredTable | None:
    """What a checkpoint was planned to hold; None where it does not say."""
    try:
        table = read_compact(loaded)
    except Exception:  # it has been loaded, so this says nothing about it
        logger.debug("the plan of %s is not used", loaded, exc_info=True)
        return None
    return table if table is not None and table.fingerprints else None


def ranks_of(group: Any | None) -> tuple[int, ...] | None:
    """The global ranks of a process group; None without one."""
    return None if group is None else tuple(dist.get_process_group_ranks(group))


@dataclass(frozen=True)
class Assignment:
    """What one rank writes."""

    places: Ints
    """Positions in its state, ascending."""
    table: ShardTable | None
    """On rank 0: the shards of all ranks, and which of them are written."""
    written: Flags | None


def assign(state: Sequence[Any], ranks: Ranks, group: Any | None, *, only_in_grids: bool = False) -> Assignment:
    """Find out what each rank writes: one replica of each shard. Collective: one gather and one scatter.

    Args:
        state: this rank's shards and objects.
        ranks: all ranks.
        group: replicas within this group share the writing; None: the main replica writes.
        only_in_grids: see `shares.written_by`.

    Raises:
        CheckpointSaveError: what is written does not make up whole tensors. Every rank raises.
    """
    made: list[tuple[ShardTable, Flags]] = []

    def tell() -> tuple[Packed, tuple[int, ...] | None]:
        return Packed.of(state), ranks_of(group)

    def share_out(told: list[tuple[Packed, tuple[int, ...] | None]]) -> list[bytes]:
        table = ShardTable.of([packed for packed, _ in told])
        groups = [sharing for _, sharing in told]
        if any(groups):
            _refuse(double_of(table, main_replicas(table)))
        written = written_by(table, groups, only_in_grids=only_in_grids)
        _refuse(problem_of(table, written))
        made.append((table, written))
        bounds = np.searchsorted(table.rank, np.arange(1, ranks.size))
        return [np.packbits(part).tobytes() for part in np.split(written, bounds)]

    flags = ranks.decide("sharing out the writing", tell, share_out)
    mine = np.unpackbits(np.frombuffer(flags, np.uint8), count=len(state))
    return Assignment(np.flatnonzero(mine), *(made[0] if made else (None, None)))


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise CheckpointSaveError(f"the shards of the ranks do not make up whole tensors: {problem}")


def make_plan(
    state: Sequence[Any], ranks: Ranks, planning: SavePlanning, verdict: Verdict, *, writers: int, group: Any | None
) -> Plan:
    """Plan a save, or take up the plan of the checkpoint that was loaded. Collective.

    Args:
        state: this rank's shards and objects.
        ranks: all ranks.
        planning: what is kept between saves.
        verdict: what the ranks make of their structures.
        writers: files of each rank.
        group: replicas within this group share the writing; None: the main replica writes.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    stored = planning.take_stored()
    plan = _take_up(state, ranks, stored, verdict, writers) if verdict.stored else None
    if plan is not None:
        return plan
    assignment = assign(state, ranks, group)

    def make() -> Plan:
        whole = None
        if assignment.table is not None and assignment.written is not None:
            whole = stored_table(assignment.table, assignment.written, writers, verdict.fingerprints)
        return _own_plan(state, assignment.places, ranks.rank, writers, verdict.job, whole)

    return ranks.run("planning what this rank writes", make)


def _take_up(
    state: Sequence[Any], ranks: Ranks, stored: StoredTable | None, verdict: Verdict, writers: int
) -> Plan | None:
    """The plan of a loaded checkpoint, if it holds for what the ranks have. Collective.

    Whatever is wrong with it on whatever rank, all ranks plan anew.
    """
    whole: list[StoredTable] = []

    def offer(_: list[None]) -> list[Offer | None]:
        try:
            if stored is None:
                return [None] * ranks.size
            table, offers = offers_of(stored, ranks.size, writers, verdict.fingerprints)
        except Exception as error:  # there is no telling what a file that somebody has edited leads to
            logger.info("the plan of the loaded checkpoint is not used: %s", error)
            return [None] * ranks.size
        whole.append(table)
        return [*offers]

    offered = ranks.decide("taking up the plan of the loaded checkpoint", lambda: None, offer)
    made: list[Plan] = []

    def check() -> tuple[int, int] | None:
        """What this rank finds in its state, and what should be found in all; None where its own part is another."""
        if offered is None:
            return None
        try:
            plan = _offered_plan(state, offered, ranks.rank, writers, verdict.job, whole[0] if whole else None)
        except Exception:
            logger.debug("the plan of the loaded checkpoint does not fit", exc_info=True)
            return None
        if plan is None:
            return None
        made.append(plan)
        return sum_of_main(state), offered.total

    found = ranks.collect("checking the plan of the loaded checkpoint", check)
    sums = [each for each in found if each is not None]
    if len(sums) < ranks.size or not add_up(sums):
        return None
    if ranks.is_first:
        logger.info("the plan of the checkpoint that was loaded is used again")
    return made[0]


def _offered_plan(
    state: Sequence[Any], offer: Offer, rank: int, writers: int, job: str, whole: StoredTable | None
) -> Plan | None:
    """This rank's part of the offered plan; None where that does not say the same of what it writes."""
    places = np.unique(np.array(offer.places, np.int64))
    if len(places) != len(offer.places) or (len(places) and int(places[-1]) >= len(state)):
        return None
    plan = _own_plan(state, places, rank, writers, job, whole)
    where: dict[tuple[str, torch.Size | None], tuple[str, int]] = {}
    for file in plan.files:
        for item, (place,) in file.objects:
            where[item.index.fqn, item.index.offset] = file.name, place
        for item, place in file.tensors:
            where[item.index.fqn, item.index.offset] = file.name, place
    rows = ((*where[index], row_of(state[where[index][1]])) for index in plan.numbers)
    return plan if content_of(rows) == offer.content else None


def _own_plan(state: Sequence[Any], places: Ints, rank: int, writers: int, job: str, whole: StoredTable | None) -> Plan:
    """This rank's part, from the places of what it writes."""
    ordered = in_plan_order(places.tolist(), [_key(state[place]) for place in places.tolist()])
    items = [_write_item(state[place]) for place in ordered]
    objects = [item.type is WriteItemType.BYTE_IO for item in items]
    sizes = [0 if is_object else _bytes(item) for item, is_object in zip(items, objects, strict=True)]
    files = tuple(
        PlannedFile(
            name,
            tuple((items[number], (ordered[number],)) for number in numbers if objects[number]),
            tuple((items[number], ordered[number]) for number in numbers if not objects[number]),
        )
        for name, numbers in files_of_rank(rank, sizes, objects, writers)
    )
    names = {(item.index.fqn, item.index.offset): number for number, item in enumerate(items)}
    if len(names) != len(items):
        raise CheckpointSaveError("two shards of one tensor begin at the same place")
    return Plan(job, files, names, whole)


def _key(item: Any) -> str:
    return str(item.unique_key if isinstance(item, ShardedObject) else item.key)


def _write_item(item: Any) -> WriteItem:
    """As megatron-core makes it."""
    if isinstance(item, ShardedObject):
        return WriteItem(MetadataIndex(item.unique_key), WriteItemType.BYTE_IO)
    offset = torch.Size(item.global_offset)
    shape = torch.Size((1,) * item.prepend_axis_num + tuple(item.local_shape))
    properties = TensorProperties(item.data.dtype, item.data.layout, False, torch.contiguous_format)
    data = TensorWriteData(ChunkStorageMetadata(offset, shape), properties, torch.Size(item.global_shape))
    return WriteItem(MetadataIndex(item.key, offset), WriteItemType.SHARD, tensor_data=data)


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None  # noqa: S101  (of tensors only)
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
