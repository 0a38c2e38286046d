"""The process that writes a rank's checkpoints: files from shared memory, one save after the other.

It is started with stand-ins for the packages that this module is in (`background_writer.START`), whose own code would
import torch, and imports nothing else that does. Requests and replies are packets of JSON, each behind its length; the
first brings the descriptors of the memory and of the directory with it. Files are opened relative to the directory that
the trainer had, so what is written lands in no other, whatever its name is by then.

When its trainer dies, what is complete in the memory is still written, and a file beside it (`Bequest`) says so: the
next start makes a checkpoint of it if the writers of all ranks have left one. A save that cannot be left to anybody
ends before the next block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from threading import Thread
from typing import Any

from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.io.bequest import Bequest
from bridge.training.checkpointing.io.output import BLOCK, FileOutput
from bridge.training.checkpointing.io.tails import SPOTS, Spots, complete

ROW = struct.Struct(f"<QQ{SPOTS.format[1:]}")
"""A tensor in a file: where its bytes begin, how many they are, and the `Spots` of the tail behind them."""

READY = {"ready": True}
"""The first packet of the process: it has come up."""

SETTLED = {"then": "settled"}
"""A packet that asks for nothing: the trainer has published the last save, or given it up."""
LEAVE = {"then": "leave"}
"""Likewise: the trainer will do neither, so it is left to the next start."""
CLOSING = {"then": "closing"}
"""Likewise: the trainer needs this process no more, and publishes the last save without it."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_LENGTH = struct.Struct("<Q")
_DESCRIPTORS = 3
_LOOK_SECONDS = 0.1
_SHOW_SECONDS = 1.0
_STUCK_SECONDS = 300.0
"""Without progress, after which nobody is to wait for this process any more."""
_FOR_THE_JOB = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def send(connection: socket.socket, content: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Send one packet."""
    data = json.dumps(content).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(data))], descriptors)
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Wait for a packet and what came with it.

    Raises:
        EOFError: the other end is closed.
    """
    start, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    (length,) = _LENGTH.unpack(start + _received(connection, _LENGTH.size - len(start)))
    return json.loads(_received(connection, length)), descriptors


def _received(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError("the other end is closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main(descriptor: int, parent: int) -> None:
    """Serve the process that has the other end of a socket."""
    for number in _FOR_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        # Held by a signal, it would stay for ever.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    connection = socket.socket(fileno=descriptor)
    trainer = _Trainer(parent)
    Thread(target=trainer.watch, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, ValueError):
        _serve_all(connection, trainer)
    trainer.leaves()


def _serve_all(connection: socket.socket, trainer: _Trainer) -> None:
    """Write one save after the other.

    Raises:
        EOFError, OSError, ValueError: there is no trainer any more.
    """
    memory = _Memory()
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    send(connection, READY)
    while True:
        # Other children of the trainer may keep its end of the connection open.
        while not waiting.poll(1000 * _LOOK_SECONDS):
            if trainer.is_gone:
                return
        request, descriptors = receive(connection)
        try:
            if "then" not in request:
                _serve(connection, request, descriptors, memory, trainer)
            elif request == LEAVE:
                trainer.leaves()
            elif request == SETTLED or not trainer.is_gone:
                trainer.settles()
            if request == CLOSING:
                return
        finally:
            for one in descriptors:
                os.close(one)


class _Memory:
    """The memory that files are written from."""

    def __init__(self) -> None:
        self._number = -1
        self._map: mmap.mmap | None = None

    def of(self, number: int, size: int, descriptor: int) -> memoryview:
        """The memory of that number, mapped; an earlier one is let go."""
        if number != self._number or self._map is None or len(self._map) != size:
            self._map = mmap.mmap(descriptor, size)
            self._number = number
        return memoryview(self._map)


class _Trainer:
    """The process that this one writes for, and what is to be left where it dies."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._bequest: Bequest | None = None
        self._looked = 0.0
        """When the writing last went on, by the monotonic clock."""

    @property
    def is_gone(self) -> bool:
        return os.getppid() != self._pid

    def begins(self, bequest: Bequest | None) -> None:
        """A save begins, so the one before is settled."""
        self.settles()
        self._looked = time.monotonic()
        self._bequest = bequest

    def settles(self) -> None:
        """The last save needs nobody any more."""
        bequest, self._bequest = self._bequest, None
        if bequest is not None:
            bequest.close()

    def leaves(self) -> None:
        """Leave the last save to the next start, if it was written to its end and is not settled."""
        if self._bequest is not None:
            self._bequest.leave()
        self.settles()

    def look(self) -> None:
        """The writing goes on. It ends here, with this process, if the trainer is gone and has left nothing."""
        self._looked = time.monotonic()
        if self.is_gone and self._bequest is None:
            os._exit(1)

    def watch(self) -> None:
        """Once the trainer is gone, show that what it has left is being written, as long as storage takes it."""
        while not self.is_gone:
            time.sleep(_LOOK_SECONDS)
        _be_silent()
        while True:
            bequest = self._bequest
            if bequest is not None and time.monotonic() - self._looked < _STUCK_SECONDS:
                bequest.show_life()
            time.sleep(_SHOW_SECONDS)


def _be_silent() -> None:
    """Nobody who waits for the end of the trainer's output shall wait for this process."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _serve(
    connection: socket.socket, request: dict[str, Any], descriptors: list[int], memory: _Memory, trainer: _Trainer
) -> None:
    waits: list[float] = request["waits"]
    begun = time.monotonic()
    bequest = None if request["bequest"] is None else Bequest(request["bequest"]["name"], descriptors[1])
    trainer.begins(bequest)
    while True:
        try:
            view = memory.of(request["memory"], request["size"], descriptors[0])
            files = _write(view, descriptors[1], request, trainer)
        except BaseException as error:
            again = bool(waits) and isinstance(error, OSError) and error.errno not in request["lasting"]
            reply = _told(error, request["directory"])
            if again:
                reply["wait"] = waits.pop(0)
            with contextlib.suppress(OSError) if bequest is not None else contextlib.nullcontext():
                send(connection, reply)  # to a trainer that may be gone, and then it is all the same tried again
            if not again:
                return
            time.sleep(reply["wait"])
            trainer.look()
        else:
            seconds = time.monotonic() - begun
            if bequest is not None:
                at, size = request["bequest"]["at"], request["bequest"]["size"]
                bequest.complete({"files": files, "checksum": request["checksum"]}, bytes(view[at : at + size]))
            send(connection, {"files": files, "checksum": request["checksum"], "seconds": seconds})
            return


def _told(error: BaseException, directory: str) -> dict[str, Any]:
    summary = f"{type(error).__name__}: {error}"
    if isinstance(error, _FileError):
        cause = error.cause
        summary = f"CheckpointSaveError: writing {directory}/{error.filename} failed: {type(cause).__name__}: {cause}"
        error = cause
    storage = [error.errno, error.strerror or str(error)] if isinstance(error, OSError) else None
    return {"failed": summary, "trace": traceback.format_exc(), "storage": storage}


class _FileError(OSError):
    """A file that could not be written."""

    def __init__(self, filename: str, cause: OSError) -> None:
        super().__init__(cause.errno or errno.EIO, cause.strerror or str(cause), filename)
        self.cause = cause


def _write(
    memory: memoryview, directory: int, request: dict[str, Any], trainer: _Trainer
) -> list[tuple[str, int, str, str]]:
    """Write the files of a save and sync them and their directories; return names, sizes, checksums and samples."""
    kind, written = request["checksum"], []
    trainer.look()
    below = sorted({parent for file in request["files"] for parent in _parents(file["name"])})
    for name in below:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=directory)
    for file in request["files"]:
        name, size = file["name"], file["size"]
        try:
            checksum = _write_file(memory, directory, file, kind, trainer)
            sample = ""
            if size > checksums.SAMPLED_BYTES:
                sample = checksums.sample_of(Path(f"/proc/self/fd/{directory}") / name, kind)
        except OSError as error:
            raise _FileError(name, error) from error
        written.append((name, size, checksum, sample))
    for name in (*reversed(below), "."):
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return written


def _parents(name: str) -> list[str]:
    return [str(parent) for parent in Path(name).parents if str(parent) != "."]


def _write_file(memory: memoryview, directory: int, file: dict[str, Any], kind: str, trainer: _Trainer) -> str:
    """Complete the records of a file and write it; return its checksum."""
    trainer.look()
    view = memory[file["at"] : file["at"] + file["size"]]
    rows = rows_of(memory[file["rows_at"] : file["rows_at"] + file["rows"] * ROW.size], file["rows"], file["size"])
    if len(view) != file["size"]:
        raise ValueError(f"{file['name']} does not lie in the memory as a whole")
    hasher = checksums.new_hasher(kind)
    done = 0

    def hand_over(end: int, output: FileOutput) -> None:
        nonlocal done
        while end - done >= BLOCK or (end == len(view) and done < end):
            trainer.look()
            block = view[done : min(done + BLOCK, end)]
            hasher.update(block)
            output.write(block, done)
            done += len(block)

    with FileOutput(file["name"], len(view), directory) as output:
        for payload, size, spots in rows:
            if not size:  # nothing depends on no bytes
                continue
            crc, end = 0, payload + size
            for at in range(payload, end, BLOCK):
                crc = crc32(view[at : min(at + BLOCK, end)], crc)
                hand_over(min(at + BLOCK, end), output)
            complete(view, end, crc, spots)
        hand_over(len(view), output)
        output.finish()
    return hasher.hexdigest()


def rows_of(memory: memoryview, count: int, size: int) -> list[tuple[int, int, Spots]]:
    """The rows of a file: where each tensor begins, its bytes, and the spots of the tail behind it.

    Args:
        memory: holds them.
        count: how many there are.
        size: bytes of the file.

    Raises:
        ValueError: they do not describe tensors one behind the other in such a file. Nothing is written from them.
    """
    if len(memory) != count * ROW.size:
        raise ValueError(f"{count} rows do not lie in the memory as a whole")
    rows, done = [], 0
    for number, (payload, length, *fields) in enumerate(ROW.iter_unpack(memory)):
        spots = Spots(*fields)
        end = payload + length + (spots.length if length else 0)
        if payload < done or end > size:
            raise ValueError(f"row {number} of {count}, {payload}..{end}, does not fit between {done} and {size}")
        rows.append((payload, length, spots))
        done = end
    return rows
