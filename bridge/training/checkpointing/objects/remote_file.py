"""An object that is read as a file is, by ranges."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.objects.client import ObjectInfo, ObjectStore
from bridge.training.object_url import ObjectUrl

_BLOCK = 64 << 10
"""Bytes that are read at once where less is asked for: what stands beside it is asked for next, as a rule."""
_KEPT = 32
"""Blocks."""


class RemoteFile:
    """One object. Several threads may read from it."""

    def __init__(self, store: ObjectStore, info: ObjectInfo, label: str = "") -> None:
        """
        Args:
            store: of its bucket.
            info: the object as it was listed.
            label: that it was uploaded with, see `labels`.
        """
        self._label = label
        self._store = store
        self._info = info
        self._lock = Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def __str__(self) -> str:
        return str(ObjectUrl(self._store.bucket, self._info.key))

    def read(self, into: memoryview, at: int) -> None:
        """Fill memory with what the object holds from byte `at` on.

        Raises:
            CheckpointDamagedError: it ends before that.
            ObjectStoreError: the store failed, or has another object there by now.
        """
        into = into.cast("B")
        end = at + len(into)
        if end > self._info.size:
            raise CheckpointDamagedError(f"{self} ends at byte {self._info.size}, and {at} to {end} are needed")
        if len(into) >= _BLOCK:
            self._store.read(self._info.key, into, at, self._info.etag or None, self._label)
            return
        done = 0
        while done < len(into):
            start = (at + done) // _BLOCK * _BLOCK
            block = self._block(start)[at + done - start :][: len(into) - done]
            into[done : done + len(block)] = block
            done += len(block)

    def _block(self, start: int) -> bytes:
        with self._lock:
            known = self._blocks.get(start)
            if known is not None:
                self._blocks.move_to_end(start)
                return known
        data = bytearray(min(_BLOCK, self._info.size - start))
        self._store.read(self._info.key, memoryview(data), start, self._info.etag or None, self._label)
        block = bytes(data)
        with self._lock:
            self._blocks[start] = block
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        return block
