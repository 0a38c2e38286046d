"""Host memory as the readers need it: the memory of tensors, and room that is used again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch.nn import Parameter


def is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether stored bytes of a type can be put into a tensor's memory as they are."""
    return (
        (type(tensor) is torch.Tensor or type(tensor) is Parameter)
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (dtype.is_complex and tensor.is_conj())
        and not tensor.is_neg()
    )


def memory_at(address: int, size: int) -> memoryview:
    """`size` bytes of this process's memory. Whoever asks keeps alive what they belong to."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory."""
    return memory_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


class Scratch:
    """Buffers for several threads. A buffer that was given back is the next to be lent, its pages already there."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._lock = Lock()
        self._free: list[torch.Tensor] = []

    @contextmanager
    def lend(self, size: int) -> Iterator[torch.Tensor]:
        """A one-dimensional tensor of `size` bytes, for as long as the context lasts."""
        with self._lock:
            buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        try:
            yield buffer[:size]
        finally:
            with self._lock:
                self._free.append(buffer)
