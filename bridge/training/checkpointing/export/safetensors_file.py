"""The safetensors format, written piece by piece: its own library takes all values of a file at once.

A file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its type, its shape and
where its bytes begin and end behind the header), and the values, without gaps. The source for this is the format's
description in its library's repository.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.export.plan import Target

TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The format's names of types by torch's."""
_ALIGNMENT = 8
_METADATA = "__metadata__"


def header_of(targets: Sequence[Target], metadata: Mapping[str, str]) -> bytes:
    """Everything that stands before the values.

    Args:
        targets: in the order in which their values follow.
        metadata: about the file, for whoever opens it.

    Raises:
        CheckpointMismatchError: the format has no such type, or cannot have such a name.
    """
    entries: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for each in targets:
        if each.dtype not in TYPES:
            raise CheckpointMismatchError(
                f"{each.name} is of the type {each.dtype}, which safetensors files cannot hold; leave it out with "
                "--include, or give --dtype"
            )
        if each.name == _METADATA:
            raise CheckpointMismatchError(f"a tensor has the key {_METADATA}, which safetensors files use themselves")
        begin, end = end, end + each.nbytes
        entries[each.name] = {"dtype": TYPES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, header: bytes, values: Iterable[torch.Tensor]) -> int:
    """Write a new file and force it to storage.

    Args:
        path: the file.
        header: of `header_of`.
        values: of its tensors, in pieces, in their order.

    Returns:
        Its bytes.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("xb") as stream:
        stream.write(header)
        for value in values:
            stream.write(_bytes_of(value))
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()


def _bytes_of(value: torch.Tensor) -> memoryview:
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        raw = raw.reshape(-1, value.element_size())[:, ::-1].copy().reshape(-1)
    return raw.data
