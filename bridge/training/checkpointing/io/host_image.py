"""A snapshot of a rank's files in shared memory, as they are going to be on disk.

The memory is an anonymous file that the writer process maps too. It is made once, its pages are asked for before they
are used, and it serves one save after the other: copying into memory that was touched before is many times faster. What
surrounds the tensors' bytes is there from the save before, unless the structure has changed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from bridge.training.checkpointing.io.framing import Frame
from bridge.training.checkpointing.io.image import FileImage, TensorPart
from bridge.training.checkpointing.io.writer_process import ROW

_PAGE = 4096
_GRANULE = 2 << 20
_BY_TORCH = 1 << 20
"""Bytes from which on torch copies, in several threads where it has them."""
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # <asm-generic/mman-common.h>
_NOTHING = mmap.mmap(-1, 1)
_SPARE = 256 << 20
"""Bytes of the machine's memory that are left alone, for each rank."""
_SLICE = 32 << 20
"""Bytes made ready at a time. Whoever forks or maps memory meanwhile in the same process waits for one of these."""
_UNKNOWN = {errno.EINVAL, errno.ENOSYS}


class HostImage:
    """Memory for one snapshot at a time. It grows when a snapshot needs more, and never shrinks.

    It is given back with `release`, or when nobody has this object any more.
    """

    def __init__(self) -> None:
        self.descriptor = -1
        self.size = 0
        """Bytes."""
        self.generation = 0
        """Counts the pieces of memory that this has been. One that has grown is still the same."""
        self._map = _NOTHING
        self._address = 0
        self._give_back: weakref.finalize[..., HostImage] | None = None
        self._framed: list[tuple[int, int, list[tuple[int, Frame]]]] = []
        """What surrounds the tensors' bytes at present: for each file its place, that of its rows, and the records."""

    def has_room(self, size: int) -> bool:
        """Whether it is as large, or the machine has memory enough for every rank on it to make its own so."""
        if size <= self.size:
            return True
        # Imported where it is needed: the package of the tiers needs this one.
        from bridge.training.checkpointing.tiers.memory.host_memory import available_bytes, cgroup_bytes_left

        limits = [available_bytes(), cgroup_bytes_left()]
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # as torchrun has it
        share = min(limit for limit in limits if limit is not None) // max(1, int(ranks) if ranks.isdigit() else 1)
        return size - self.size + _SPARE <= share

    def reserve(self, size: int) -> None:
        """Make it large enough, and have its pages ready. What is in it is lost if it grows.

        It grows in place, so that what the writer process still has of it is no second copy.

        Raises:
            OSError: there is not so much memory. Then there is none at all any more.
        """
        if size <= self.size:
            return
        size = -(-size // _GRANULE) * _GRANULE
        kept = os.dup(self.descriptor) if self.descriptor >= 0 else -1
        self.release()
        if kept < 0:
            kept = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
            self.generation += 1
        try:
            os.ftruncate(kept, size)
            memory = mmap.mmap(kept, size)
            address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
            for advice in (_MADV_HUGEPAGE, mmap.MADV_DONTFORK):
                _advise(address, size, advice)
            for at in range(0, size, _SLICE):
                _advise(address + at, min(_SLICE, size - at), _MADV_POPULATE_WRITE)
        except BaseException:
            os.close(kept)
            raise
        self.descriptor, self.size, self._map, self._address = kept, size, memory, address
        registered = _register(self._address, size)
        self._give_back = weakref.finalize(self, _let_go, kept, memory, registered, os.getpid())
        self._give_back.atexit = False

    def release(self) -> None:
        """Give the memory back, as soon as no writer has it."""
        self.descriptor, self.size, self._map, self._address, self._framed = -1, 0, _NOTHING, 0, []
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def hold(self, images: Sequence[FileImage], small: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """Take a snapshot.

        Args:
            images: files of records.
            small: other files.

        Returns:
            For each file what the writer process has to know: its name, place and size, and the place and number of
            the rows that describe its tensors.

        Raises:
            OSError: there is not enough memory.
        """
        # The rows come first: objects at the end of a file, whose lengths change, then move none of them.
        rows, at = [], 0
        for image in images:
            rows.append(at)
            at += len(image.tensors) * ROW.size
        places, at = [], _page_after(at)
        for image in images:
            places.append(at)
            at = _page_after(at + image.size)
        files = []
        for place, image, row in zip(places, images, rows, strict=True):
            files.append(_entry(image.name, place, image.size, row, len(image.tensors)))
        for name, data in small:
            files.append(_entry(name, at, len(data), 0, 0))
            at += len(data)
        self.reserve(at)
        self._frame(list(zip(places, images, rows, strict=True)))
        for place, image in zip(places, images, strict=True):
            self._copy(place, image)
        for entry, (_, data) in zip(files[len(images) :], small, strict=True):
            self._map[entry["at"] : entry["at"] + len(data)] = data
        return files

    def _frame(self, files: list[tuple[int, FileImage, int]]) -> None:
        """Put around the tensors' places what belongs there, if it is not there yet."""
        framed = [(place, row, [(part.at, part.frame) for part in image.tensors]) for place, image, row in files]
        if framed == self._framed:
            return
        self._framed = []
        memory = memoryview(self._map)
        for place, image, row in files:
            end = place
            for number, part in enumerate(image.tensors):
                at, frame = place + part.at, part.frame
                payload = at + len(frame.head)
                tail = payload + frame.size
                memory[end:at] = bytes(at - end)
                memory[at:payload] = frame.head
                end = tail + len(frame.tail)
                memory[tail:end] = frame.tail
                if frame.spots is not None:
                    ROW.pack_into(memory, row + number * ROW.size, payload - place, frame.size, *frame.spots)
                else:
                    ROW.pack_into(memory, row + number * ROW.size, payload - place, 0, *(0,) * 7)
        self._framed = framed

    def _copy(self, place: int, image: FileImage) -> None:
        streams: dict[torch.device, Any] = {}
        end = place
        for part in image.tensors:
            frame, tensor = part.frame, part.tensor
            at = place + part.at + len(frame.head)
            end = place + part.at + frame.length
            if not frame.size:
                continue
            if frame.size < _BY_TORCH and tensor.is_cpu and tensor.is_contiguous():
                ctypes.memmove(self._address + at, tensor.data_ptr(), frame.size)
            else:
                self._copy_by_torch(at, part, streams)
        for relative, data in image.rest:
            at = place + relative
            self._map[end:at] = bytes(at - end)
            end = at + len(data)
            self._map[at:end] = data
        for stream in streams.values():
            stream.synchronize()

    def _copy_by_torch(self, at: int, part: TensorPart, streams: dict[torch.device, Any]) -> None:
        tensor = part.tensor.detach()
        place = torch.frombuffer(self._map, dtype=torch.uint8, count=part.frame.size, offset=at)
        target = place.view(tensor.dtype).view(tensor.shape)
        if tensor.device.type != "cuda":
            target.copy_(tensor)
            return
        stream = streams.get(tensor.device)
        if stream is None:
            stream = streams[tensor.device] = torch.cuda.Stream(tensor.device)
            # What the training stream still does to the tensors comes first.
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            target.copy_(tensor, non_blocking=True)


def size_of(images: Sequence[FileImage], small: Sequence[tuple[str, bytes]]) -> int:
    """About how many bytes a snapshot takes."""
    rows = sum(len(image.tensors) for image in images) * ROW.size
    records = sum(_page_after(image.size) for image in images)
    return _page_after(rows) + records + sum(len(data) for _, data in small)


def _advise(address: int, size: int, advice: int) -> None:
    """Tell the kernel something about memory. One that does not know it makes the pages one by one, when they are used.

    Other threads go on while it makes pages: `mmap.madvise` would keep the interpreter for itself.

    Raises:
        OSError: there is not so much memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0:
        return
    number = ctypes.get_errno()
    if advice == _MADV_POPULATE_WRITE and number not in _UNKNOWN:
        raise OSError(number, os.strerror(number))


def _register(address: int, size: int) -> int | None:
    """Have a device copy into memory without anybody who waits for that; None where that cannot be."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    cudart: Any = torch.cuda.cudart()
    return address if int(cudart.cudaHostRegister(address, size, 0)) == 0 else None


def _let_go(descriptor: int, memory: mmap.mmap, registered: int | None, owner: int) -> None:
    """Give memory back; `memory` is mapped until then."""
    if registered is not None and os.getpid() == owner:
        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(registered)
    os.close(descriptor)


def _page_after(at: int) -> int:
    return -(-at // _PAGE) * _PAGE


def _entry(name: str, at: int, size: int, rows_at: int, rows: int) -> dict[str, Any]:
    return {"name": name, "at": at, "size": size, "rows_at": rows_at, "rows": rows}
