"""The trainer's side of the writer process: one for each rank, started once, and the memory that it writes from.

A save copies its files into that memory, which is all that training waits for, and tells the process. What comes back
is a record for each file. A process that dies, or does nothing for too long, fails the save that it was busy with, and
the next save has another one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from bridge.training.checkpointing.background import KILL_SECONDS, how_it_ended, seconds_until
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io.host_image import HostImage, size_of
from bridge.training.checkpointing.io.image import FileImage
from bridge.training.checkpointing.io.writer_process import CLOSING, LEAVE, READY, SETTLED, receive, send
from bridge.training.checkpointing.liveness import LOOK_SECONDS, Watch

T = TypeVar("T")
logger = logging.getLogger(__name__)

BACKGROUND_WRITER = "background_writer"
"""Key of the checkpointing context: this run's `BackgroundWriter`."""

START = """
import json, sys, types
path, root, descriptor, parent = json.loads(sys.argv[1])
sys.path[:] = path
name = ""
for part in ("bridge", "training", "checkpointing", "io"):
    name, root = (name + "." if name else "") + part, root + "/" + part
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [root]
from bridge.training.checkpointing.io.writer_process import main
main(descriptor, parent)
"""
"""What the process runs: the packages that `writer_process` is in are only names to it."""

_ROOT = Path(__file__).parents[4]

_START_SECONDS = 60.0
"""For which a new process is waited for. Where its files come from far, it takes its time."""
_STARTS = 2
"""Failed starts in a row after which no other is tried."""


@dataclass(frozen=True)
class Files:
    """What one save writes on this rank."""

    images: Sequence[FileImage]
    small: Sequence[tuple[str, bytes]]
    """Other files by name."""
    directory: Path
    """That exists, and that only this save uses."""
    checksum: str
    """The kind of the manifest's checksums."""
    bequest: tuple[str, bytes] | None = None
    """The name and contents of what the process leaves in the directory, behind a line that says which files it has
    written, when this process has died before the save was settled. None: the save then ends with this process."""


@dataclass(frozen=True)
class Patience:
    """What is borne before a save has failed."""

    stall_seconds: float = math.inf
    """Without progress, after which the process is ended."""
    storage_seconds: float = 0.0
    """The same where it waits for storage all that time, if it is longer."""
    waits: Sequence[float] = ()
    """Seconds before each further try when storage has failed."""
    lasting: Sequence[int] = ()
    """Numbers of the operating system's errors that no further try helps against."""


class BackgroundWriter:
    """A rank's writer process and its memory. Both are there from the first save on, or from when they are warmed.

    They go when it is closed, or when nobody has it any more.
    """

    def __init__(self) -> None:
        self._image = HostImage()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._writing: Writing[Any] | None = None
        self._owner = os.getpid()
        self._failed_starts = 0
        self._is_ready = False
        self._end: weakref.finalize[..., BackgroundWriter] | None = None
        self._warming: threading.Thread | None = None

    @property
    def memory(self) -> int:
        """Bytes of host memory that are kept for snapshots."""
        return self._image.size

    @property
    def is_ready(self) -> bool:
        """Whether there are a process and memory since an earlier save, so that one as large can count on both."""
        return self._is_ready and self._process is not None and self._process.poll() is None and self._image.size > 0

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return None if self._process is None else self._process.pid

    def warm(self, size: int = 0, wait: bool = False) -> None:
        """Have a process, and memory for a snapshot of so many bytes, before a save needs them.

        The process comes up and a thread asks for the memory while this one goes on. Trouble is left to the first save.

        Args:
            size: about as many bytes as a save will take, if that is known: what is too much is kept all the same.
            wait: return when both are ready.
        """
        self._finish_warming()
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there can be no more threads
            process, connection = self._start()
            if size and self._writing is None and self._image.has_room(size):
                warming = threading.Thread(target=_reserve, args=(self._image, size, _device()), daemon=True)
                warming.start()
                self._warming = warming
            if wait:
                self._finish_warming()
                self._wait_until_ready(process, connection)

    def write(
        self,
        files: Files,
        name: str,
        patience: Patience,
        then: Callable[[list[FileRecord], float], T],
        done: int | None = None,
    ) -> Writing[T] | None:
        """Take a snapshot of a save's files and have it written. When this returns, training may go on.

        Args:
            files: what is written.
            name: what messages call the writer.
            patience: what is borne before the save has failed.
            then: makes the result of the files' records and the seconds that the writing took.
            done: a descriptor that the process closes when the writing has ended.

        Returns:
            The writing, or None where that cannot be done here: the memory is in use or does not suffice, or there
            can be no such process. Nothing has happened then.
        """
        if (self._writing is not None and not self._writing.poll()) or self._owner != os.getpid():
            return None
        if self._failed_starts >= _STARTS or not sys.executable or not hasattr(os, "memfd_create"):
            return None
        self._finish_warming()
        small = files.small if files.bequest is None else [*files.small, files.bequest]
        size = size_of(files.images, small)
        if not self._image.has_room(size):
            logger.warning("there is not enough memory for a snapshot of %.1f MiB", size / 2**20)
            self._forget()  # nobody counts on it any more
            return None
        try:
            process, connection = self._start()
            entries = self._image.hold(files.images, small)  # while the process comes up
            self._wait_until_ready(process, connection)
            self._send(connection, entries, files, patience, done)
        except OSError as error:
            logger.warning("%s cannot be had: %s", name, error)
            self._forget()
            return None
        self._writing = Writing(self, process, connection, name, patience, then, files.bequest is not None)
        return self._writing

    def close(self) -> None:
        """Let the process end and give the memory back. What is being written is finished."""
        self._finish_warming()
        self._forget()
        self._image.release()

    def replace(self, process: subprocess.Popen[bytes], with_memory: bool) -> None:
        """Have another process for the next save, if this is the present one.

        Args:
            process: that is gone, or of which nobody knows what it still does.
            with_memory: have other memory too.
        """
        if process is self._process:
            self._forget()
            if with_memory:
                self._image.release()

    def _finish_warming(self) -> None:
        """Nothing else may touch the memory while the thread makes it ready."""
        thread, self._warming = self._warming, None
        if thread is not None and self._owner == os.getpid():
            thread.join()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._process is not None and self._connection is not None and self._process.poll() is None:
            return self._process, self._connection
        self._forget()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        ours, theirs = socket.socketpair()
        ours.settimeout(KILL_SECONDS)  # nobody waits for ever for the rest of a packet
        with theirs:
            told = json.dumps([path, str(_ROOT), theirs.fileno(), os.getpid()])
            try:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", START, told],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except BaseException:
                ours.close()
                raise
        self._connection, self._is_ready = ours, False
        self._end = weakref.finalize(self, _let_end, process, ours, self._owner)
        self._end.atexit = False
        return process, ours

    def _wait_until_ready(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        """Wait for the sign that a process has come up.

        Raises:
            OSError: it has not.
        """
        if self._is_ready:
            return
        self._failed_starts += 1
        waiting = select.poll()
        waiting.register(connection, select.POLLIN)
        deadline = time.monotonic() + _START_SECONDS
        # Another child of this process may keep the other end of the connection open.
        while not waiting.poll(1000 * LOOK_SECONDS):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise OSError("the process has not come up")
        try:
            if receive(connection)[0] != READY:
                raise OSError("the process has come up with something else")
        except (EOFError, ValueError) as error:
            raise OSError("the process has not come up") from error
        self._is_ready, self._failed_starts = True, 0

    def _send(
        self,
        connection: socket.socket,
        entries: list[dict[str, Any]],
        files: Files,
        patience: Patience,
        done: int | None,
    ) -> None:
        request = {
            "memory": self._image.generation,
            "size": self._image.size,
            "files": entries[: len(files.images) + len(files.small)],
            "bequest": None if files.bequest is None else entries[-1],
            "directory": str(files.directory),
            "checksum": files.checksum,
            "waits": list(patience.waits),
            "lasting": list(patience.lasting),
        }
        directory = os.open(files.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            descriptors = (self._image.descriptor, directory)
            send(connection, request, descriptors if done is None else (*descriptors, done))
        finally:
            os.close(directory)

    def _forget(self) -> None:
        writing, end = self._writing, self._end
        self._process = self._connection = self._writing = self._end = None
        if end is None:
            return
        if writing is not None and not writing.is_over:
            writing.finish_with(end)  # its reply is still to come
        else:
            end()


def _device() -> int | None:
    """The device whose values are copied into the memory; None where they are in memory themselves."""
    return torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _reserve(image: HostImage, size: int, device: int | None) -> None:
    """Get memory ready, in a thread: one of those begins with the first device, whatever its process uses."""
    with contextlib.suppress(OSError):
        if device is not None:
            torch.cuda.set_device(device)
        image.reserve(size)


def _let_end(process: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> None:
    """Tell a process that there is nothing more to do. One that does not end at once does so by itself."""
    if owner == os.getpid():
        _tell(connection, CLOSING)
    connection.close()
    if owner == os.getpid():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)


def _tell(connection: socket.socket, packet: Any) -> None:
    with contextlib.suppress(OSError):  # there is nobody to be told
        send(connection, packet)


class Writing(Generic[T]):
    """One save that is being written."""

    def __init__(
        self,
        writer: BackgroundWriter,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        name: str,
        patience: Patience,
        then: Callable[[list[FileRecord], float], T],
        can_be_left: bool = False,
    ) -> None:
        self.name = name
        self.pid = process.pid
        self._can_be_left = can_be_left
        self.is_left = False
        """Whether it was left to the next start."""
        self._writer = writer
        self._process = process
        self._connection = connection
        self._then = then
        self._patience = patience
        self._watch = self._new_watch()
        self._tries = 1
        self._patient_until = 0.0
        self._outcome: T | None = None
        self._error: CheckpointSaveError | None = None
        self._done = False
        self._end: Callable[[], Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether it was found to have ended."""
        return self._done

    def finish_with(self, end: Callable[[], Any]) -> None:
        """Have the process end behind this writing.

        Args:
            end: closes the connection. It is called when the writing has ended.
        """
        _tell(self._connection, CLOSING)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        self._end = end

    def settle(self) -> None:
        """Tell the process that the save is published, or given up: it has nothing to leave any more."""
        if self._can_be_left:
            _tell(self._connection, SETTLED)
            self._can_be_left = False

    def leave(self) -> bool:
        """Leave the save to the next start, whenever its files are written. False where that cannot be."""
        if not self._can_be_left or self._error is not None or self._process.poll() is not None:
            return False
        _tell(self._connection, LEAVE)
        self._can_be_left, self.is_left = False, True
        return True

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether it has ended; waits up to `timeout` seconds (None: as long as it takes).

        A process that has done nothing for so long that it counts as stuck is ended, and the result is an error.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        waiting = select.poll()  # `select.select` takes no descriptor above 1023
        if not self._done:
            waiting.register(self._connection, select.POLLIN)
        while not self._done:
            left = deadline - time.monotonic()
            if waiting.poll(1000 * max(0.0, min(left, LOOK_SECONDS))):
                self._hear()
            elif self._process.poll() is not None and not waiting.poll(0):
                self._died()  # another child of this process keeps the other end of the connection open
            elif time.monotonic() > self._patient_until and (problem := self._watch.problem()) is not None:
                self._give_up(f"the process of {self.name} {problem}, so it was ended")
            elif left <= 0:
                break
        if self._done and self._end is not None:
            self._end()
            self._end = None
        return self._done

    def result(self) -> T:
        """What has come of it; waits for it.

        Raises:
            CheckpointSaveError: a file could not be written, or the process died.
        """
        self.poll(None)
        if self._error is not None:
            raise self._error
        return self._outcome  # type: ignore[return-value]

    def halt(self) -> None:
        """Send the process SIGKILL; `kill` has to follow."""
        if not self._done:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def kill(self, until: float | None = None) -> None:
        """End the process at once; the result is then an error."""
        if not self._done:
            self._give_up(f"the process of {self.name} was killed by SIGKILL", until)

    def _new_watch(self) -> Watch:
        return Watch(self.pid, self.name, self._patience.stall_seconds, self._patience.storage_seconds)

    def _hear(self) -> None:
        try:
            reply, _ = receive(self._connection)
        except (EOFError, OSError, ValueError):
            self._died()
            return
        if "wait" in reply:
            self._tries += 1
            self._watch = self._new_watch()
            self._patient_until = time.monotonic() + reply["wait"]
            logger.warning(
                "%s failed, try %d in %.1f s (checkpoint.save_retries, save_retry_seconds): %s",
                self.name,
                self._tries,
                reply["wait"],
                reply["failed"],
            )
            return
        self._done = True
        if "files" in reply:
            self._outcome = self._then(
                [
                    FileRecord(name, size, checksum, reply["checksum"], sample)
                    for name, size, checksum, sample in reply["files"]
                ],
                reply["seconds"],
            )
            return
        tries = f", in each of {self._tries} tries" if self._tries > 1 else ""
        self._error = CheckpointSaveError(f"the process of {self.name} failed: {reply['failed']}{tries}")
        self._error.__cause__ = CheckpointSaveError(f"in process {self.pid}:\n{reply['trace']}")
        self._error.__cause__.__cause__ = None if reply["storage"] is None else OSError(*reply["storage"])

    def _died(self) -> None:
        self._done = True
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._writer.replace(self._process, with_memory=True)
            self._error = CheckpointSaveError(f"the process of {self.name} has closed its connection")
            return
        code = self._process.returncode
        self._error = CheckpointSaveError(
            f"the process of {self.name} {how_it_ended(-code if code < 0 else code << 8)}"
        )
        self._writer.replace(self._process, with_memory=False)

    def _give_up(self, reason: str, until: float | None = None) -> None:
        """End the process; one that storage holds, so that no signal reaches it, is left behind with its memory."""
        self.halt()
        self._done = True
        try:
            self._process.wait(seconds_until(until))
            self._writer.replace(self._process, with_memory=False)
        except subprocess.TimeoutExpired:
            logger.error("process %d of %s cannot be ended: storage holds it", self.pid, self.name)
            self._writer.replace(self._process, with_memory=True)
        self._error = CheckpointSaveError(reason)
