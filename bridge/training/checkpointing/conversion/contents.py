"""What a converted checkpoint holds beside its parts: the common state, and the files that lie beside the payload.

Megatron FSDP's checkpoints name parameters one by one, and keep everything that is no tensor as objects of their own.
In the other formats their tensors keep their names, and their objects lie in the common state under a key that tells
where they come from; from there they come back. The other way round there is no way: which layers are stacked, which
halves a gated layer has, which parameters a flat buffer of the optimizer holds is known to the model alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.checksums import HashingStream
from bridge.training.checkpointing.conversion.comparing import same
from bridge.training.checkpointing.conversion.stores import FSDP_DTENSOR, ZARR, Store
from bridge.training.checkpointing.conversion.writers import DcpWriter, Written
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError, CheckpointSaveError
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.formats import Format
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage
from bridge.training.checkpointing.layout import COMMON, DATALOADER_DIRECTORY, MANIFEST, TRAIN_STATE
from bridge.training.checkpointing.plans.resharding import CONVERTED_FROM, SHARDING_TYPE
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.safe_globals import load_torch_file
from bridge.training.checkpointing.sidecar import torch_bytes

FSDP_OBJECTS = "fsdp_dtensor_objects"
"""Key of the common state under which the objects of a checkpoint of Megatron FSDP lie, by their own keys."""
_CONTENT_METADATA = "content_metadata"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Contents:
    """What is written beside the parts."""

    common: bytes | None
    """Of `common.pt`; None where the format has none."""
    objects: dict[str, Any]
    """For a checkpoint of Megatron FSDP: its objects, by key."""
    in_parts: dict[str, int]
    """The objects that belong to parts: by unique key, with their stored bytes."""
    sidecars: tuple[str, ...]
    """Names of the files that are copied as they are."""


def contents_of(path: Path, source: Format, target: str, store: Store, manifest: Manifest | None) -> Contents:
    """What is to be written beside the tensors. Local.

    Args:
        path: the checkpoint.
        source: its format.
        target: the name of the format that it is converted to.
        store: the checkpoint, open.
        manifest: its manifest.

    Raises:
        CheckpointMismatchError: it cannot be converted into this format.
        CheckpointError: a file is damaged, or holds what is not allowed.
    """
    sidecars = _sidecars(path, source, store, manifest)
    _require_safe(path, sidecars)
    common = source.read_common(path)
    if source.name == FSDP_DTENSOR:
        objects = store.read_objects(list(store.objects))
        content = {**(common.get(_CONTENT_METADATA) or {}), CONVERTED_FROM: FSDP_DTENSOR}
        common |= {_CONTENT_METADATA: content, FSDP_OBJECTS: objects}
        return Contents(torch_bytes(common), objects, {}, sidecars)
    if target != FSDP_DTENSOR:
        return Contents(contained_file(path, COMMON)[0].read_bytes(), {}, store.objects, sidecars)
    if not isinstance(common.get(FSDP_OBJECTS), dict) or store.objects:
        kind = (common.get(_CONTENT_METADATA) or {}).get(SHARDING_TYPE)
        raise CheckpointMismatchError(
            f"{path} cannot become {FSDP_DTENSOR!r}: only what was converted from {FSDP_DTENSOR!r} can. It was saved "
            f"without Megatron FSDP (its optimizer's sharding is {kind!r}). {FSDP_DTENSOR!r} stores parameters and "
            "their optimizer state one by one, under the names that Megatron FSDP gives them; how stacked layers, "
            "gated layers and the optimizer's flat buffers are taken apart for that is known to the model, and not "
            "to the checkpoint"
        )
    return Contents(None, common[FSDP_OBJECTS], {}, sidecars)


def _sidecars(path: Path, source: Format, store: Store, manifest: Manifest | None) -> tuple[str, ...]:
    """Everything that is neither payload nor the format's own."""
    if manifest is not None:
        names = [record.name for record in manifest.files]
    else:
        names = [each.relative_to(path).as_posix() for each in sorted(path.rglob("*")) if each.is_file()]
    arrays: set[str] = set()
    if source.name == ZARR:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        from bridge.training.checkpointing.formats.names import directory_name

        keys = [*store.tensors, *(ShardedObject.empty_from_unique_key(key).key for key in store.objects)]
        arrays = {directory_name(key) for key in keys}
    return tuple(
        name
        for name in names
        if name not in (MANIFEST, *source.files)
        and name.split("/", 1)[0] not in arrays
        and not (source.name != ZARR and source.is_shard(name))
    )


def _require_safe(path: Path, sidecars: Sequence[str]) -> None:
    """Read what a run would unpickle."""
    for name in sidecars:
        if name == TRAIN_STATE or (name.startswith(f"{DATALOADER_DIRECTORY}/") and name.endswith(".pt")):
            load_torch_file(contained_file(path, name)[0], "part of a checkpoint")


def write_contents(path: Path, staging: Path, contents: Contents, manifest: Manifest | None, number: int) -> Written:
    """Write and sync them; what an earlier try has left is overwritten. Local.

    Args:
        path: the checkpoint that is converted.
        staging: the checkpoint in the making.
        contents: what to write.
        manifest: of the first; files are held against it.
        number: that no part has.

    Raises:
        CheckpointDamagedError: a file is not what the manifest says.
        CheckpointSaveError: one cannot be written.
    """
    try:
        files = [_copied(path, staging, name, manifest) for name in contents.sidecars]
        if contents.common is not None:
            (staging / COMMON).unlink(missing_ok=True)
            write_file(staging / COMMON, contents.common)
            files.append(FileRecord.of_bytes(COMMON, contents.common).sampled(staging))
            return Written(tuple(files))
    except OSError as error:
        raise CheckpointSaveError(f"writing in {staging} failed: {error}") from error
    objects = DcpWriter(staging, has_sharded_objects=False).write(number, (), contents.objects.items())
    return Written((*files, *objects.files), objects.places)


def _copied(path: Path, staging: Path, name: str, manifest: Manifest | None) -> FileRecord:
    source, size = contained_file(path, name)
    target = staging / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        stream = HashingStream(writer)
        while block := reader.read(_BLOCK):
            stream.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    record = FileRecord(name, size, stream.checksum()).sampled(staging)
    if manifest is not None and find_damage(path, [r for r in manifest.files if r.name == name], checksums=True):
        raise CheckpointDamagedError(f"{path} is damaged: {name} is not what its {MANIFEST} says")
    return record


def require_same_contents(
    source: Store, target: Store, staging: Path, contents: Contents, target_format: Format, written: Written
) -> None:
    """Compare everything but the values of tensors, and of objects that belong to parts. Local.

    Raises:
        CheckpointSaveError: something differs.
    """
    problems = find_damage(staging, written.files, checksums=True)
    if source.tensors.keys() != target.tensors.keys():
        problems.append("its tensors are not the same")
    for key, tensor in source.tensors.items():
        found = target.tensors.get(key)
        if found is not None and (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            problems.append(f"{key} has become {found.dtype} of the shape {list(found.shape)}")
    if target_format.name == FSDP_DTENSOR:
        objects = target.read_objects(list(target.objects))
    else:
        objects = target_format.read_common(staging).get(FSDP_OBJECTS, {}) if contents.objects else {}
        if target.objects.keys() != contents.in_parts.keys():
            problems.append("its objects are not the same")
    if not same({key: contents.objects[key] for key in sorted(contents.objects)}, dict(sorted(objects.items()))):
        problems.append("its objects are not the same")
    if problems:
        raise CheckpointSaveError(
            f"what was written to {staging} is not the checkpoint: {'; '.join(problems[:5])}. Nothing was published"
        )
