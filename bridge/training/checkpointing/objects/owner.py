"""Whose place in object storage it is: one object says which run uploads to it.

There are no locks in a bucket, so this does not keep two runs apart that begin at the same moment; it keeps a run from
the place of another one, and tells a run that another has taken its place. A run is known by the directory that it
uploads from: the same after a restart, and where the directory was renamed or is mounted elsewhere; another one for
every other directory and for a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.labels import CHECKSUM, label_of_bytes
from bridge.training.object_url import ObjectUrl

OWNER = ".bridge-owner"
"""The name of the object."""


@dataclass(frozen=True)
class BucketOwner:
    """A run that uploads to a place."""

    session: str
    host: str
    directory: str
    """That it uploads from."""
    since: str
    """When it took the place, as ISO 8601 says it."""
    body: str = ""
    """What tells the directory from its copies whatever its name is; as `body_of` gives it."""

    def __str__(self) -> str:
        return f"host {self.host}, directory {self.directory}, since {self.since}"

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> BucketOwner:
        """The reverse of `dataclasses.asdict`, also where JSON is between them.

        Raises:
            KeyError, TypeError: something is missing, or no text.
        """
        texts = {name: values[name] for name in ("session", "host", "directory", "since")}
        texts["body"] = values.get("body", "")
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("it holds what is no text")
        return cls(**texts)

    def is_same_run(self, other: BucketOwner) -> bool:
        """Whether both upload from one directory. The inode of a directory may change where its name does not."""
        return self.session == other.session or (self.body != "" and self.body == other.body)


def successor(found: BucketOwner | None, own: BucketOwner, *, is_start: bool, goes_on: bool) -> BucketOwner | None:
    """What the place is to say of its owner from now on; None if a run has no right to it. A decision only.

    Args:
        found: what it says; None where nobody has it.
        own: the run that asks.
        is_start: whether the run has not had it in this start yet. One that had it, and finds another there, has lost
            it.
        goes_on: whether the run goes on from what is in this place, and has nothing of its own beside it; or nothing
            is there.
    """
    if found is None:
        return own
    if found.is_same_run(own):
        return found
    return own if is_start and goes_on else None


def read_owner(store: ObjectStore, url: ObjectUrl) -> BucketOwner | None:
    """Who uploads to a place; None where nobody has said so.

    Raises:
        CheckpointDamagedError: the object is there and says something else.
        ObjectStoreError: the store cannot be read.
    """
    data = store.find(url.key(OWNER))
    if data is None:
        return None
    try:
        return BucketOwner.from_plain(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointDamagedError(
            f"{url / OWNER} does not say which run uploads there ({type(error).__name__}); if no other run does, "
            "delete this object"
        ) from error


def write_owner(store: ObjectStore, url: ObjectUrl, owner: BucketOwner) -> None:
    """Make a place say whose it is."""
    data = json.dumps(asdict(owner)).encode()
    store.put(url.key(OWNER), data, {CHECKSUM: label_of_bytes(data)})


def refusal(url: ObjectUrl, found: BucketOwner, setting: str) -> str:
    """Why a run cannot upload to the place of another one, and what to do about it."""
    return (
        f"{setting}: {url} belongs to another run ({found}), and two runs cannot upload to one place; set {setting} "
        f"to another place, or, if that run is over and this one is to have it, delete the object {url / OWNER}"
    )
