"""`fsdp_dtensor`: torch DCP files of DTensors, as Megatron FSDP shards a model.

Everything that is saved goes into the DCP payload: the sharded tensors, and the small rest as objects. Stock torch DCP
reads it. torch's own save and load are collectives from end to end; here what can fail on one rank is a local step that
all ranks agree on: each rank lists what it has to write, rank 0 joins the lists, each rank writes, and to load each
rank plans and reads alone.

In a template, a tensor is read into. None stands for everything at and below its key: for an object its value, else a
dictionary by the rest of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.checksums import DEFAULT
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats import Format, Loaded, PayloadWrite
from bridge.training.checkpointing.formats.apart import State, state_of
from bridge.training.checkpointing.formats.direct import DirectWrite
from bridge.training.checkpointing.formats.fsdp_dtensor_reading import Values, read_objects, read_values
from bridge.training.checkpointing.formats.options import LoadOptions, SaveOptions
from bridge.training.checkpointing.formats.writing import write_buckets
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io.framing import Frames
from bridge.training.checkpointing.io.image import FileContents
from bridge.training.checkpointing.layout import PAYLOAD_METADATA
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata

NAME = "fsdp_dtensor"
CONTENT_METADATA = "content_metadata"
_OPTIMIZER = "optimizer"
_SMALL = ("iteration", "checkpoint_version")
"""Objects of the state dict that tell what a checkpoint is."""


def create_fsdp_dtensor_storage_writer(checkpoint_path: str) -> FileSystemWriter:
    """torch DCP's writer of the files of one checkpoint, in the form that this format has them.

    Args:
        checkpoint_path: the checkpoint's own directory.
    """
    return FileSystemWriter(checkpoint_path, single_file_per_rank=True, sync_files=True)


def plan_save(
    state_dict: State,
    directory: Path,
    content_metadata: dict[str, Any],
    ranks: Ranks,
    options: SaveOptions,
) -> tuple[PayloadWrite, Any]:
    """Plan a save of a preprocessed state dict; with the `stock` backend, copy what this rank writes to host memory.

    As `formats.PlanSave` says. Each shard has one writer by nature, so there is nothing to share
    out, and no plan is kept for the next save.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    planner = _planner(ranks.is_first)

    def list_own() -> SavePlan:
        planner.set_up_planner(
            {**state_of(state_dict), CONTENT_METADATA: content_metadata}, is_coordinator=ranks.is_first
        )
        return planner.create_local_plan()

    own = ranks.run("listing what this rank writes", list_own)
    gathered = ranks.gather_first("collecting what every rank writes", own)
    joined = ranks.run("joining the lists of all ranks", lambda: None if gathered is None else _join(planner, gathered))
    # Ranks that hold copies of a tensor, or the same object, list it too; one of them writes it.
    left_out = ranks.first("sharing out the writing", lambda: joined.left_out if joined is not None else [])
    others = set(left_out[ranks.rank])
    items = [item for index, item in enumerate(own.items) if index not in others]
    stock = options.io_backend == "stock"
    buckets = ranks.run(
        "taking what this rank writes",
        lambda: _take(planner, items, directory, ranks.rank, options.writers_per_rank, copy=stock),
    )
    planned = _Planned(buckets, directory, None if joined is None else joined.metadata)
    if stock:
        return PayloadWrite(planned.write, planned.finish), None
    frames = options.strategy if isinstance(options.strategy, Frames) else Frames()
    direct = DirectWrite.of(lambda: map(_contents_of, buckets), directory, frames)
    return PayloadWrite(direct.write, planned.finish, direct=direct), frames


def load(template: dict[str, Any], directory: Path, ranks: Ranks, options: LoadOptions) -> Loaded:
    """Read into the tensors of a preprocessed state dict, and return the objects that it asks for.

    Args:
        template: what to load; see the module.
        directory: the checkpoint.
        ranks: all ranks; this is collective.
        options: how. Tensors that the checkpoint lacks are left as they are where its strictness drops or logs keys.
            Every rank reads its own shards and nothing twice, and DTensors cover what they are parts of.

    Raises:
        CheckpointDamagedError: a file cannot be read, on any rank.
        UnsafeCheckpointError: a file holds an object of a class that is not allowed, or leads out of the checkpoint.
        CheckpointMismatchError: keys, shapes or types do not fit.
    """
    metadata = ranks.run("reading what the checkpoint holds", lambda: read_payload_metadata(directory))
    request = ranks.run("listing what is to be loaded", lambda: _Request.of(template, metadata))
    values = read_values(
        request.tensors,
        request.objects,
        directory,
        metadata,
        ranks,
        strictness=options.strictness,
        io_backend=options.io_backend,
    )
    return request.loaded(values)


def read_common(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: content metadata, iteration, version, whether it has an optimizer. Local.

    Raises:
        UnsafeCheckpointError: an object is of a class that is not allowed.
        CheckpointDamagedError: the metadata or an object is unreadable.
    """
    metadata = read_payload_metadata(directory)
    keys = metadata.state_dict_metadata
    prefix = f"{CONTENT_METADATA}."
    wanted = [
        key
        for key, entry in keys.items()
        if isinstance(entry, BytesStorageMetadata) and (key in _SMALL or key.startswith(prefix))
    ]
    objects = read_objects(wanted, directory, metadata)
    content = {key[len(prefix) :]: value for key, value in objects.items() if key.startswith(prefix)}
    common = {key: value for key, value in objects.items() if key in _SMALL}
    # Another program's checkpoints have no content metadata; which way the state is sharded follows from the format.
    common[CONTENT_METADATA] = {"distrib_optim_sharding_type": NAME, **content}
    if any(key.startswith(f"{_OPTIMIZER}.") for key in keys):
        common[_OPTIMIZER] = {}
    return common


@dataclass(frozen=True)
class _Joined:
    metadata: Metadata
    left_out: list[list[int]]
    """By rank: positions in its list of what others write."""


def _planner(is_coordinator: bool) -> DefaultSavePlanner:
    planner = DefaultSavePlanner()
    planner.is_coordinator = is_coordinator
    return planner


def _join(planner: DefaultSavePlanner, gathered: list[SavePlan]) -> _Joined:
    try:
        plans, metadata = planner.create_global_plan(gathered)
    except ValueError as error:
        raise CheckpointSaveError(
            f"the shards of the ranks do not make up whole tensors, or overlap: {error}"
        ) from error
    left_out = []
    for before, after in zip(gathered, plans, strict=True):
        kept = {item.index for item in after.items}
        left_out.append([position for position, item in enumerate(before.items) if item.index not in kept])
    return _Joined(metadata, left_out)


def _contents_of(bucket: Any) -> FileContents:
    _, name, (objects, tensors) = bucket
    return FileContents(
        name,
        [(item.index, tensor) for item, tensor in tensors],
        [(item.index, data.getbuffer()) for item, data in objects],
    )


def _take(
    planner: DefaultSavePlanner, items: Iterable[Any], directory: Path, rank: int, files: int, *, copy: bool
) -> list[Any]:
    """Buckets of what this rank writes, as megatron-core's writer has them: path, name, (objects, tensors)."""
    buckets: list[Any] = []
    sizes = [0] * files
    for number in range(files):
        name = f"__{rank}_{number}.distcp"
        buckets.append((directory / name, name, ([], [])))
    for item in items:
        data: Any = planner.resolve_data(item)
        smallest = sizes.index(min(sizes))
        objects, tensors = buckets[smallest][2]
        if item.type == WriteItemType.BYTE_IO:
            objects.append((item, data))
            sizes[smallest] += data.getbuffer().nbytes
        else:
            # A shard is a part of a larger buffer, all of which torch would write.
            values = data.detach().to("cpu", copy=True).contiguous() if copy else data.detach()
            tensors.append((item, values))
            sizes[smallest] += values.nbytes
    return [bucket for bucket in buckets if bucket[2][0] or bucket[2][1]]


@dataclass(frozen=True)
class _Planned:
    """One rank's part of a save: buckets of host tensors and objects, a file each."""

    buckets: list[Any]
    directory: Path
    metadata: Metadata | None
    """Of the whole checkpoint, on rank 0."""

    def write(self, checksum: str = DEFAULT) -> tuple[list[FileRecord | str], Any]:
        """Write and sync this rank's files; return their records and torch's write results."""
        transforms = [create_fsdp_dtensor_storage_writer(str(self.directory)).transforms]
        written = write_buckets(transforms, self.buckets, checksum)
        return [record for record, _ in written], [result for _, results in written for result in results]

    def finish(self, results: list[Any]) -> list[str]:
        """Write `.metadata` from all ranks' write results; rank 0 only."""
        if self.metadata is None:
            raise CheckpointSaveError("the plan has no global metadata on this rank; only rank 0 can finish a save")
        create_fsdp_dtensor_storage_writer(str(self.directory)).finish(replace(self.metadata), results)
        return [PAYLOAD_METADATA]


@dataclass(frozen=True)
class _Request:
    """What one rank is going to load."""

    template: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    objects: list[str]
    """Keys of objects and of small tensors that are returned as values."""

    @classmethod
    def of(cls, template: dict[str, Any], metadata: Metadata) -> _Request:
        tensors: dict[str, torch.Tensor] = {}
        wanted: list[str] = []
        _collect(template, "", tensors, wanted)
        found = [
            key
            for prefix in wanted
            for key in metadata.state_dict_metadata
            if key == prefix or key.startswith(f"{prefix}.")
        ]
        return cls(template, tensors, found)

    def loaded(self, values: Values) -> Loaded:
        """What was read, in the template's structure."""

        def fill(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
            filled: dict[str, Any] = {}
            for key, value in tree.items():
                place = f"{path}{key}"
                if isinstance(value, Mapping):
                    filled[key] = fill(value, f"{place}.")
                elif value is None:
                    filled[key] = _below(values.objects, place)
                else:
                    filled[key] = value
            return filled

        return Loaded(fill(self.template, ""), bool(values.unexpected), values.missing, values.unexpected)


def _collect(tree: Mapping[str, Any], path: str, tensors: dict[str, torch.Tensor], wanted: list[str]) -> None:
    for key, value in tree.items():
        place = f"{path}{key}"
        if isinstance(value, Mapping):
            _collect(value, f"{place}.", tensors, wanted)
        elif isinstance(value, torch.Tensor):
            tensors[place] = value
        elif value is None:
            wanted.append(place)
        else:
            raise TypeError(f"{place} of a template is a {type(value).__name__}, neither a tensor nor None")


def _below(objects: Mapping[str, Any], place: str) -> Any:
    if place in objects:
        return objects[place]
    prefix = f"{place}."
    return {key[len(prefix) :]: value for key, value in objects.items() if key.startswith(prefix)}


FORMAT = Format(
    NAME,
    plan_save,
    load,
    read_common,
    files=(PAYLOAD_METADATA,),
    is_shard=lambda name: name.endswith(".distcp"),
)
