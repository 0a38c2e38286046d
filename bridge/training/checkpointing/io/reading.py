"""Reading parts of stored tensors into place.

Small records are read many at once, and their tensors copied out of the buffer. Of a large one the ends are read, to
find its tensor, and then the bytes that are needed, in several threads, into the target's own memory where that is
possible.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from bridge.training.checkpointing.io.device import DeviceCopies
from bridge.training.checkpointing.io.fallback import read_with_torch
from bridge.training.checkpointing.io.files import OpenFile, opened, read_each
from bridge.training.checkpointing.io.memory import Scratch, bytes_of, is_plain, memory_at
from bridge.training.checkpointing.io.plan import PAGE, Batch, Want, batches, blocks_of, runs_of, split
from bridge.training.checkpointing.io.record import HEAD, TAIL, Layouts
from bridge.training.checkpointing.readable import ReadableFile

_SMALL = 256 << 10
"""Bytes of a record up to which it is read whole, with its neighbours."""
_SMALL_PART = 16 << 10
"""The same where only a part of the tensor is needed."""
_PIECE = 16 << 20
"""Bytes that one thread reads at a time."""
_BATCH = 1 << 20
"""Bytes of small records that are read at once: what a processor's cache holds until it has been copied on."""
_THREADED = 4 << 20
"""Bytes from which it pays to start threads."""
_FILES_AT_ONCE = 64
_SHORT = 32 << 10
"""Bytes of a read below which threads hinder one another: each call hands Python's lock to and fro."""
_MANY = 256
"""Such reads, from which that counts."""
_PATIENCE = 0.01
"""Seconds that one thread waits for another's short reads. If they take longer, storage is what is waited for."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How tensors are read."""

    threads: int = 2
    """That read large tensors."""
    memory: int = 64 << 20
    """Bytes of buffers, all threads together."""
    gap: int = PAGE
    """Bytes that are read, though nobody needs them, rather than reading on both sides of them."""
    small: int = _SMALL
    """Bytes of a record up to which it is read whole, with its neighbours."""
    small_part: int = _SMALL_PART
    """The same where only a part of the tensor is needed."""
    batch: int = _BATCH
    """Bytes of small records that are read at once."""
    spread: bool = False
    """Whether small records are read by all threads too: where a read takes long, however little it reads."""


@dataclass
class ReadStats:
    """What a read took."""

    tensors: int = 0
    needed: int = 0
    """Bytes of the parts that were asked for."""
    read: int = 0
    """Bytes of tensors that were read for them."""
    framing: int = 0
    """Bytes read beside tensors: what stands around each in its record."""
    by_torch: int = 0
    """Parts that were left to torch's reader."""


def read_wants(
    wants: Sequence[Want], paths: Mapping[str, Path | ReadableFile], options: ReadOptions | None = None
) -> ReadStats:
    """Read parts of stored tensors into their targets. Local.

    Args:
        wants: the parts, in any order.
        paths: the file that each name in `wants` stands for. Each is a regular file inside the checkpoint.
        options: how; None is the default.

    Returns:
        What was read.

    Raises:
        CheckpointDamagedError: a file ends too early, storage fails, or a record is unreadable.
        UnsafeCheckpointError: a record holds an object that is not allowed.
    """
    by_file: defaultdict[str, list[Want]] = defaultdict(list)
    for want in wants:
        by_file[want.file].append(want)
    names = sorted(by_file)
    with torch.no_grad():
        reading = _Reading(options or ReadOptions(), {want.target.device for want in wants})
        for start in range(0, len(names), _FILES_AT_ONCE):
            some = names[start : start + _FILES_AT_ONCE]
            with opened({name: paths[name] for name in some}) as files:
                reading.read([(files[name], by_file[name]) for name in some])
        return reading.finish(wants)


class _Reading:
    """One call of `read_wants`."""

    def __init__(self, options: ReadOptions, devices: Iterable[torch.device]) -> None:
        self._options = options
        self._threads = max(1, options.threads)
        self._room = max(PAGE, options.memory // (self._threads + 1))
        """Bytes of one buffer."""
        self._layouts = Layouts()
        self._scratch = Scratch()
        self._copies = DeviceCopies(devices)
        self._lock = Lock()
        self._turn = Lock()
        self._takes_turns = True
        self._stats = ReadStats()
        self._unrecognised: list[tuple[Path | ReadableFile, Want]] = []

    def read(self, files: Iterable[tuple[ReadableFile, list[Want]]]) -> None:
        large: list[tuple[ReadableFile, Want]] = []
        small_ones: list[tuple[ReadableFile, list[Want]]] = []
        whole, part = self._options.small, self._options.small_part
        for file, wants in files:
            wants.sort(key=attrgetter("at"))
            small = [want for want in wants if want.length <= (whole if want.box is None else part)]
            if len(small) < len(wants):
                large += [(file, want) for want in wants if want.length > (whole if want.box is None else part)]
            if self._options.spread:
                small_ones += [(file, some) for some in runs_within(small, self._options.batch)]
            else:
                self._read_small(file, small)
        if small_ones:
            with ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint-read") as pool:
                list(pool.map(lambda each: self._read_small(*each), small_ones))
        self._read_large(large)

    def finish(self, wants: Sequence[Want]) -> ReadStats:
        for path, want in self._unrecognised:
            read_with_torch(path, want)
        self._copies.finish()
        # autograd is told, as by any change in place, which writing into memory does not do.
        torch.autograd.graph.increment_version([want.target for want in wants if not want.target.is_inference()])
        stats = self._stats
        stats.tensors, stats.by_torch = len(wants), len(self._unrecognised)
        stats.read += sum(want.payload for _, want in self._unrecognised)
        stats.needed = sum(want.needed for want in wants)
        return stats

    # Small records -------------------------------------------------------------------------------------------------

    def _read_small(self, file: ReadableFile, wants: list[Want]) -> None:
        if not wants:
            return
        longest = max(want.length for want in wants)
        span = max(want.at + want.length for want in wants) - wants[0].at
        buffer = bytearray(max(1, min(span, max(longest, min(self._room, self._options.batch)))))
        whole = memoryview(buffer)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
        for batch in batches(wants, len(buffer), self._options.gap):
            file.read(whole[: batch.length], batch.at)
            self._place(file, batch, buffer, address)

    def _place(self, file: ReadableFile, batch: Batch, buffer: bytearray, address: int) -> None:
        # Millions of tensors pass through here: what is looked up once is not looked up for each.
        find, begin, plain, move = self._layouts.payload, batch.at, is_plain, ctypes.memmove
        held = 0
        for want in batch.wants:
            at, length, dtype, target = want.at - begin, want.length, want.dtype, want.target
            start, size = find(buffer, at, buffer, at + length, length, dtype, want.shape)
            if start < 0:
                self._unrecognised.append((_lasting(file), want))
                continue
            held += size
            if want.box is None and plain(target, dtype):
                move(target.data_ptr(), address + at + start, size)
            else:
                self._take_part(want, memory_at(address + at + start, size))
        self._count(held, batch.length - held)

    def _take_part(self, want: Want, payload: memoryview) -> None:
        """Copy a part of a tensor that is in a buffer."""
        first, lengths = want.box or ((0,) * len(want.shape), want.shape)
        runs = runs_of(want.shape, first, lengths, want.dtype.itemsize)
        with self._sink(want) as sink:
            if runs.length:
                _gather(payload[runs.first : runs.first + runs.extent], runs.length, runs.counts, runs.steps, sink)

    # Large records -------------------------------------------------------------------------------------------------

    def _read_large(self, wants: list[tuple[ReadableFile, Want]]) -> None:
        if sum(want.needed for _, want in wants) < _THREADED or self._threads == 1:
            for file, want in wants:
                for piece in self._pieces(file, want):
                    piece()
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint-read") as pool:
            try:
                # All are found before any is read: a file that is cut short has then changed no tensor.
                located = list(pool.map(lambda pair: list(self._pieces(*pair)), wants))
                for read in [pool.submit(piece) for pieces in located for piece in pieces]:
                    read.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _pieces(self, file: ReadableFile, want: Want) -> Iterator[Callable[[], None]]:
        """What is to be done for one tensor."""
        start = self._find(file, want)
        if start < 0:
            with self._lock:
                self._unrecognised.append((_lasting(file), want))
            return
        begin = want.at + start
        if want.box is None and is_plain(want.target, want.dtype):
            yield from self._pieces_in_place(file, want, begin)
            return
        for part in split(want, min(self._room, _PIECE)):
            yield partial(self._read_part, file, part, begin)

    def _find(self, file: ReadableFile, want: Want) -> int:
        first, last = min(HEAD, want.length), min(TAIL, want.length)
        head, tail = bytearray(first), bytearray(last)
        file.read(memoryview(head), want.at)
        file.read(memoryview(tail), want.at + want.length - last)
        self._count(0, first + last)
        return self._layouts.payload(head, 0, tail, last, want.length, want.dtype, want.shape)[0]

    def _pieces_in_place(self, file: ReadableFile, want: Want, begin: int) -> Iterator[Callable[[], None]]:
        memory = bytes_of(want.target)
        self._count(len(memory), 0)
        for at in range(0, len(memory), _PIECE):
            yield partial(file.read, memory[at : at + _PIECE], begin + at)

    def _read_part(self, file: ReadableFile, want: Want, begin: int) -> None:
        """Read a box of up to one buffer's size."""
        first, lengths = want.box or ((0,) * len(want.shape), want.shape)
        blocks = blocks_of(runs_of(want.shape, first, lengths, want.dtype.itemsize), self._options.gap)
        runs, kept = blocks.runs, want.needed // max(1, len(blocks.starts))
        self._count(len(blocks.starts) * blocks.length, 0)
        with self._sink(want) as sink:
            if not runs.counts:
                with self._turn_for(file, len(blocks.starts), kept):
                    read_each(file, sink, kept, [begin + start for start in blocks.starts])
                return
            with self._scratch.lend(blocks.length) as buffer:
                memory = bytes_of(buffer)
                for index, start in enumerate(blocks.starts):
                    file.read(memory, begin + start)
                    _gather(memory, runs.length, runs.counts, runs.steps, sink[index * kept : (index + 1) * kept])

    @contextmanager
    def _turn_for(self, file: ReadableFile, count: int, length: int) -> Iterator[None]:
        """Let short reads of several threads come one after the other, as long as they are quick."""
        tries = self._takes_turns and isinstance(file, OpenFile) and count >= _MANY and length < _SHORT
        taken = tries and self._turn.acquire(timeout=_PATIENCE)
        if tries and not taken:
            self._takes_turns = False
        try:
            yield
        finally:
            if taken:
                self._turn.release()

    @contextmanager
    def _sink(self, want: Want) -> Iterator[memoryview]:
        """Memory for the values of a part, one after the other; they are in its target when the context ends."""
        target = want.target.detach()
        if is_plain(target, want.dtype):
            yield bytes_of(target)
        elif target.is_cuda:
            with self._copies.staged(target, want.dtype) as buffer:
                yield bytes_of(buffer)
        else:
            with self._scratch.lend(want.needed) as buffer:
                yield bytes_of(buffer)
                target.copy_(buffer.view(want.dtype).view(target.shape))

    def _count(self, read: int, framing: int) -> None:
        with self._lock:
            self._stats.read += read
            self._stats.framing += framing


def runs_within(wants: Iterable[Want], limit: int) -> Iterator[list[Want]]:
    """Divide wants, in the order of their places, into lists that span up to `limit` bytes of the file each."""
    some: list[Want] = []
    for want in wants:
        if some and want.at + want.length - some[0].at > limit:
            yield some
            some = []
        some.append(want)
    if some:
        yield some


def _lasting(file: ReadableFile) -> Path | ReadableFile:
    """What a file can be read from when it has been closed."""
    return file.path if isinstance(file, OpenFile) else file


def _gather(source: memoryview, length: int, counts: tuple[int, ...], steps: tuple[int, ...], sink: memoryview) -> None:
    """Copy runs of `length` bytes, at regular distances, one after the other."""
    runs = as_strided(np.frombuffer(source, np.uint8), (*counts, length), (*steps, 1))
    np.copyto(np.frombuffer(sink, np.uint8).reshape(runs.shape), runs)
