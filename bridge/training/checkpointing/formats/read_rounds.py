"""Reading shards in rounds and sending each round to those who want it, while the next one is read."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from bridge import accelerator
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.formats.exchange import Exchange
from bridge.training.checkpointing.formats.read_assignment import (
    MESSAGE_BYTES,
    Assignment,
    Message,
    UnitId,
    messages_of,
    rounds_of,
)

T = TypeVar("T")
Prepare = Callable[[dict[str, Any]], Callable[[], dict[str, Any]]]
"""Prepares the reading of a flat state dict and returns what reads it. Preparing changes no tensor."""

TENSOR, OBJECT = 0, 1
"""How the identity of a shard begins."""
ROUND_BYTES = 128 << 20
"""What a rank reads before the others get it: enough that agreeing on it costs little beside."""
PLANNING, READING = "plan", "read"
"""torch's names for the two steps of a load, by which `formats.failures` tells damage from a misfit."""


@dataclass(frozen=True)
class LoadTimes:
    """Where one rank's time went, in seconds."""

    reading: float = 0.0
    """Reading its share. Part of it is hidden behind the exchange."""
    exchanging: float = 0.0
    waiting: float = 0.0
    """For its own reading, and for that of slower ranks."""
    total: float = 0.0
    bytes_read: int = 0
    """Of tensors."""
    bytes_wanted: int = 0
    """What it would have read by itself."""


def summary(times: Sequence[LoadTimes]) -> str:
    """One line about a load, from all ranks' times. Seconds are those of the slowest rank."""
    read, wanted = sum(t.bytes_read for t in times), sum(t.bytes_wanted for t in times)
    total = max(t.total for t in times)
    speed = read / total / 1e9 if total > 0 else 0.0
    slowest = [f"{max(getattr(t, name) for t in times):.2f} s {name}" for name in ("reading", "exchanging", "waiting")]
    return (
        f"two-stage load: {len(times)} ranks read {read:,} bytes for the {wanted:,} that they load, in {total:.2f} s "
        f"({speed:.2f} GB/s); the slowest took {', '.join(slowest)}"
    )


def agree(ranks: Ranks, step: str, error: BaseException | None) -> None:
    """Learn whether any rank has failed. Collective.

    Raises:
        CheckpointException: torch's, as its own collective load raises it: with the cause of every rank that failed.
    """
    failed = {
        rank: failure
        for rank, failure in enumerate(ranks.gather_all(f"the {step} step of a two-stage load", _portable(error)))
        if failure is not None
    }
    if not failed:
        return
    causes: dict[int, Any] = {}
    for rank, failure in failed.items():
        # What failed in a collective of the strategy's names its ranks itself.
        causes |= failure.failures if isinstance(failure, CheckpointException) else {rank: _wrap_exception(failure)}
    raise CheckpointException(step, causes) from error


def _portable(error: BaseException | None) -> BaseException | None:
    """The error, or its description where it cannot travel between ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_all_ranks(ranks: Ranks, step: str, action: Callable[[], T]) -> T:
    """Run `action`, which is local, on every rank. Collective.

    Raises:
        CheckpointException: as `agree`.
    """
    result, error = None, None
    try:
        result = action()
    # torch's is none of Python's `Exception`s.
    except (Exception, CheckpointException) as caught:
        error = caught
    agree(ranks, step, error)
    return result  # type: ignore[return-value]


class Rounds:
    """One load in two stages, on one rank."""

    def __init__(
        self,
        prepare: Prepare,
        tensors: Mapping[UnitId, ShardedTensor],
        objects: Mapping[UnitId, Any],
        assignment: Assignment,
        group: Any,
        ranks: Ranks,
        *,
        alone: bool,
        round_bytes: int = ROUND_BYTES,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        """
        Args:
            prepare: the format's reading.
            tensors: the sharded tensors that this rank wants, by shard.
            objects: the sharded objects, likewise.
            assignment: who reads what, computed from what all ranks of the group want.
            group: the ranks that share the reading.
            ranks: all ranks of the job.
            alone: reading needs no other rank, and can overlap with the exchange. Otherwise all ranks read equally
                often, if need be nothing.
            round_bytes: what a rank reads at a time, if no single tensor is larger.
            message_bytes: the most bytes that are sent at a time.
        """
        self._prepare = prepare
        self._wanted = tensors
        self._objects = objects
        self._assignment = assignment
        self._group = group
        self._ranks = ranks
        self._alone = alone
        self._me = dist.get_rank(group)
        self._exchange = Exchange(group, message_bytes=message_bytes)
        self._message_bytes = message_bytes
        self._shares = [self._rounds_of(rank, round_bytes) for rank in range(dist.get_world_size(group))]
        self._tensors: dict[UnitId, torch.Tensor] = {}
        """Contiguous: what has been read, and the room for what is received."""
        self._reading = self._exchanging = self._waiting = 0.0

    def run(self) -> dict[UnitId, Any]:
        """Everything that this rank wants, by shard. Collective over all ranks.

        Raises:
            CheckpointException: as `agree`.
        """
        number = max(self._ranks.gather_all("counting rounds", max(map(len, self._shares))))
        messages = [self._messages_in(at) for at in range(number)]
        read_objects, *reads = on_all_ranks(self._ranks, PLANNING, lambda: self._planned(messages))
        own_objects = on_all_ranks(self._ranks, PLANNING, read_objects)
        objects = {**self._objects_of_others(own_objects), **own_objects}
        error: BaseException | None = None
        with self._reader() as start:
            results = [start(read) for read in reads]
            for result, batch in zip(results, messages, strict=True):
                self._receive_own(result, error)
                error = self._send(batch)
        agree(self._ranks, READING, error)
        return {**objects, **self._tensors}

    def times(self, total: float) -> LoadTimes:
        """Where the time of `run` went, of `total` seconds."""
        sizes = self._assignment.size_of
        read = sum(sizes[unit] for units in self._shares[self._me] for unit in units)
        return LoadTimes(
            self._reading, self._exchanging, self._waiting, total, read, sum(sizes[unit] for unit in self._wanted)
        )

    def _rounds_of(self, rank: int, limit: int) -> list[list[UnitId]]:
        """The tensors that a rank of the group reads, by round."""
        tensors = [unit for unit in self._assignment.read_by(rank) if is_tensor(unit)]
        return rounds_of(tensors, self._assignment.size_of, limit)

    def _messages_in(self, number: int) -> list[Message]:
        read = [share[number] if number < len(share) else [] for share in self._shares]
        return messages_of(read, self._assignment, limit=self._message_bytes)

    def _planned(self, messages: list[list[Message]]) -> list[Callable[[], dict[UnitId, Any]]]:
        """What reads the objects, and then each round. Makes room for everything that is received and sent."""
        own = self._shares[self._me]
        objects = {unit: self._objects[unit] for unit in self._assignment.read_by(self._me) if not is_tensor(unit)}
        rounds = [own[at] if at < len(own) else [] for at in range(len(messages))]
        reads = [self._read_of(objects)] + [self._read_of({u: self._wanted[u] for u in units}) for units in rounds]
        for unit, wanted in self._wanted.items():
            if self._assignment.reader_of[unit] != self._me:
                self._tensors[unit] = _room_for(wanted)
        self._exchange.allocate(max((message.size for batch in messages for message in batch), default=0))
        return reads

    def _read_of(self, items: Mapping[UnitId, Any]) -> Callable[[], dict[UnitId, Any]]:
        if not items and self._alone:
            return dict
        read = self._prepare({str(number): item for number, item in enumerate(items.values())})

        def named() -> dict[UnitId, Any]:
            values = read()
            return {unit: values[str(number)] for number, unit in enumerate(items)}

        return named

    def _objects_of_others(self, own: dict[UnitId, Any]) -> dict[UnitId, Any]:
        wanted_by = self._assignment.wanted_by
        shared = {unit for unit, wanted in wanted_by.items() if not is_tensor(unit) and len(wanted) > 1}
        # Pickled first: what cannot be would fail on one rank, amid a collective.
        offer = on_all_ranks(
            self._ranks, PLANNING, lambda: pickle.dumps({unit: own[unit] for unit in shared if unit in own})
        )
        offers: list[Any] = [b""] * dist.get_world_size(self._group)
        self._ranks.run(
            "exchanging objects",
            lambda: dist.all_gather_object(offers, offer, group=self._group) if shared else None,
        )

        def read() -> dict[UnitId, Any]:
            read_by_others = [pickle.loads(other) for rank, other in enumerate(offers) if rank != self._me and other]
            return {unit: value for part in read_by_others for unit, value in part.items() if unit in self._objects}

        return on_all_ranks(self._ranks, PLANNING, read)

    @contextmanager
    def _reader(self) -> Iterator[Callable[[Callable[[], Any]], Callable[[], dict[UnitId, Any]]]]:
        """What starts reads, one after the other, and returns what waits for the result."""
        if not self._alone:
            yield lambda read: partial(self._read, read)
            return
        # A new thread has device 0 current, and not the one that this rank works on.
        executor = ThreadPoolExecutor(1, "two-stage-read", initializer=_keep_device())
        try:
            yield lambda read: executor.submit(self._read, read).result
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _read(self, read: Callable[[], dict[UnitId, Any]]) -> dict[UnitId, Any]:
        begun = time.monotonic()
        try:
            with torch.no_grad():
                return {unit: _in_place(value, self._wanted[unit]) for unit, value in read().items()}
        finally:
            self._reading += time.monotonic() - begun

    def _receive_own(self, result: Callable[[], dict[UnitId, Any]], error: BaseException | None) -> None:
        """Wait for a round's reading, on this rank and on the others."""
        begun, before = time.monotonic(), self._reading

        def arrived() -> None:
            if error is not None:
                raise error
            self._tensors.update(result())

        on_all_ranks(self._ranks, READING, arrived)
        hidden = 0.0 if self._alone else self._reading - before
        self._waiting += time.monotonic() - begun - hidden

    def _send(self, batch: list[Message]) -> BaseException | None:
        begun = time.monotonic()
        try:
            self._exchange.run(batch, self._tensors)
            accelerator.synchronize()  # a device works on after its call returns
        except Exception as error:
            return error
        finally:
            self._exchanging += time.monotonic() - begun
        return None


def is_tensor(unit: UnitId) -> bool:
    """Whether a shard is one of a tensor; else it is an object."""
    return bool(unit[0] == TENSOR)


def _room_for(wanted: ShardedTensor) -> torch.Tensor:
    """Contiguous memory for a tensor that is received: its own if that is possible."""
    if wanted.data is None:
        return torch.empty(wanted.local_shape, dtype=wanted.dtype)
    data: torch.Tensor = wanted.data.detach()
    return data if data.is_contiguous() else torch.empty(data.shape, dtype=data.dtype, device=data.device)


def _in_place(value: Any, wanted: ShardedTensor) -> torch.Tensor:
    """What a strategy has read, contiguous, and in the memory where it is wanted if there is such.

    Checked, because ranks that expect so many bytes are about to get it.
    """
    fits = isinstance(value, torch.Tensor) and value.dtype == wanted.dtype
    if not fits or value.numel() != math.prod(wanted.local_shape):
        found = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointMismatchError(
            f"the load strategy returned {found} for {wanted.key!r}, which is {wanted.dtype} of {wanted.local_shape}"
        )
    tensor: torch.Tensor = value.detach()
    own = wanted.data
    if own is not None and own.is_contiguous() and own.data_ptr() != tensor.data_ptr():
        return own.detach().view(tensor.shape).copy_(tensor)  # type: ignore[no-any-return]
    return tensor.contiguous()


def _keep_device() -> Callable[[], None]:
    if not torch.cuda.is_available():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
