"""A checkpoint in object storage, as a load sees it.

Its small files are downloaded to each machine. Shards of `torch_dist` are read where they are, only the ranges that a
rank needs and straight into its tensors; those of other formats are downloaded first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.dataloader import DataloaderState, read_dataloader_state
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.formats import Loaded
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.formats.registry import format_to_read
from bridge.training.checkpointing.integrity import FileRecord, Level, Manifest
from bridge.training.checkpointing.io.elsewhere import Shards
from bridge.training.checkpointing.io.reading import ReadOptions
from bridge.training.checkpointing.layout import MANIFEST, TRAIN_STATE
from bridge.training.checkpointing.objects.client import ObjectInfo, ObjectStore
from bridge.training.checkpointing.objects.labels import label_for
from bridge.training.checkpointing.objects.listing import parse_marker
from bridge.training.checkpointing.objects.local_copy import LocalCopy, download, verify_in_place
from bridge.training.checkpointing.objects.remote_file import RemoteFile
from bridge.training.checkpointing.objects.transfer import MIB, TransferOptions
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.readable import ReadableFile
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe
from bridge.training.checkpointing.verification import require_undamaged, shares
from bridge.training.object_url import ObjectUrl

_PIECE = 16 * MIB


def read_options(threads: int) -> ReadOptions:
    """How shards are read by ranges: many requests at a time, because each takes long, and no small ones."""
    return ReadOptions(
        threads=threads,
        memory=(threads + 1) * _PIECE,
        gap=MIB,
        small=4 * MIB,
        small_part=MIB,
        batch=8 * MIB,
        spread=True,
    )


@dataclass(frozen=True)
class _Opened:
    """What is known of the checkpoint once it has been looked at."""

    store: ObjectStore
    manifest: Manifest
    objects: dict[str, ObjectInfo]
    copy: LocalCopy

    @property
    def shards(self) -> list[FileRecord]:
        is_shard = format_to_read(self.manifest.checkpoint_format).is_shard
        return [record for record in self.manifest.files if is_shard(record.name)]


def look_at(store: ObjectStore, place: ObjectUrl) -> tuple[bytes, dict[str, ObjectInfo]]:
    """A checkpoint's marker, and its objects by the names of its files, whose sizes are what the marker says.

    Raises:
        CheckpointDamagedError: that is not so.
        ObjectStoreError: the store failed.
    """
    marker = store.find(place.key(MANIFEST))
    if marker is None:
        raise CheckpointDamagedError(f"{place} has no {MANIFEST}, the last object of an upload")
    objects = objects_of(store, place)
    problems = differences_in_size(parse_marker(marker, place), objects)
    if problems:
        raise CheckpointDamagedError(f"{place} is damaged: {'; '.join(problems[:20])}")
    # The marker is deleted before another version's objects come, so all that were listed are of this one.
    if store.find(place.key(MANIFEST)) != marker:
        raise CheckpointDamagedError(f"{place} was replaced or deleted while it was looked at: load again")
    return marker, objects


def objects_of(store: ObjectStore, place: ObjectUrl) -> dict[str, ObjectInfo]:
    """The objects of a checkpoint by the names of its files."""
    home = place.key()
    return {info.key[len(home) :]: info for info in store.objects(home)}


def differences_in_size(manifest: Manifest, objects: Mapping[str, ObjectInfo]) -> list[str]:
    """One sentence for each file that is missing, or of another size than the manifest says."""
    problems = []
    for record in manifest.files:
        found = objects.get(record.name)
        if found is None:
            problems.append(f"{record.name} is missing")
        elif found.size != record.size:
            problems.append(f"{record.name} has {found.size} bytes instead of {record.size}")
    return problems


def small_files(manifest: Manifest) -> list[FileRecord]:
    """The files of a checkpoint that hold no shards."""
    is_shard = format_to_read(manifest.checkpoint_format).is_shard
    return [record for record in manifest.files if not is_shard(record.name)]


class ObjectCheckpoint:
    """One checkpoint in a bucket."""

    def __init__(self, source: Source, options: TransferOptions, integrity: Level = "sizes") -> None:
        """
        Args:
            source: as `find_in_bucket` gives it.
            options: how requests are made.
            integrity: how much of it is checked.
        """
        self.source = source
        self._place = ObjectUrl.parse(source.origin)
        self._options = options
        self._integrity = integrity
        self._known: _Opened | None = None

    def describe(self, ranks: Ranks) -> Saved:
        """Compare sizes with the manifest, download what is small, and read what it says about itself. Collective.

        Raises:
            CheckpointError: it is damaged, or this run cannot read it. Every rank raises.
        """
        store = ranks.run("connecting to object storage", lambda: ObjectStore(self._place.bucket, self._options))
        marker, objects = ranks.first(
            "looking at the checkpoint in object storage", lambda: look_at(store, self._place)
        )
        manifest = parse_marker(marker, self._place)
        copy = LocalCopy.make(self._place.name, ranks)
        self._known = known = _Opened(store, manifest, objects, copy)
        shards = ranks.run("telling shards from other files", lambda: {record.name for record in known.shards})
        small = [record for record in manifest.files if record.name not in shards]
        ranks.run("downloading the small files of the checkpoint", lambda: self._fetch(small, marker))
        local = replace(self.source, path=copy.directory)
        saved, _ = ranks.first("examining the checkpoint", lambda: describe(local, "off"))
        if self._integrity == "full":
            self._verify(ranks)
        return saved

    def load(self, template: dict[str, Any], ranks: Ranks, options: LoadOptions) -> Loaded:
        """Read shards by the checkpoint's format, by ranges where it can. Collective."""
        known = self._require_known()
        kind = format_to_read(known.manifest.checkpoint_format)
        if kind.reads_elsewhere and options.io_backend == "direct":
            shards = Shards(self._locate, self._fetch_shards, read_options(self._options.threads))
            options = replace(options, shards=shards)
        else:
            ranks.run("downloading the checkpoint", self._fetch_shards)
        return kind.load(template, known.copy.directory, ranks, options)

    def train_state(self) -> Mapping[str, Any]:
        """From `train_state.pt`."""
        return read_train_state(self._require_known().copy.directory / TRAIN_STATE)

    def data_iterator_state(self, data_parallel_rank: int, data_parallel_size: int) -> DataloaderState:
        """From the files in `dataloader_state/`."""
        return read_dataloader_state(self._require_known().copy.directory, data_parallel_rank, data_parallel_size)

    def close(self) -> None:
        """Delete what was downloaded. Call it on every rank, when none reads from it any more."""
        known, self._known = self._known, None
        if known is not None:
            known.copy.delete()

    def _fetch(self, records: list[FileRecord], marker: bytes) -> None:
        known = self._require_known()
        known.copy.directory.mkdir(parents=True, exist_ok=True)
        if known.copy.index == 0:
            (known.copy.directory / MANIFEST).write_bytes(marker)
        download(known.store, self._place, known.copy.share(records), known.copy.directory)

    def _fetch_shards(self) -> None:
        known = self._require_known()
        download(known.store, self._place, known.copy.share(known.shards), known.copy.directory)

    def _locate(self, name: str) -> tuple[ReadableFile, int]:
        known = self._require_known()
        info = known.objects.get(name)
        if info is None:
            raise CheckpointDamagedError(f"{self._place} has no {name}, which its metadata names")
        record = known.manifest.record(name)
        return RemoteFile(known.store, info, "" if record is None else label_for(record)), info.size

    def _verify(self, ranks: Ranks) -> None:
        known = self._require_known()
        own = shares(known.shards, ranks.size, every_byte=True)[ranks.rank]
        found = ranks.run("verifying the checkpoint", partial(verify_in_place, known.store, self._place, own))
        problems = sorted(text for part in ranks.gather_all("verifying", found[:20]) for text in part)
        require_undamaged(self.source.path, problems)

    def _require_known(self) -> _Opened:
        if self._known is None:
            raise RuntimeError("describe comes before everything else")
        return self._known
