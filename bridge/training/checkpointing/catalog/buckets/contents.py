"""What is in one checkpoint in a bucket, from its metadata alone."""

from __future__ import annotations

from dataclasses import replace

from bridge.training.checkpointing.catalog.buckets.examining import downloaded
from bridge.training.checkpointing.catalog.buckets.listing import OPTIONS, entry_of
from bridge.training.checkpointing.catalog.contents import Contents, read_contents
from bridge.training.checkpointing.errors import CheckpointNotFoundError
from bridge.training.checkpointing.layout import DATALOADER_DIRECTORY, TOKENIZER_DIRECTORY
from bridge.training.checkpointing.objects.choosing import find_in_bucket
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import parse_marker
from bridge.training.checkpointing.objects.stored import look_at, small_files
from bridge.training.object_url import ObjectUrl

_UNREAD = tuple(f"{name}/" for name in (DATALOADER_DIRECTORY, TOKENIZER_DIRECTORY))
"""How the names of files begin that say nothing of what is listed."""


def contents_in_bucket(url: ObjectUrl, step: int | None = None, pattern: str = "*") -> Contents:
    """What is in a checkpoint.

    Args:
        url: a checkpoint, or a place of checkpoints, of which the tracked one is taken.
        step: the iteration.
        pattern: only tensors and objects whose keys match it, as in a shell.

    Raises:
        CheckpointError: there is none, it is damaged, or in a format that cannot be read here.
        ObjectStoreError: the store cannot be read.
    """
    store = ObjectStore(url.bucket, OPTIONS)
    found = find_in_bucket(store, url, step, fallback=False, setting="PATH")
    if not found:
        raise CheckpointNotFoundError(f"PATH: there is no checkpoint in {url}")
    place = ObjectUrl.parse(found[0].origin)
    marker, objects = look_at(store, place)
    manifest = parse_marker(marker, place)
    wanted = [record for record in small_files(manifest) if not record.name.startswith(_UNREAD)]
    with downloaded(store, place, wanted, marker) as directory:
        contents = read_contents(directory, pattern)
    sizes = {name: info.size for name, info in sorted(objects.items()) if name}
    return replace(contents, entry=entry_of(place, manifest), files=sizes)
