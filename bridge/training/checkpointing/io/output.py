"""Writing a file block by block while the next block is made. Standard library only.

The blocks are large and lie at multiples of their size, in the file and as a rule in memory, so that storage can be
asked to take them without a copy in the page cache (`O_DIRECT`). Where it does not do that, they are written in the
usual way, and the kernel is told at once to begin with storing them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import threading
from collections.abc import Callable

BLOCK = 4 << 20
"""Bytes of a block."""
THREADS = 2
"""Blocks of a file that are written at the same time."""
DIRECT_BYTES = 64 << 20
"""Files of at least so many bytes bypass the page cache, where that is possible."""

_PAGE = 4096
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_libc = ctypes.CDLL(None, use_errno=True)


class FileOutput:
    """A file that is being written. Blocks are handed over in any order; those handed over stay as they are.

    Leaving the context without `finish` closes the file as it is.
    """

    def __init__(self, name: str, size: int, directory: int | None = None, threads: int = THREADS) -> None:
        """Begin the file anew. One of that name is removed, so what others still write to that does not get into it.

        Args:
            name: its path, or with `directory` its name there.
            size: bytes that it is going to have.
            directory: a descriptor of the directory that it is in.
            threads: that write.

        Raises:
            OSError: it cannot be made, or there is no room for it.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptors = [os.open(name, flags, 0o666, dir_fd=directory)]
        self._direct: int | None = None
        self._error: BaseException | None = None
        self._blocks: queue.SimpleQueue[tuple[memoryview, int, Callable[[], None] | None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            _reserve(self._descriptors[0], size)
            if size >= DIRECT_BYTES and hasattr(os, "O_DIRECT"):
                with contextlib.suppress(OSError):
                    self._direct = os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, dir_fd=directory)
                    self._descriptors.append(self._direct)
            # One block needs nobody who writes it meanwhile.
            for _ in range(threads if size > BLOCK else 0):
                thread = threading.Thread(target=self._work, name="writer of a checkpoint's file", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def write(self, block: memoryview, at: int, written: Callable[[], None] | None = None) -> None:
        """Hand over a block.

        Args:
            block: bytes, which may be changed again only when they have been written.
            at: where they belong in the file.
            written: called, in any thread, when they have been written or never will be.

        Raises:
            OSError: this block, or one before it, could not be written.
        """
        if self._error is not None:
            if written is not None:
                written()
            raise self._error
        if self._threads:
            self._blocks.put((block, at, written))
        else:
            self._put(block, at)
            if written is not None:
                written()

    def finish(self) -> None:
        """Wait for all blocks, and for storage to have them.

        Raises:
            OSError: storage does not take them.
        """
        self._stop()
        if self._error is not None:
            raise self._error
        os.fsync(self._descriptors[0])
        self.close()

    def close(self) -> None:
        """Close the file; blocks that are not written yet are dropped."""
        if self._threads and self._error is None:
            self._error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        self._stop()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> FileOutput:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _stop(self) -> None:
        for _ in self._threads:
            self._blocks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (task := self._blocks.get()) is not None:
            block, at, written = task
            try:
                if self._error is None:
                    self._put(block, at)
            except BaseException as error:
                self._error = self._error or error
            finally:
                if written is not None:
                    written()

    def _put(self, block: memoryview, at: int) -> None:
        direct = self._direct
        if direct is not None and not (at % _PAGE or len(block) % _PAGE or _address(block) % _PAGE):
            try:
                _write_all(direct, block, at)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = None  # closed with the others
        _write_all(self._descriptors[0], block, at)
        if self._threads and hasattr(_libc, "sync_file_range"):
            place, length = ctypes.c_longlong(at), ctypes.c_longlong(len(block))
            # A hint: that storage refuses is told by the sync at the end.
            _libc.sync_file_range(self._descriptors[0], place, length, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def _write_all(descriptor: int, block: memoryview, at: int) -> None:
    done = 0
    while done < len(block):
        wrote = os.pwrite(descriptor, block[done:], at + done)
        if wrote <= 0:
            raise OSError(errno.EIO, f"{done} of {len(block)} bytes could be written")
        done += wrote


def _address(block: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(block)) if not block.readonly and len(block) else 1


def _reserve(descriptor: int, size: int) -> None:
    """Ask for room for the whole file at once: it lies together, and a full disk is noticed before anything is copied.

    The system's own call: the C library would write to every page where the file system cannot do that.
    """
    if size == 0 or not hasattr(_libc, "fallocate"):
        return
    while _libc.fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
        return
