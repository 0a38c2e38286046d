"""What a data iterator is made from, and the one that is made by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bridge.training.data.iterator import Batch, SampleDataset, TrainDataIterator


@dataclass(frozen=True)
class IteratorRequest:
    """What the data iterator of one rank has to serve."""

    dataset: SampleDataset
    """The same on every rank."""
    micro_batch_size: int
    """Samples in one micro-batch of one rank."""
    data_parallel_rank: int
    """This rank. Tensor-, pipeline- and context-parallel ranks that share it must be given the same batches."""
    data_parallel_size: int
    consumed_samples: int
    """Samples that all ranks have consumed in earlier runs; a saved state is restored after building."""
    num_workers: int
    """Processes that read ahead, from `dataset.num_workers`."""


IteratorBuilder = Callable[[IteratorRequest], Iterator[Batch]]
"""Makes a rank's data iterator. Batches are those of `TrainDataIterator`; if the iterator has `save_state`,
`load_state` and `reshard_state`, its position is saved and restored."""


def build_train_iterator(request: IteratorRequest) -> TrainDataIterator:
    """The iterator that runs use unless they are given another builder."""
    return TrainDataIterator(
        request.dataset,
        request.micro_batch_size,
        request.data_parallel_rank,
        request.data_parallel_size,
        consumed_samples=request.consumed_samples,
        num_workers=request.num_workers,
    )
