"""The keeper: a small process that holds a rank's snapshots in memory while trainers come and go.

It is started by the path of this file and imports nothing but the standard library, so it takes a few megabytes
beside what it keeps. It never touches that memory: it holds the file descriptors of anonymous files
(`memfd_create`) and hands them to trainers and readers, who map them. What no process refers to is freed by the
kernel, so nothing is left behind however the processes end.

A keeper is found by the name of its socket, `\\0bridge-keeper/<user>/<session>/<rank>`. Such an abstract name is no
file: only one process can have it, and it is gone with that process. Requests and replies are one packet of JSON
each, descriptors travelling beside; `keeper.py` is the other end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

PREFIX = "bridge-keeper"
PACKET_BYTES = 1 << 16
GRANULE = 2 << 20
"""Buffers are multiples of this many bytes, so that the next snapshot, a few bytes longer, fits the same buffer."""

_SLACK = 256 << 10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if hasattr(fcntl, "F_SEAL_SEAL") else 0


def address(session: str, rank: int) -> str:
    """Name of the socket of the user's keeper for a rank of a session."""
    return f"\0{PREFIX}/{os.geteuid()}/{session}/{rank}"


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket, as the kernel knows them."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def capacity_for(size: int) -> int:
    """Bytes of the buffer that is made for a snapshot of `size` bytes."""
    return -(-(size + _SLACK) // GRANULE) * GRANULE


class Refused(Exception):
    """A request that is not carried out; the words after the kind travel to the client."""

    def __init__(self, kind: str, **details: Any) -> None:
        super().__init__(kind)
        self.reply = {"error": kind, **details}


class Buffer:
    """A piece of memory and what is in it. No dataclass: that module would double this process's size."""

    STATES = FREE, WRITING, KEPT, RETIRED = "free", "writing", "kept", "retired"

    def __init__(self, number: int, capacity: int, label: str) -> None:
        self.number = number
        self.capacity = capacity
        self.state = Buffer.FREE
        self.owner = self.iteration = -1
        self.payload = self.header = 0
        self.writer: Connection | None = None
        self.readers: set[Connection] = set()
        self.descriptor = os.memfd_create(f"{label}/{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, capacity)
        # Nobody who has the descriptor can change the size any more: it is what is accounted for.
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def describe(self) -> dict[str, Any]:
        names = ("number", "state", "owner", "iteration", "payload", "header", "capacity")
        return {name: getattr(self, name) for name in names}


class Shelf:
    """The buffers, and the rules by which they are made, used again and given up. All together stay below a limit."""

    def __init__(self, limit: int, label: str = PREFIX) -> None:
        self.limit = limit
        self._label = label
        self.buffers: dict[int, Buffer] = {}
        self._made = 0

    def in_state(self, *states: str) -> list[Buffer]:
        return [buffer for buffer in self.buffers.values() if buffer.state in states]

    def bytes_in(self, *states: str) -> int:
        return sum(buffer.capacity for buffer in self.in_state(*states))

    def begin(self, owner: int, iteration: int, size: int, writer: Connection) -> Buffer:
        """A buffer to write a snapshot into: one that was used before, because its memory is there already."""
        for unfinished in self.in_state(Buffer.WRITING):
            if unfinished.owner == owner and unfinished.writer is writer:
                self._free(unfinished)
        fitting = [buffer for buffer in self.in_state(Buffer.FREE) if buffer.capacity >= size]
        buffer = min(fitting, key=lambda found: found.capacity) if fitting else self._make(capacity_for(size))
        buffer.state, buffer.owner, buffer.iteration, buffer.writer = Buffer.WRITING, owner, iteration, writer
        buffer.payload = buffer.header = 0
        return buffer

    def commit(self, buffer: Buffer, payload: int, header: int) -> None:
        """From now on the buffer's snapshot counts; it takes the place of an earlier one of the same iteration."""
        if payload < 0 or header < 0 or payload + header > buffer.capacity:
            raise Refused("protocol", message="the snapshot is larger than its buffer")
        buffer.payload, buffer.header = payload, header
        replaced = [b for b in self.in_state(Buffer.KEPT) if (b.owner, b.iteration) == (buffer.owner, buffer.iteration)]
        buffer.state, buffer.writer = Buffer.KEPT, None
        for old in replaced:
            self._free(old)
        self._trim()

    def drop(self, unwanted: Callable[[int], bool]) -> None:
        """Forget the snapshots of the iterations that are unwanted."""
        for buffer in self.in_state(Buffer.KEPT):
            if unwanted(buffer.iteration):
                self._free(buffer)
        self._trim()

    def abort(self, buffer: Buffer) -> None:
        """Its writer has given up and does not touch it any more."""
        self._free(buffer)
        self._trim()

    def forget(self, connection: Connection) -> None:
        """A connection is gone. What it was writing is not used again: its process may not be dead yet."""
        for buffer in list(self.buffers.values()):
            buffer.readers.discard(connection)
            given_up = buffer.state == Buffer.WRITING and buffer.writer is connection
            if given_up or (buffer.state == Buffer.RETIRED and not buffer.readers):
                self._close(buffer)

    def close_reader(self, buffer: Buffer, connection: Connection) -> None:
        buffer.readers.discard(connection)
        if buffer.state == Buffer.RETIRED and not buffer.readers:
            self._close(buffer)

    def clear(self) -> None:
        for buffer in list(self.buffers.values()):
            self._close(buffer)

    def _make(self, capacity: int) -> Buffer:
        used = self.bytes_in(Buffer.WRITING, Buffer.KEPT, Buffer.RETIRED)
        if used + capacity > self.limit:
            kept = sorted({buffer.iteration for buffer in self.in_state(Buffer.KEPT)})
            raise Refused("limit", needed=capacity, used=used, allowed=self.limit, kept=kept)
        for free in sorted(self.in_state(Buffer.FREE), key=lambda found: found.capacity):
            if used + self.bytes_in(Buffer.FREE) + capacity > self.limit:
                self._close(free)
        buffer = Buffer(self._made + 1, capacity, self._label)
        self._made += 1
        self.buffers[buffer.number] = buffer
        return buffer

    def _free(self, buffer: Buffer) -> None:
        # A reader's bytes must not change under it: its buffer is not used again, and goes when the reader does.
        buffer.state = Buffer.RETIRED if buffer.readers else Buffer.FREE
        buffer.writer = None

    def _trim(self) -> None:
        """Keep one free buffer for each snapshot that is kept, the largest: the next save takes as many."""
        spare = sorted(self.in_state(Buffer.FREE), key=lambda found: found.capacity, reverse=True)
        for buffer in spare[len(self.in_state(Buffer.KEPT)) :]:
            self._close(buffer)

    def _close(self, buffer: Buffer) -> None:
        os.close(buffer.descriptor)
        del self.buffers[buffer.number]


class Connection:
    """A process that talks to the keeper: the trainer or a process that it forked (a token shows it), or a reader."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel = channel
        self.pid = pid
        self.token: str | None = None


class Trainer:
    """The run that this rank belongs to at present. `watch` is a descriptor of its process, where there are such."""

    def __init__(self, token: str, pid: int) -> None:
        self.token = token
        self.pid = pid
        self.watch: int | None = None


class Keeper:
    """The server: one thread, which never waits for any one client."""

    def __init__(self, listener: socket.socket, shelf: Shelf, idle_seconds: float) -> None:
        self._listener = listener
        self._shelf = shelf
        self._idle_seconds = idle_seconds
        self._instance = secrets.token_hex(8)
        self._connections: dict[int, Connection] = {}
        self._trainer: Trainer | None = None
        self._alone_since = time.monotonic()
        self._told_to_end = False
        self._released = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        """Answer until the session is released, or nobody has needed it for the idle time."""
        while not self._released and not (self._trainer is None and self._is_over()):
            for key, _ in self._selector.select(self._seconds_to_wait()):
                key.data()
        self._shelf.clear()

    def end(self) -> None:
        """A polite signal: leave, but not before a trainer does, which gets the same signal and may save on it."""
        self._told_to_end = True
        if self._trainer is None:
            self._shelf.clear()
            os._exit(0)

    def _is_over(self) -> bool:
        idle = time.monotonic() - self._alone_since
        return self._told_to_end or (idle >= self._idle_seconds and not self._connections)

    def _seconds_to_wait(self) -> float | None:
        if self._trainer is not None or self._connections:
            return None
        return max(0.0, self._alone_since + self._idle_seconds - time.monotonic())

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:
            return
        channel.setblocking(False)
        pid, uid = peer(channel)
        if uid != os.geteuid():
            channel.close()
            return
        connection = Connection(channel, pid)
        self._connections[channel.fileno()] = connection
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._answer(connection))

    def _answer(self, connection: Connection) -> None:
        if connection.channel.fileno() < 0:  # closed by an event that came just before
            return
        try:
            packet = connection.channel.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._disconnect(connection)
            return
        descriptors: list[int] = []
        try:
            request = json.loads(packet)
            reply = self._requests[request.pop("op")](self, connection, descriptors, **request)
        except Refused as refusal:
            reply = refusal.reply
        except OSError as error:
            reply = {"error": "system", "message": str(error)}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reply = {"error": "protocol", "message": f"{type(error).__name__}: {error}"}
        try:
            socket.send_fds(connection.channel, [json.dumps(reply).encode()], descriptors)
        except OSError:  # gone, or it does not read what it asked for
            self._disconnect(connection)

    def _disconnect(self, connection: Connection) -> None:
        self._selector.unregister(connection.channel)
        del self._connections[connection.channel.fileno()]
        connection.channel.close()
        self._shelf.forget(connection)
        trainer = self._trainer
        if trainer is not None and all(other.token != trainer.token for other in self._connections.values()):
            self._trainer = None
            self._alone_since = time.monotonic()
            if trainer.watch is not None:
                self._selector.unregister(trainer.watch)
                os.close(trainer.watch)

    def _trainer_died(self, trainer: Trainer) -> None:
        """Its sockets may live on in processes that it forked."""
        if self._trainer is trainer:
            for connection in [c for c in self._connections.values() if c.token == trainer.token]:
                self._disconnect(connection)

    def _hello(
        self, connection: Connection, _: list[int], token: str | None, limit: int | None, idle_seconds: float | None
    ) -> dict[str, Any]:
        if token is not None:
            if self._trainer is not None and self._trainer.token != token:
                raise Refused("busy", pid=self._trainer.pid)
            if self._trainer is None:
                self._trainer = self._watched(Trainer(token, connection.pid))
            connection.token = token
            self._shelf.limit = self._shelf.limit if limit is None else int(limit)
            self._idle_seconds = self._idle_seconds if idle_seconds is None else float(idle_seconds)
        return {"pid": os.getpid(), "instance": self._instance}

    def _watched(self, trainer: Trainer) -> Trainer:
        try:
            trainer.watch = os.pidfd_open(trainer.pid)
        except (OSError, AttributeError):  # an old kernel, or a process that this one cannot see
            return trainer
        self._selector.register(trainer.watch, selectors.EVENT_READ, lambda: self._trainer_died(trainer))
        return trainer

    def _begin(
        self, connection: Connection, descriptors: list[int], owner: int, iteration: int, size: int
    ) -> dict[str, Any]:
        self._require_trainer(connection)
        buffer = self._shelf.begin(int(owner), int(iteration), int(size), connection)
        descriptors.append(buffer.descriptor)
        return {"number": buffer.number, "capacity": buffer.capacity, **self._live()}

    def _commit(self, connection: Connection, _: list[int], number: int, payload: int, header: int) -> dict[str, Any]:
        self._shelf.commit(self._written_by(connection, number), int(payload), int(header))
        return self._live()

    def _abort(self, connection: Connection, _: list[int], number: int) -> dict[str, Any]:
        self._shelf.abort(self._written_by(connection, number))
        return self._live()

    def _list(self, connection: Connection, _: list[int]) -> dict[str, Any]:
        return {"snapshots": [buffer.describe() for buffer in self._shelf.in_state(Buffer.KEPT)]}

    def _open(self, connection: Connection, descriptors: list[int], owner: int, iteration: int) -> dict[str, Any]:
        for buffer in self._shelf.in_state(Buffer.KEPT):
            if (buffer.owner, buffer.iteration) == (owner, iteration):
                buffer.readers.add(connection)
                descriptors.append(buffer.descriptor)
                return buffer.describe()
        raise Refused("missing")

    def _close(self, connection: Connection, _: list[int], number: int) -> dict[str, Any]:
        buffer = self._shelf.buffers.get(number)
        if buffer is not None:
            self._shelf.close_reader(buffer, connection)
        return self._live()

    def _drop(
        self, connection: Connection, _: list[int], below: int | None, above: int | None, equal: int | None
    ) -> dict[str, Any]:
        self._require_trainer(connection)
        self._shelf.drop(
            lambda iteration: (
                (below is not None and iteration < below)
                or (above is not None and iteration > above)
                or (equal is not None and iteration == equal)
            )
        )
        return self._live()

    def _stats(self, connection: Connection, _: list[int]) -> dict[str, Any]:
        buffers = [buffer.describe() for buffer in self._shelf.buffers.values()]
        return {"buffers": buffers, "limit": self._shelf.limit, "pid": os.getpid()}

    def _release(self, connection: Connection, _: list[int]) -> dict[str, Any]:
        self._shelf.clear()
        self._released = True
        return {}

    def _live(self) -> dict[str, Any]:
        return {"live": sorted(self._shelf.buffers)}

    def _require_trainer(self, connection: Connection) -> None:
        if connection.token is None:
            raise Refused("protocol", message="a reader cannot change anything")

    def _written_by(self, connection: Connection, number: int) -> Buffer:
        buffer = self._shelf.buffers.get(number)
        if buffer is None or buffer.state != Buffer.WRITING or buffer.writer is not connection:
            raise Refused("protocol", message=f"buffer {number} is not being written by this process")
        return buffer

    _requests: dict[str, Callable[..., dict[str, Any]]] = {  # noqa: RUF012 (never changed)
        "hello": _hello,
        "begin": _begin,
        "commit": _commit,
        "abort": _abort,
        "list": _list,
        "open": _open,
        "close": _close,
        "drop": _drop,
        "stats": _stats,
        "release": _release,
    }


def main(session: str, rank: str, limit: str, idle_seconds: str) -> int:
    """Take the name, go into the background, serve. The caller goes on as soon as the socket takes connections."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address(session, int(rank)))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return 0  # there is a keeper: another trainer was quicker
        raise
    listener.listen(16)
    listener.setblocking(False)
    # The one that forks ends at once, so the keeper is nobody's child: no trainer has to collect it, and what ends a
    # trainer together with its children passes it over.
    if os.fork():
        os._exit(0)
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    keeper = Keeper(listener, Shelf(int(limit), f"{PREFIX}/{session}/{rank}"), float(idle_seconds))
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: keeper.end())
    keeper.serve()
    # At once: who waits for the end of a connection waits for the end of this process.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
