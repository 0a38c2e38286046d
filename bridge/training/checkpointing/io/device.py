"""Copies from host memory to an accelerator while the next bytes are read.

Written for CUDA; the tests of this project run without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from threading import Lock
from typing import Any

import torch


class DeviceCopies:
    """Pinned buffers that are used again and again, and a stream for each device that copies from them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._free: list[tuple[torch.Tensor, Any]] = []
        """Buffers, each with the event after which it may be filled again."""
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def staged(self, target: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A pinned buffer for the values of `target` as `dtype`; when the context ends, they are copied there."""
        size = prod(target.shape) * dtype.itemsize
        with self._lock:
            stream = self._stream(target.device)
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

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            stream = torch.cuda.Stream(device)
            # What the training stream still does to the targets comes first.
            stream.wait_stream(torch.cuda.current_stream(device))
            self._streams[device] = stream
        return self._streams[device]
