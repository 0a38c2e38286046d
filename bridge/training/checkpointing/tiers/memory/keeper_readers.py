"""Reading what keepers hold, by the trainer itself or by anybody else of the same user while the trainers are dead."""

from __future__ import annotations

import logging
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError, KeeperLostError
from bridge.training.checkpointing.tiers.memory.keeper_channel import Channel
from bridge.training.checkpointing.tiers.memory.keeper_process import PREFIX

logger = logging.getLogger(__name__)

_SOCKETS = Path("/proc/net/unix")


@dataclass(frozen=True)
class Kept:
    """A complete snapshot in a keeper's memory."""

    owner: int
    """The rank that it is of: the keeper's own, or one whose copy the keeper's rank holds."""
    iteration: int
    payload: int
    """Bytes of the tensors, at the beginning of the buffer."""
    header: int
    """Bytes of the header, right behind them."""
    capacity: int
    """Bytes of the buffer."""


class OpenSnapshot:
    """A snapshot whose bytes stay as they are until it is closed, whatever is saved or dropped meanwhile."""

    def __init__(
        self,
        channel: Channel,
        keeper_rank: int,
        kept: Kept,
        number: int,
        descriptor: int,
        *,
        owns_channel: bool = False,
    ) -> None:
        self._channel = channel
        self._owns_channel = owns_channel
        self._number = number
        self._descriptor = descriptor
        self.keeper_rank = keeper_rank
        self.kept = kept

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        where = "memory" if self.keeper_rank == self.kept.owner else f"memory of rank {self.keeper_rank}"
        return f"the snapshot of rank {self.kept.owner}, iteration {self.kept.iteration}, in {where}"

    def read_header(self) -> bytes:
        """The bytes that describe it."""
        header = bytearray(self.kept.header)
        self._read(memoryview(header), self.kept.payload)
        return bytes(header)

    def read_payload(self, destination: memoryview) -> None:
        """Copy the tensors' bytes, `kept.payload` of them, into memory of the caller's."""
        self._read(destination, 0)

    def map_payload(self) -> mmap.mmap | None:
        """The tensors' bytes where they are, without copying them; None if there are none.

        They may be used until the snapshot is closed. Writing to them changes nothing but this process's view.
        """
        if not self.kept.payload:
            return None
        return mmap.mmap(self._descriptor, self.kept.payload, flags=mmap.MAP_PRIVATE)

    def close(self) -> None:
        """Let the keeper use the memory again."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        if self._owns_channel:
            # The end of the connection tells the keeper: nothing is waited for, so this may be done at any time.
            self._channel.close()
            return
        with suppress(CheckpointError):  # a keeper that is gone needs to be told nothing
            self._channel.request("close", number=self._number)

    def __enter__(self) -> OpenSnapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, destination: memoryview, offset: int) -> None:
        while len(destination):
            count = os.preadv(self._descriptor, [destination], offset)
            if not count:
                raise CheckpointDamagedError(f"{self.place} ends too early")
            destination, offset = destination[count:], offset + count


def list_kept(channel: Channel) -> list[Kept]:
    """The complete snapshots of a keeper."""
    reply, _ = channel.request("list")
    names = ("owner", "iteration", "payload", "header", "capacity")
    return [Kept(*(found[name] for name in names)) for found in reply["snapshots"]]


def open_kept(channel: Channel, keeper_rank: int, owner: int, iteration: int) -> OpenSnapshot:
    """Open one snapshot of a keeper.

    Raises:
        CheckpointNotFoundError: the keeper does not hold it.
        KeeperLostError: the keeper is gone.
    """
    reply, (descriptor,) = channel.request("open", owner=owner, iteration=iteration)
    kept = Kept(owner, iteration, reply["payload"], reply["header"], reply["capacity"])
    return OpenSnapshot(channel, keeper_rank, kept, reply["number"], descriptor)


def open_apart(session: str, keeper_rank: int, owner: int, iteration: int) -> OpenSnapshot | None:
    """Open one snapshot of a keeper over a connection of its own; None if there is no such keeper.

    Raises as `open_kept`.
    """
    channel = Channel.connect(session, keeper_rank)
    if channel is None:
        return None
    try:
        reply, (descriptor,) = channel.request("open", owner=owner, iteration=iteration)
    except BaseException:
        channel.close()
        raise
    kept = Kept(owner, iteration, reply["payload"], reply["header"], reply["capacity"])
    return OpenSnapshot(channel, keeper_rank, kept, reply["number"], descriptor, owns_channel=True)


def running_keepers() -> list[tuple[str, int]]:
    """Session and rank of every keeper of this user on this machine, sorted."""
    pattern = re.compile(rf" @{PREFIX}/{os.geteuid()}/([^/\s]+)/(\d+)$", re.MULTILINE)
    try:
        sockets = _SOCKETS.read_text(errors="replace")
    except OSError as error:
        logger.warning("cannot look for in-memory checkpoints: %s", error)
        return []
    # A connection that the keeper has accepted shows its name too.
    return sorted({(match[1], int(match[2])) for match in pattern.finditer(sockets)})


@dataclass(frozen=True)
class KeeperAccount:
    """What a running keeper holds."""

    pid: int
    total_bytes: int
    """Of all its buffers, those that it keeps for the next save included."""
    snapshots: tuple[Kept, ...]
    """The complete ones, by owner and iteration."""


def describe_keeper(session: str, rank: int) -> KeeperAccount | None:
    """What the keeper of a rank holds; None if there is none.

    Raises:
        CheckpointError: it does not answer.
    """
    channel = Channel.connect(session, rank)
    if channel is None:
        return None
    try:
        stats, _ = channel.request("stats")
        total = sum(buffer["capacity"] for buffer in stats["buffers"])
        kept = sorted(list_kept(channel), key=lambda entry: (entry.owner, entry.iteration))
        return KeeperAccount(stats["pid"], total, tuple(kept))
    finally:
        channel.close()


@contextmanager
def stored_snapshots(session: str) -> Iterator[list[OpenSnapshot]]:
    """Every complete snapshot that the keepers of a session on this machine hold, open for reading.

    The trainers may be dead or alive; they are not disturbed. A keeper that does not answer is passed over with a
    warning. The snapshots are in the order of the keepers' ranks, owners, iterations.
    """
    with ExitStack() as stack:
        found = []
        for name, rank in running_keepers():
            if name != session:
                continue
            try:
                channel = Channel.connect(session, rank)
                if channel is None:
                    continue
                stack.callback(channel.close)
                for kept in sorted(list_kept(channel), key=lambda entry: (entry.owner, entry.iteration)):
                    found.append(stack.enter_context(open_kept(channel, rank, kept.owner, kept.iteration)))
            except CheckpointError as error:
                logger.warning("passing over in-memory checkpoints of rank %d: %s", rank, error)
        yield found


def release_session(session: str) -> list[int]:
    """End the keepers of a session on this machine and so free their memory. Return their ranks.

    Raises:
        CheckpointError: one does not answer.
    """
    released = []
    for name, rank in running_keepers():
        channel = Channel.connect(session, rank) if name == session else None
        if channel is not None:
            with suppress(KeeperLostError):
                channel.request("release")
            channel.wait_for_end()
            released.append(rank)
    return released
