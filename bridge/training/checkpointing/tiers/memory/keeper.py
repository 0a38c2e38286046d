"""The trainer's side of the keeper: it starts one, finds it again after a restart, writes into its memory.

    keeper = Keeper(KeeperSettings(session, rank, limit=None, idle_seconds=3600))
    with keeper.begin(owner=rank, iteration=10, size=size) as slot:
        ...                                      # write into slot.memory
        slot.commit(payload_bytes, header_bytes)
    keeper.snapshots()                           # what is complete
    keeper.release()                             # at a clean end: the keeper goes, and its memory with it

The trainer writes straight into the keeper's memory. Memory that was touched before takes many times more bytes a
second than fresh memory, so buffers are used again. A snapshot counts from its commit on; whatever dies before
that leaves the earlier ones as they were.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError, KeeperLostError, MemoryLimitError
from bridge.training.checkpointing.tiers.memory import host_memory, keeper_process
from bridge.training.checkpointing.tiers.memory.keeper_channel import (
    TIMEOUT_SECONDS,
    Channel,
    KeeperBusy,
    close_all,
    gib,
    has_died,
)
from bridge.training.checkpointing.tiers.memory.keeper_readers import Kept, OpenSnapshot, list_kept, open_apart

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""How long a trainer waits for the one before it, which may be shutting down, to leave the keeper."""

_POLL_SECONDS = 0.2
_SESSION = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True)
class KeeperSettings:
    """Which keeper, and what it may do."""

    session: str
    """Keeps apart the runs of a machine: up to 64 letters, digits, `_`, `.` and `-`."""
    rank: int
    limit: int | None
    """Bytes that its buffers may take together; None leaves a running keeper's as it is, and gives a new one half
    of the memory that is available, divided by the ranks of the machine."""
    idle_seconds: float
    """It ends by itself when it has had no trainer for so long."""

    def __post_init__(self) -> None:
        if not _SESSION.fullmatch(self.session):
            raise ValueError(f"{self.session!r} is no name of a session: it is not 1 to 64 of A-Z a-z 0-9 _ . -")


class Slot:
    """A buffer of the keeper's while it is being written. Leaving it without a commit gives it up."""

    def __init__(self, keeper: Keeper, channel: Channel, number: int, memory: mmap.mmap) -> None:
        self._keeper = keeper
        self._channel = channel
        self._number = number
        self._open = True
        self.memory = memory
        """At least as many bytes as were asked for."""

    def commit(self, payload: int, header: int) -> None:
        """Make what was written count, in place of an earlier snapshot of the same owner and iteration.

        Args:
            payload: bytes of the tensors, from the beginning.
            header: bytes of the header, right behind them.

        Raises:
            KeeperLostError: the keeper died meanwhile.
        """
        self._open = False
        self._keeper.finish(self._channel, "commit", number=self._number, payload=payload, header=header)

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(CheckpointError):
                self._keeper.finish(self._channel, "abort", number=self._number)


class Keeper:
    """A trainer's keeper. It is started by the first `begin`; a running one is found by everything else.

    It may be used in threads, and in processes that the trainer forks: they are known to the keeper as the same
    trainer. So is another object of this class in the same process.
    """

    def __init__(self, settings: KeeperSettings) -> None:
        self.settings = settings
        self._token = _process_identity()
        self._instance: str | None = None
        self._maps: dict[int, mmap.mmap] = {}
        self._channel: Channel | None = None
        self._lock = threading.RLock()
        self._process = os.getpid()

    def begin(self, owner: int, iteration: int, size: int) -> Slot:
        """Get a buffer for a snapshot of `size` bytes, header included. A keeper that died is replaced, with a warning.

        Raises:
            MemoryLimitError: it does not fit; the message says how much is needed, used and allowed.
            KeeperLostError: the keeper does not answer.
            CheckpointSaveError: no keeper can be started, or another trainer has it.
        """
        with self._exclusively():
            channel = self._require_channel()
            try:
                reply, descriptors = channel.request("begin", owner=owner, iteration=iteration, size=size)
            except KeeperLostError as error:
                if not has_died(error):
                    raise
                logger.warning("%s; starting another", error)
                self._channel = None
                channel = self._require_channel()
                reply, descriptors = channel.request("begin", owner=owner, iteration=iteration, size=size)
            try:
                memory = self._mapped(reply["number"], reply["capacity"], descriptors[0])
            except OSError as error:
                self.finish(channel, "abort", number=reply["number"])
                raise MemoryLimitError(
                    f"an in-memory checkpoint needs {gib(reply['capacity'])}, which the machine lacks: {error}"
                ) from error
            finally:
                close_all(descriptors)
            self._prune(reply["live"])
            return Slot(self, channel, reply["number"], memory)

    def finish(self, channel: Channel, operation: str, **details: Any) -> None:
        """End the writing of a slot, over the channel that began it."""
        with self._exclusively():
            reply, _ = channel.request(operation, **details)
            self._prune(reply["live"])

    def snapshots(self) -> list[Kept]:
        """The complete snapshots; none if no keeper runs, or it died.

        Raises:
            CheckpointSaveError: another trainer has the keeper.
        """
        with self._exclusively():
            try:
                channel = self._find_channel()
                return [] if channel is None else list_kept(channel)
            except KeeperLostError as error:
                self._channel = None
                logger.warning("%s; looking on as if it had kept nothing", error)
                return []

    def open(self, owner: int, iteration: int) -> OpenSnapshot:
        """Open a complete snapshot for reading, over a connection of its own.

        Raises:
            CheckpointNotFoundError: the keeper does not hold it.
            KeeperLostError: the keeper died, or none runs.
        """
        with self._exclusively():
            found = None
            if self._find_channel() is not None:
                found = open_apart(self.settings.session, self.settings.rank, owner, iteration)
            if found is None:
                raise KeeperLostError(f"rank {self.settings.rank} has no keeper of in-memory checkpoints")
            return found

    def drop(self, *, below: int | None = None, above: int | None = None, equal: int | None = None) -> None:
        """Forget the snapshots, of all owners, of iterations that are below, above or equal to a number.

        A keeper that died has none any more.

        Raises:
            KeeperLostError: the keeper does not answer, so it may still have them.
        """
        with self._exclusively():
            channel = self._find_channel()
            if channel is None:
                return
            try:
                reply, _ = channel.request("drop", below=below, above=above, equal=equal)
            except KeeperLostError as error:
                if not has_died(error):
                    raise
                logger.warning("%s; nothing is left to forget", error)
                return
            self._prune(reply["live"])

    def stats(self) -> dict[str, Any] | None:
        """The keeper's account: `pid`, `limit` and `buffers`, each with its state and capacity in bytes.

        `total` is the bytes of all buffers together, what the keeper holds of the machine's memory. None if no
        keeper runs.
        """
        with self._exclusively():
            channel = self._find_channel()
            if channel is None:
                return None
            reply, _ = channel.request("stats")
            return {**reply, "total": sum(buffer["capacity"] for buffer in reply["buffers"])}

    def release(self) -> None:
        """End the keeper and free its memory: for the clean end of a run. A keeper that is gone is no error."""
        with self._exclusively():
            self._prune([])
            with contextlib.suppress(KeeperLostError):
                channel = self._find_channel()
                if channel is not None:
                    channel.request("release")
                    channel.wait_for_end()
            self._channel = None

    def close(self) -> None:
        """Leave the keeper to itself. It keeps what it has for `idle_seconds`."""
        with self._exclusively():
            self._prune([])
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def _exclusively(self) -> AbstractContextManager[bool]:
        """The lock; in a process that was just forked one of its own, and a connection of its own."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._lock = threading.RLock()
            if self._channel is not None:
                self._channel.close()
                self._channel = None
        return self._lock

    def _require_channel(self) -> Channel:
        channel = self._find_channel()
        for _ in range(3):
            if channel is not None:
                return channel
            start_process(self.settings)
            channel = self._find_channel()
        raise KeeperLostError(
            f"the keeper of rank {self.settings.rank}'s in-memory checkpoints ends as soon as it is started"
        )

    def _find_channel(self) -> Channel | None:
        """The connection to a running keeper, as its trainer. One that is found dead is forgotten with a warning."""
        if self._channel is not None and self._channel.is_open:
            return self._channel
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            channel = Channel.connect(self.settings.session, self.settings.rank)
            if channel is None:
                return None
            try:
                self._introduce(channel)
            except KeeperBusy as busy:
                channel.close()
                if time.monotonic() >= deadline:
                    raise CheckpointSaveError(
                        f"{channel.name} serves another trainer, process {busy.pid}: end that process, or set "
                        "checkpoint.save to another directory"
                    ) from None
            except KeeperLostError as error:  # dying, it may take connections for a moment more
                if not has_died(error) or time.monotonic() >= deadline:
                    raise
            else:
                self._channel = channel
                return channel
            time.sleep(_POLL_SECONDS)

    def _introduce(self, channel: Channel) -> None:
        limit, idle = self.settings.limit, self.settings.idle_seconds
        reply, _ = channel.request("hello", token=self._token, limit=limit, idle_seconds=idle)
        if reply["instance"] != self._instance:  # another process: its numbers mean other buffers
            self._prune([])
            self._instance = reply["instance"]

    def _mapped(self, number: int, capacity: int, descriptor: int) -> mmap.mmap:
        """The buffer in this process's memory, from then on for as long as the keeper has it."""
        memory = self._maps.get(number)
        if memory is None:
            # Reserved first, so that a machine without the memory says so here and does not kill the trainer while
            # it writes; in pieces, because a signal makes the kernel begin a call again.
            for offset in range(0, capacity, _RESERVE_BYTES):
                os.posix_fallocate(descriptor, offset, min(_RESERVE_BYTES, capacity - offset))
            memory = mmap.mmap(descriptor, capacity)
            memory.madvise(mmap.MADV_DONTDUMP)  # a core dump would hold every snapshot
            self._maps[number] = memory
        return memory

    def _prune(self, live: list[int]) -> None:
        """Unmap what the keeper has given up: the memory is free only when nobody maps it."""
        for number in self._maps.keys() - set(live):
            memory = self._maps.pop(number)
            with contextlib.suppress(BufferError):  # a tensor is still on it: it is unmapped with that
                memory.close()


def _process_identity() -> str:
    """This process and no other that ever runs on the machine: its number and when it started (proc(5), field 22)."""
    return f"{os.getpid()}-{Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19]}"


def start_process(settings: KeeperSettings) -> None:
    """Start a keeper, in the background and in a session of its own, and wait until it takes connections.

    If there is one already, nothing happens: its name belongs to one process only.

    Raises:
        CheckpointSaveError: it does not start.
    """
    if not hasattr(os, "memfd_create") or not sys.platform.startswith("linux"):
        raise CheckpointSaveError(
            "in-memory checkpoints need Linux; set checkpoint.non_persistent_ckpt_type to 'local' or 'global'"
        )
    limit = host_memory.share_of_this_rank() if settings.limit is None else settings.limit
    script = Path(keeper_process.__file__).resolve()
    command = [sys.executable, "-I", "-S", str(script)]
    command += [settings.session, str(settings.rank), str(limit), str(settings.idle_seconds)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckpointSaveError(f"the keeper of in-memory checkpoints does not start: {error}") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise CheckpointSaveError(
            f"the keeper of in-memory checkpoints ended with status {done.returncode} as it started: {reason}"
        )
