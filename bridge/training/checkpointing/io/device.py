"""Copies from host memory to an accelerator while the next bytes are read.

Written for CUDA; the tests of this project run without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from threading import Lock
from typing import Any

import torch


class DeviceCopies:
    """Pinned buffers that are used again and again, and a stream for each device that copies from them."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        """Made in the thread whose work on the targets comes first: a stream is current for one thread only.

        Args:
            devices: those of the targets; others than CUDA's are passed over.
        """
        self._lock = Lock()
        self._free: list[tuple[torch.Tensor, Any]] = []
        """Buffers, each with the event after which it may be filled again."""
        self._streams = {device: _following_stream(device) for device in devices if device.type == "cuda"}

    @contextmanager
    def staged(self, target: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A pinned buffer for the values of `target` as `dtype`; when the context ends, they are copied there."""
        size = prod(target.shape) * dtype.itemsize
        stream = self._streams[target.device]
        with self._lock:
            buffer, copied = self._free.pop() if self._free else (None, None)
        if copied is not None:
            copied.synchronize()
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        yield buffer[:size]
        with torch.cuda.stream(stream):
            target.copy_(buffer[:size].view(dtype).view(target.shape), non_blocking=True)
            target.record_stream(stream)
            copied = stream.record_event()
        with self._lock:
            self._free.append((buffer, copied))

    def finish(self) -> None:
        """Wait for all copies."""
        for stream in self._streams.values():
            stream.synchronize()


def _following_stream(device: torch.device) -> Any:
    """A stream of its own that begins when this thread's work on the device is done."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
