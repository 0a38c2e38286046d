"""Sending shards that one rank has read to the other ranks that want them.

All ranks of a group go through the same messages in the same order and start each of them without waiting, so that
several are under way and none waits for a later one. A message of one piece of a tensor goes from that tensor's
memory into the other's; what is packed, or lies on a device that the backend cannot send from, passes through one of
a few buffers that are allocated before anything is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bridge import accelerator
from bridge.training.checkpointing.formats.read_assignment import MESSAGE_BYTES, Message, UnitId

BUFFERS = 4
"""Messages that can be under way through buffers at the same time; each buffer holds one message's bytes."""


def exchange_device(group: Any) -> torch.device:
    """Where a tensor must lie to be sent within `group`."""
    return accelerator.device() if dist.get_backend(group) == "nccl" else torch.device("cpu")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as a flat tensor of bytes: backends do not know every type."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class _Flight:
    """A message under way."""

    message: Message
    works: tuple[Any, ...]
    buffer: torch.Tensor | None


class Exchange:
    """The exchange of one load, seen from one rank."""

    def __init__(self, group: Any, *, message_bytes: int = MESSAGE_BYTES) -> None:
        """
        Args:
            group: the process group within which messages number their ranks.
            message_bytes: the most bytes of a message.
        """
        self._group = group
        self._me = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._device = exchange_device(group)
        self._message_bytes = message_bytes
        self._buffers: list[torch.Tensor] = []
        self._flights: deque[_Flight] = deque()

    def allocate(self, largest: int) -> None:
        """Allocate the buffers, for messages of at most `largest` bytes. Local, and the last thing that may fail."""
        size = min(largest, self._message_bytes)
        if size:
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]

    def run(self, messages: Sequence[Message], tensors: Mapping[UnitId, torch.Tensor]) -> None:
        """Carry out the messages. Collective in the group.

        Args:
            messages: the same on all ranks.
            tensors: contiguous tensors by shard: what this rank has read, and the room for what it receives.
        """
        for message in messages:
            if self._me == message.reader or self._me in message.receivers:
                self._start(message, tensors)
        while self._flights:
            self._finish_oldest(tensors)

    def _start(self, message: Message, tensors: Mapping[UnitId, torch.Tensor]) -> None:
        buffer = None
        memory = self._direct(message, tensors)
        if memory is None:
            while not self._buffers:
                self._finish_oldest(tensors)
            buffer = self._buffers.pop()
            memory = buffer[: message.size]
            if self._me == message.reader:
                for part, piece in _parts(message, memory, tensors):
                    part.copy_(piece)
        self._flights.append(_Flight(message, tuple(self._post(message, memory)), buffer))

    def _direct(self, message: Message, tensors: Mapping[UnitId, torch.Tensor]) -> torch.Tensor | None:
        if len(message.segments) > 1:
            return None
        (segment,) = message.segments
        tensor = tensors[segment.unit]
        return as_bytes(tensor)[segment.start : segment.stop] if tensor.device.type == self._device.type else None

    def _post(self, message: Message, memory: torch.Tensor) -> Iterator[Any]:
        reader = dist.get_global_rank(self._group, message.reader)
        if len(message.receivers) + 1 == self._size:
            yield dist.broadcast(memory, src=reader, group=self._group, async_op=True)
        elif self._me == message.reader:
            for receiver in message.receivers:
                yield dist.isend(memory, dst=dist.get_global_rank(self._group, receiver), group=self._group)
        else:
            yield dist.irecv(memory, src=reader, group=self._group)

    def _finish_oldest(self, tensors: Mapping[UnitId, torch.Tensor]) -> None:
        flight = self._flights.popleft()
        for work in flight.works:
            work.wait()
        if flight.buffer is None:
            return
        if self._me != flight.message.reader:
            for part, piece in _parts(flight.message, flight.buffer, tensors):
                piece.copy_(part)
        self._buffers.append(flight.buffer)


def _parts(
    message: Message, memory: torch.Tensor, tensors: Mapping[UnitId, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of a message's memory, each with the piece of a tensor that it stands for."""
    at = 0
    for segment in message.segments:
        end = at + segment.stop - segment.start
        yield memory[at:end], as_bytes(tensors[segment.unit])[segment.start : segment.stop]
        at = end
