"""Writing files of records straight from the tensors' memory.

A file is put together block by block. While one block is filled, with checksums taken of what is still in the
processor's caches, the ones before it are written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing.checksums import new_hasher
from bridge.training.checkpointing.errors import CheckpointSaveError, storage_error
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io.framing import Frame
from bridge.training.checkpointing.io.image import FileImage, TensorPart, in_order
from bridge.training.checkpointing.io.output import BLOCK, THREADS, FileOutput
from bridge.training.checkpointing.io.tails import Spots, complete

_FILES = 4
"""That are written at the same time; each takes `THREADS` + 1 blocks of memory."""


def write_images(images: list[FileImage], directory: Path, kind: str) -> list[FileRecord]:
    """Write and sync files, several at the same time.

    Args:
        images: the files.
        directory: that they go into.
        kind: of the manifest's checksum.

    Returns:
        Their records, with checksums of what was meant to be written.

    Raises:
        CheckpointSaveError: one could not be written; the cause is the operating system's error, if there is one.
    """
    if len(images) <= 1:
        return [write_image(image, directory, kind) for image in images]
    with ThreadPoolExecutor(min(len(images), _FILES, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda image: write_image(image, directory, kind), images))


def write_image(image: FileImage, directory: Path, kind: str) -> FileRecord:
    """Write and sync one file; see `write_images`."""
    path = directory / image.name
    try:
        with FileOutput(str(path), image.size) as output:
            stream = _BlockStream(output, kind)
            for part in image.tensors:
                stream.fill(part.at)
                stream.put_tensor(part)
            for at, data in image.rest:
                stream.fill(at)
                stream.put(data)
            stream.flush()
            output.finish()
        return FileRecord(image.name, stream.position, stream.checksum(), kind).sampled(directory)
    except Exception as error:
        reason = storage_error(error) or error
        raise CheckpointSaveError(f"writing {path} failed: {type(reason).__name__}: {reason}") from error


class _Block:
    """Memory of one block. Its address is a multiple of the page's size."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, BLOCK))
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self.memory))


class _BlockStream:
    """Puts bytes one behind the other into blocks, and hands these over when they are full."""

    def __init__(self, output: FileOutput, kind: str) -> None:
        self._output = output
        self._hasher = new_hasher(kind)
        self._free: queue.SimpleQueue[_Block] = queue.SimpleQueue()
        self._made = 1
        self._block = _Block()
        self._begin = 0
        """Where the present block belongs in the file."""
        self._filled = 0
        """Bytes of it."""

    @property
    def position(self) -> int:
        """Bytes so far."""
        return self._begin + self._filled

    def checksum(self) -> str:
        """Of what has been handed over."""
        return self._hasher.hexdigest()

    def fill(self, at: int) -> None:
        """Append zeros up to a place in the file."""
        missing = at - self._begin - self._filled
        if missing:
            self.put(bytes(missing))

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view, done = memoryview(data), 0
        while done < len(view):
            size = min(len(view) - done, BLOCK - self._filled)
            self._block.memory[self._filled : self._filled + size] = view[done : done + size]
            done += size
            self._advance(size)

    def put_tensor(self, part: TensorPart) -> None:
        """Append a tensor's record."""
        frame, tensor = part.frame, part.tensor
        if frame.length < BLOCK - self._filled and frame.spots is not None and tensor.is_cpu and tensor.is_contiguous():
            self._put_small(frame, frame.spots, tensor.data_ptr())
            return
        self.put(frame.head)
        crc = 0
        for piece in in_order(tensor):
            crc = self._put_memory(piece.data_ptr(), piece.numel() * piece.element_size(), crc)
        if frame.spots is not None and len(frame.tail) <= BLOCK - self._filled:
            at, memory = self._filled, self._block.memory
            memory[at : at + len(frame.tail)] = frame.tail
            complete(memory, at, crc, frame.spots)
            self._advance(len(frame.tail))
            return
        tail = bytearray(frame.tail)
        if frame.spots is not None:
            complete(tail, 0, crc, frame.spots)
        self.put(tail)

    def _put_small(self, frame: Frame, spots: Spots, address: int) -> None:
        """Append a record that leaves room in the present block: most records of states with many small tensors."""
        at, memory = self._filled, self._block.memory
        payload = at + len(frame.head)
        tail = payload + frame.size
        self._filled = at + frame.length
        memory[at:payload] = frame.head
        ctypes.memmove(self._block.address + payload, address, frame.size)
        memory[tail : self._filled] = frame.tail
        complete(memory, tail, crc32(memory[payload:tail]), spots)

    def _put_memory(self, address: int, size: int, crc: int) -> int:
        """Append what lies at an address, and go on with a CRC of it."""
        while size:
            at = self._filled
            length = min(size, BLOCK - at)
            ctypes.memmove(self._block.address + at, address, length)
            crc = crc32(self._block.memory[at : at + length], crc)
            address += length
            size -= length
            self._advance(length)
        return crc

    def _advance(self, size: int) -> None:
        self._filled += size
        if self._filled == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Hand over what is in the present block."""
        block, size = self._block, self._filled
        if not size:
            return
        self._hasher.update(block.memory[:size])
        self._output.write(block.memory[:size], self._begin, lambda: self._free.put(block))
        self._begin += size
        self._filled = 0
        if self._free.empty() and self._made <= THREADS:
            self._made += 1
            self._block = _Block()
        else:
            self._block = self._free.get()
