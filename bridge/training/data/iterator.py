"""Micro-batches for one data-parallel rank, at a position that a checkpoint can hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bridge.training.data.errors import DataExhaustedError, DatasetError, DataStateError
from bridge.training.data.order import sample_order
from bridge.training.signals import leave_signals_to_parent

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]

_REQUIRED_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_OPTIONAL_KEYS = ("attention_mask",)


class SampleDataset(Protocol):
    """What is iterated over: a known number of samples, each a mapping of tensors, reached by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class MicroBatchSampler:
    """The sample indices of one data-parallel rank's micro-batches.

    The order is that of Megatron-LM's MegatronPretrainingSampler: samples are taken in order, in
    blocks of `micro_batch_size * data_parallel_size`, of which rank r takes the r-th slice. A last
    block that is not whole is left out.
    """

    num_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    consumed_samples: int = 0

    @property
    def block(self) -> int:
        """Samples that all ranks together take for one micro-batch each."""
        return self.micro_batch_size * self.data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        offset = self.data_parallel_rank * self.micro_batch_size
        for start in range(self.consumed_samples, self.num_samples - self.block + 1, self.block):
            yield list(range(start + offset, start + offset + self.micro_batch_size))


class TrainDataIterator(Iterator[Batch]):
    """Iterates over this rank's micro-batches.

    Each batch is a dictionary of `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
    of shape [micro_batch_size, sequence_length]; `attention_mask` [micro_batch_size, 1, sequence_length,
    sequence_length] (bool, True where attention is forbidden) comes along if the dataset makes one.

    The position is the number of samples that all data-parallel ranks have consumed together, and nothing
    else. At a step boundary it is the same number whatever the data-parallel size, the micro-batch size
    or the number of micro-batches in a step, so each of them may differ after a resume.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Start after the first `consumed_samples` samples of the dataset's global order.

        Args:
            dataset: the same dataset on every rank.
            micro_batch_size: samples in one micro-batch of one rank.
            data_parallel_rank: this rank, from 0 to `data_parallel_size - 1`.
            data_parallel_size: ranks that share the samples.
            consumed_samples: samples consumed so far by all ranks.
            num_workers: processes that read ahead; 0 reads in this process. The batches are the same.

        Raises:
            DatasetError: a number is out of its range.
        """
        if micro_batch_size < 1:
            raise DatasetError(f"train.micro_batch_size is {micro_batch_size}; expected at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DatasetError(
                f"data-parallel rank {data_parallel_rank} does not exist in a data-parallel group of "
                f"{data_parallel_size}"
            )
        if num_workers < 0:
            raise DatasetError(f"dataset.num_workers is {num_workers}; expected 0 or more")
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._ranks = data_parallel_size
        self._num_workers = num_workers
        self._consumed = 0
        self._batches: Iterator[Batch] | None = None
        self._seek(consumed_samples)

    @property
    def consumed_samples(self) -> int:
        """Samples that all ranks have consumed, up to the last batch handed out."""
        return self._consumed

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataExhaustedError: too few samples are left for one more micro-batch of every rank.
        """
        if self._batches is None:
            self._batches = self._read_from(self._consumed)
        try:
            batch = next(self._batches, None)
        except BaseException:
            # Start over at this batch if asked again, instead of going on behind it.
            self.close()
            raise
        if batch is None:
            raise DataExhaustedError(
                f"the training data holds {len(self._dataset)} samples and {self._consumed} are consumed: "
                f"not enough for {self._ranks} data-parallel ranks with micro-batches of "
                f"{self._micro_batch_size}; the data is built for train.train_iters * "
                "train.global_batch_size samples"
            )
        self._consumed += self._micro_batch_size * self._ranks
        return batch

    def save_state(self) -> dict[str, int]:
        """The position, as plain integers: that of the last batch handed out, whatever was read ahead."""
        return {"consumed_samples": self._consumed, "sample_order": sample_order(self._dataset)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `save_state` gave, on any rank of a run of any data-parallel size.

        A state from a dataset in another order is accepted with a warning, because changing the data or
        adding iterations is legitimate; samples may then be repeated or left out.

        Raises:
            DataStateError: the state holds no position, or one beyond the end of this dataset.
        """
        consumed = state.get("consumed_samples")
        if not isinstance(consumed, int) or isinstance(consumed, bool):
            raise DataStateError(
                "a saved data position must hold the integer 'consumed_samples'; found "
                f"{consumed!r} among the keys {sorted(map(str, state))}"
            )
        if "sample_order" in state and state["sample_order"] != sample_order(self._dataset):
            logger.warning(
                "The training data is in another order than when the checkpoint was saved: another dataset, "
                "seed or sequence length, or another number of samples over more than one epoch. From sample "
                "%d on, samples may be repeated or left out. To continue the same order, keep the dataset "
                "section, train.train_iters and train.global_batch_size as they were.",
                consumed,
            )
        self._seek(consumed)

    def reshard_state(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Go to the position that the ranks of a run of another data-parallel size saved, one state each.

        The samples that follow are divided among this run's ranks; none is repeated or left out.

        Raises:
            DataStateError: the ranks were not at the same position, or `load_state` refuses it.
        """
        if (rank, size) != (self._rank, self._ranks):
            raise DataStateError(
                f"this is the iterator of data-parallel rank {self._rank} of {self._ranks}, not of {rank} of {size}"
            )
        positions = [state.get("consumed_samples") for state in states]
        if len(set(positions)) != 1:
            raise DataStateError(
                f"the data-parallel ranks that saved were at different samples: {positions}; "
                "set checkpoint.load_dataloader_state: ignore to go on after the samples that the train state counts"
            )
        self.load_state(states[0])

    def close(self) -> None:
        """Let go of reading processes and of what they have read ahead; the position stays."""
        self._batches = None

    def _seek(self, consumed_samples: int) -> None:
        if not 0 <= consumed_samples <= len(self._dataset):
            raise DataStateError(
                f"the data position is sample {consumed_samples}, but the training data holds "
                f"{len(self._dataset)}; train.train_iters * train.global_batch_size must reach beyond the "
                "samples consumed so far"
            )
        self._consumed = consumed_samples
        self.close()

    def _read_from(self, consumed_samples: int) -> Iterator[Batch]:
        sampler = MicroBatchSampler(
            len(self._dataset), self._micro_batch_size, self._rank, self._ranks, consumed_samples
        )
        if self._num_workers == 0:
            return (collate([self._dataset[index] for index in indices]) for indices in sampler)
        loader: DataLoader[Any] = DataLoader(
            self._dataset,  # type: ignore[arg-type]  # any object with len and [] will do
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self._num_workers,
            worker_init_fn=_prepare_worker,
            # Without its own generator a loader draws a seed from the default one, which would shift the
            # model's dropout at every resume.
            generator=torch.Generator(),
        )
        return iter(loader)


def _prepare_worker(_worker_id: int) -> None:
    """Launchers send SIGTERM to the process groups of the ranks; the step under way still needs its data."""
    leave_signals_to_parent()


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack samples along a new first dimension, keeping the keys that training reads."""
    keys = [*_REQUIRED_KEYS, *(key for key in _OPTIONAL_KEYS if key in samples[0])]
    return {key: torch.stack([sample[key] for sample in samples]) for key in keys}
