"""What the metadata of a Zarr array says: shape, type, chunks and the names of their files. Data, never trusted.

Zarr has no types of its own for bfloat16 and the 8-bit floats: TensorStore knows them and zarr-python does not. Arrays
hold their bits as unsigned integers, which every library reads, and the attribute `torch_dtype` says what they are.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError, CheckpointSaveError
from bridge.training.checkpointing.safety.containment import contained_file

V3, V2 = "zarr.json", ".zarray"
"""The file that an array of each of Zarr's versions has."""
TORCH_DTYPE = "torch_dtype"
"""The attribute."""

_LARGEST = 1 << 20
"""Bytes of a metadata file."""
_DIMENSIONS = 32
_MOST_ELEMENTS = 2**63 - 1

_PLAIN: dict[str, torch.dtype] = {
    "bool": torch.bool,
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
"""Zarr's own types."""
_AS_BITS: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "uint16"),
    **{
        name: (getattr(torch, name), "uint8")
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
        if hasattr(torch, name)
    },
}
"""torch's types that Zarr lacks, and the type that has their bits."""
_BY_NAME = _PLAIN | {name: dtype for name, (dtype, _) in _AS_BITS.items()}
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}
_KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}
"""Of numpy's, in Zarr v2: `<f4`."""


def stored_type(dtype: torch.dtype) -> tuple[str, str]:
    """Zarr's type for one of torch's, and the value of the attribute `torch_dtype`.

    Raises:
        CheckpointSaveError: there is none.
    """
    if dtype not in _NAMES:
        raise CheckpointSaveError(
            f"a tensor of type {dtype} has no form in Zarr; use checkpoint.ckpt_format torch_dist"
        )
    name = _NAMES[dtype]
    return (_AS_BITS[name][1] if name in _AS_BITS else name), name


def bits_of(tensor: torch.Tensor) -> Any:
    """A CPU tensor's values as a numpy array, of the type that an array of it has. They share memory."""
    name = stored_type(tensor.dtype)[0]
    return tensor.view(_PLAIN[name]).numpy() if _PLAIN[name] != tensor.dtype else tensor.numpy()


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, by its metadata."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the values."""
    version: int
    """Of Zarr: 2 or 3."""
    chunk_shape: tuple[int, ...]
    chunk_bytes: int | None
    """Of every chunk's file; None if chunks are compressed."""
    prefix: tuple[str, ...]
    separator: str

    def chunk_name(self, index: Sequence[int]) -> str:
        """Path of a chunk's file inside the array's directory."""
        if not index and not self.prefix:
            return "0"
        return self.separator.join((*self.prefix, *map(str, index)))


def read_metadata(directory: Path, name: str) -> StoredArray | None:
    """The array in a directory of a checkpoint; None if there is none.

    Args:
        directory: the checkpoint.
        name: of the array's directory.

    Raises:
        CheckpointDamagedError: its metadata is unreadable, or contradicts itself.
        CheckpointMismatchError: it is an array of a kind that is not read here.
        UnsafeCheckpointError: a link leads out of the checkpoint.
    """
    for file, parse in ((V3, _version_3), (V2, _version_2)):
        if _exists(directory / name / file):
            path, size = contained_file(directory, f"{name}/{file}")
            try:
                if size > _LARGEST:
                    raise ValueError(f"it has {size} bytes")
                return parse(path.parent, json.loads(path.read_text()))
            except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
                raise CheckpointDamagedError(f"{path} does not describe an array: {_reason(error)}") from error
    return None


def _exists(path: Path) -> bool:
    try:
        return stat.S_ISLNK(path.lstat().st_mode) or path.exists()
    except OSError:
        return False


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _version_3(path: Path, content: Mapping[str, Any]) -> StoredArray:
    if content["zarr_format"] != 3 or content["node_type"] != "array":
        raise ValueError("it is not an array of Zarr v3")
    grid, keys = content["chunk_grid"], content["chunk_key_encoding"]
    if grid["name"] != "regular" or keys["name"] not in ("default", "v2"):
        raise CheckpointMismatchError(
            f"{path} has the chunk grid {grid['name']!r} and the chunk keys {keys['name']!r}, which are not read here"
        )
    is_default = keys["name"] == "default"
    chunk_shape = _shape(grid["configuration"]["chunk_shape"])
    dtype = _dtype(content["data_type"], content.get("attributes", {}).get(TORCH_DTYPE))
    plain = [codec["name"] for codec in content["codecs"]] == ["bytes"]
    return StoredArray(
        path,
        *_fitting(_shape(content["shape"]), dtype, chunk_shape),
        version=3,
        chunk_shape=chunk_shape,
        chunk_bytes=math.prod(chunk_shape) * dtype.itemsize if plain else None,
        prefix=("c",) if is_default else (),
        separator=_separator(keys.get("configuration", {}).get("separator", "/" if is_default else ".")),
    )


def _version_2(path: Path, content: Mapping[str, Any]) -> StoredArray:
    if content["zarr_format"] != 2:
        raise ValueError("it is not an array of Zarr v2")
    dtype, chunk_shape = _dtype(_version_2_type(content["dtype"]), None), _shape(content["chunks"])
    return StoredArray(
        path,
        *_fitting(_shape(content["shape"]), dtype, chunk_shape),
        version=2,
        chunk_shape=chunk_shape,
        chunk_bytes=math.prod(chunk_shape) * dtype.itemsize if content["compressor"] is None else None,
        prefix=(),
        separator=_separator(content.get("dimension_separator", ".")),
    )


def _version_2_type(text: Any) -> str:
    if text == "bfloat16":  # as megatron-core 0.8 wrote it, for TensorStore
        return "bfloat16"
    if not isinstance(text, str) or len(text) < 3 or text[1] not in _KINDS or not text[2:].isdecimal():
        raise ValueError(f"its dtype is {text!r}")
    return "bool" if text[1] == "b" else f"{_KINDS[text[1]]}{int(text[2:]) * 8}"


def _dtype(stored: Any, meant: Any) -> torch.dtype:
    if stored not in _BY_NAME:
        raise ValueError(f"its data type is {stored!r}")
    if meant is None or meant == stored:
        return _BY_NAME[stored]
    if meant not in _AS_BITS or _AS_BITS[meant][1] != stored:
        raise ValueError(f"its data type is {stored!r}, and its attribute {TORCH_DTYPE} is {meant!r}")
    return _AS_BITS[meant][0]


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _DIMENSIONS:
        raise ValueError("it has a shape that is none")
    if not all(type(size) is int and 0 <= size <= _MOST_ELEMENTS for size in value):
        raise ValueError(f"it has the shape {value}")
    return tuple(value)


def _fitting(
    shape: tuple[int, ...], dtype: torch.dtype, chunk_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], torch.dtype]:
    if len(shape) != len(chunk_shape) or 0 in chunk_shape:
        raise ValueError(f"its shape is {list(shape)}, and that of its chunks {list(chunk_shape)}")
    if math.prod(shape) * dtype.itemsize > _MOST_ELEMENTS:
        raise ValueError(f"it is larger than a tensor can be: {list(shape)}")
    return shape, dtype


def _separator(value: Any) -> str:
    if value not in ("/", "."):
        raise ValueError(f"it separates the numbers of a chunk by {value!r}")
    return str(value)
