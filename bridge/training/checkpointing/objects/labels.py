"""What is stored beside each object that was uploaded: the checksum of its bytes."""

from __future__ import annotations

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.integrity import FileRecord

CHECKSUM = "bridge-checksum"
"""The key of it, so that an object is known again without reading it; nothing without it is deleted."""


def label_for(record: FileRecord) -> str:
    """The label of the object that a file becomes."""
    return f"{record.kind}:{record.checksum}"


def label_of_bytes(data: bytes) -> str:
    """The label of an object that is no file of a checkpoint."""
    return f"{checksums.DEFAULT}:{checksums.of_bytes(data)}"


def is_of(data: bytes, label: str) -> bool:
    """Whether nothing says that bytes are others than those that were labelled; another kind of label says nothing."""
    kind, _, digest = label.partition(":")
    return kind not in checksums.KINDS or checksums.of_bytes(data, kind) == digest
