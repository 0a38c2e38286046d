"""One checkpoint in a bucket: what its small files say of it. Its shards stay where they are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.layout import MANIFEST
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import parse_marker
from bridge.training.checkpointing.objects.loading import options_of
from bridge.training.checkpointing.objects.local_copy import download, verify_in_place
from bridge.training.checkpointing.objects.stored import look_at, small_files
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe
from bridge.training.checkpointing.verification import require_undamaged
from bridge.training.config import CheckpointConfig
from bridge.training.object_url import ObjectUrl


def examine(cfg: CheckpointConfig, source: Source, *, thorough: bool) -> Saved | None:
    """Check a checkpoint as a run would before it loads it.

    Args:
        cfg: of the run.
        source: in object storage.
        thorough: as much as the run would; otherwise only the marker and the sizes of all objects.

    Returns:
        What it says about itself; None if that was not read.

    Raises:
        CheckpointError: it is damaged, or cannot be read here.
        ObjectStoreError: the store failed.
    """
    place = ObjectUrl.parse(source.origin)
    store = ObjectStore(place.bucket, options_of(cfg))
    marker, _ = look_at(store, place)
    if not thorough:
        return None
    manifest = parse_marker(marker, place)
    small = small_files(manifest)
    with downloaded(store, place, small, marker) as directory:
        saved, _ = describe(replace(source, path=directory), "off")
    if cfg.integrity == "full":
        shards = [record for record in manifest.files if record not in small]
        require_undamaged(source.path, verify_in_place(store, place, shards))
    return saved


@contextmanager
def downloaded(
    store: ObjectStore, place: ObjectUrl, records: Sequence[FileRecord], marker: bytes | None = None
) -> Iterator[Path]:
    """Some files of a checkpoint, held against their checksums, in a directory that is deleted in the end.

    Errors about the directory name the place instead.

    Args:
        store: of its bucket.
        place: of the checkpoint.
        records: the files.
        marker: the bytes of its manifest, where that is to be there too.
    """
    with tempfile.TemporaryDirectory(prefix="bridge-view-") as view:
        directory = Path(view) / (place.name or "checkpoint")
        try:
            download(store, place, records, directory)
            if marker is not None:
                (directory / MANIFEST).write_bytes(marker)
            yield directory
        except CheckpointError as error:
            message = str(error).replace(str(directory), str(place))
            if message == str(error):
                raise
            raise type(error)(message) from error
