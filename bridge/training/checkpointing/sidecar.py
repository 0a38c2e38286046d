"""Small files of a checkpoint, as bytes in memory until they are written."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sidecar:
    """A small file that lies beside the sharded payload, captured as bytes when the save began."""

    name: str
    """Path inside the checkpoint, with forward slashes."""
    data: bytes


def torch_bytes(value: Any) -> bytes:
    """What `torch.save` would write for `value`."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
