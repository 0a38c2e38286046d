"""A number that tells whether two datasets serve their samples in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_PROBES = 256


def sample_order(dataset: Any) -> int:
    """A fingerprint of a dataset's sample order, as a non-negative 63-bit integer.

    megatron-core shuffles all epochs together, so the order depends on how many samples were asked for
    as soon as there is more than one epoch. A saved position means something only in the same order.
    A fixed number of entries of each index is read, whatever its size. Datasets that are not
    megatron-core's are told apart by their length alone.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    for index in _indices(dataset):
        digest.update(str(index.shape).encode())
        digest.update(np.ascontiguousarray(index[_probes(len(index))]).tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _indices(dataset: Any) -> Iterator[Any]:
    for name in ("document_index", "shuffle_index", "dataset_index", "dataset_sample_index"):
        if getattr(dataset, name, None) is not None:
            yield getattr(dataset, name)
    for part in getattr(dataset, "datasets", ()):
        yield from _indices(part)


def _probes(length: int) -> Any:
    return np.unique(np.linspace(0, max(length - 1, 0), num=min(length, _PROBES), dtype=np.int64))
