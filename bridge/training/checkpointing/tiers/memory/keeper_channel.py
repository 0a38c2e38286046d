"""One connection to a keeper: requests, replies, and what a reply that is no success means here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    KeeperLostError,
    MemoryLimitError,
)
from bridge.training.checkpointing.tiers.memory.keeper_process import PACKET_BYTES, address, peer

TIMEOUT_SECONDS = 20.0
"""How long a keeper may take to answer. It has no long work: one that takes longer is stopped or starved."""

LIMIT_SETTING = "checkpoint.in_memory_limit_gib"
GIB = 1 << 30


class KeeperBusy(Exception):
    """Another process is the keeper's trainer."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.pid = pid


class Channel:
    """A connection to the keeper of one rank of a session. It is closed for good when an exchange fails."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.name = name

    @classmethod
    def connect(cls, session: str, rank: int) -> Channel | None:
        """Connect to a keeper; None if there is none.

        Raises:
            KeeperLostError: there is one, and it does not take connections.
            CheckpointError: what has its name is a process of another user.
        """
        name = f"the keeper of rank {rank}'s in-memory checkpoints (session {session})"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(TIMEOUT_SECONDS)
        try:
            connection.connect(address(session, rank))
        except ConnectionRefusedError:
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise KeeperLostError(f"{name} does not take connections: {error}") from error
        _, owner = peer(connection)
        if owner != os.geteuid():
            connection.close()
            raise CheckpointError(f"{name} has the name of a process of user {owner}; it gets nothing from here")
        return cls(connection, name)

    def request(self, operation: str, **details: Any) -> tuple[dict[str, Any], list[int]]:
        """Ask, wait, and return the reply and the descriptors that came with it, which are then the caller's.

        Raises:
            KeeperLostError: the keeper died, or did not answer in time. The channel is closed.
            KeeperBusy: it serves another trainer.
            CheckpointError: it refuses; the type and the message say why.
        """
        packet, descriptors = self._exchange(json.dumps({"op": operation, **details}).encode())
        reply: dict[str, Any] = json.loads(packet)
        if "error" in reply:
            close_all(descriptors)
            raise _meaning(reply, self.name)
        return reply, descriptors

    def _exchange(self, packet: bytes) -> tuple[bytes, list[int]]:
        with self._lock:
            try:
                self._connection.send(packet)
                answer, descriptors, flags, _ = socket.recv_fds(
                    self._connection, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError as error:
                self.close()
                raise KeeperLostError(f"{self.name} has not answered for {TIMEOUT_SECONDS:g} s") from error
            except OSError as error:
                self.close()
                raise KeeperLostError(f"{self.name} has died, and what it kept is lost") from error
            if not answer or flags & socket.MSG_TRUNC:
                close_all(descriptors)
                self.close()
                raise KeeperLostError(f"{self.name} has died, and what it kept is lost")
            return answer, descriptors

    @property
    def is_open(self) -> bool:
        """Whether no exchange has failed."""
        return self._connection.fileno() >= 0

    def wait_for_end(self) -> None:
        """Wait until the keeper has closed its end, and given up its name for another one to take."""
        with contextlib.suppress(OSError):
            self._connection.recv(1)
            place, deadline = self._connection.getpeername(), time.monotonic() + TIMEOUT_SECONDS
            while _is_taken(place) and time.monotonic() < deadline:
                time.sleep(0.005)
        self.close()

    def close(self) -> None:
        """Close this process's end."""
        self._connection.close()


def _is_taken(place: Any) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(place)
        except ConnectionRefusedError:
            return False
    return True


def has_died(error: KeeperLostError) -> bool:
    """Whether the keeper is gone; otherwise it only does not answer, and may do so later."""
    return not isinstance(error.__cause__, TimeoutError)


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


def _meaning(reply: dict[str, Any], name: str) -> Exception:
    kind = reply["error"]
    if kind == "busy":
        return KeeperBusy(reply["pid"])
    if kind == "missing":
        return CheckpointNotFoundError(f"{name} does not hold that snapshot")
    if kind == "limit":
        kept = ", ".join(map(str, reply["kept"])) or "none"
        return MemoryLimitError(
            f"{LIMIT_SETTING}: an in-memory checkpoint needs {gib(reply['needed'])} on this rank, and of the "
            f"{gib(reply['allowed'])} allowed {gib(reply['used'])} are in use (iterations kept: {kept}); set "
            f"{LIMIT_SETTING} to {(reply['needed'] + reply['used']) / GIB:.3f} or more, or make checkpoints smaller"
        )
    return CheckpointSaveError(f"{name} refuses a request: {reply.get('message', kind)}")


def gib(size: int) -> str:
    """Bytes as a message shows them."""
    return f"{size / GIB:.3f} GiB"
