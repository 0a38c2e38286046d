"""Checkpoints without a manifest: whether their files are as their own metadata needs them."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

from bridge.training.checkpointing.detection import format_of
from bridge.training.checkpointing.layout import DATALOADER_DIRECTORY, PAYLOAD_METADATA, TOKENIZER_DIRECTORY
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata

_MOST_CHUNKS = 1 << 20
"""Of one array; the names of more are not made."""


def payload_problems(path: Path) -> tuple[int, int, list[str]]:
    """Look at the files of a checkpoint that has no checksums.

    Returns:
        How many files there were to look at, their bytes, and a sentence for each that is missing or too short.

    Raises:
        CheckpointError: the metadata is unreadable.
        OSError: a file cannot be looked at.
    """
    if format_of(path).name == "zarr":
        return _of_arrays(path)
    if not (path / PAYLOAD_METADATA).is_file():
        files = [each for each in path.rglob("*") if each.is_file()]
        return len(files), sum(each.stat().st_size for each in files), []
    needed: dict[str, int] = {}
    for place in read_payload_metadata(path).storage_data.values():
        name = str(place.relative_path)
        needed[name] = max(needed.get(name, 0), int(place.offset) + int(place.length))
    problems = []
    for name, least in sorted(needed.items()):
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size < least:
            problems.append(f"{name} has {file.stat().st_size} bytes, and at least {least} belong to it")
    return len(needed), sum(needed.values()), problems


def _of_arrays(path: Path) -> tuple[int, int, list[str]]:
    """The chunks of all arrays that a Zarr checkpoint has."""
    from bridge.training.checkpointing.formats.zarr_metadata import read_metadata

    count = size = 0
    problems: list[str] = []
    beside = (TOKENIZER_DIRECTORY, DATALOADER_DIRECTORY)
    for each in sorted(found for found in path.iterdir() if found.is_dir() and found.name not in beside):
        array = read_metadata(path, each.name)
        if array is None:
            continue
        grid = [math.ceil(length / step) for length, step in zip(array.shape, array.chunk_shape, strict=True)]
        if math.prod(grid) > _MOST_CHUNKS:
            problems.append(f"{each.name} has {math.prod(grid)} chunks, too many to be looked for")
            continue
        for index in product(*map(range, grid)):
            name = f"{each.name}/{array.chunk_name(index)}"
            count += 1
            if not (path / name).is_file():
                problems.append(f"{name} is missing")
                continue
            found = (path / name).stat().st_size
            size += found
            if array.chunk_bytes is not None and found != array.chunk_bytes:
                problems.append(f"{name} has {found} bytes instead of {array.chunk_bytes}")
    return count, size, problems
