"""torchdata's StatefulDataLoader as a data iterator: what follows a resume is what would have followed anyway."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from bridge.training.data import (
    DataExhaustedError,
    DataStateError,
    MicroBatchSampler,
    StatefulLoaderIterator,
    TrainDataIterator,
    collate,
)
from tests.training.data.test_iterator import Numbers, indices

WORKERS = [0, 2]


class Stream(IterableDataset):  # type: ignore[type-arg]  # torch's class is generic in name only
    """Numbers that have no index: each worker gives its share, and knows how far it is."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.given = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        while self.given * workers + worker < self.length:
            index = self.given * workers + worker
            self.given += 1
            yield Numbers(self.length)[index]
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def shuffled(workers: int) -> StatefulLoaderIterator:
    loader = StatefulDataLoader(
        Numbers(10),
        batch_size=3,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        generator=torch.Generator().manual_seed(7),
        collate_fn=collate,
    )
    return StatefulLoaderIterator(loader)


def in_megatrons_order(workers: int) -> StatefulLoaderIterator:
    sampler = MicroBatchSampler(18, 2, 1, 2)
    return StatefulLoaderIterator(
        StatefulDataLoader(Numbers(18), batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    )


def by_distributed_sampler(workers: int) -> StatefulLoaderIterator:
    sampler: DistributedSampler[Any] = DistributedSampler(Numbers(12), 2, 1, shuffle=True, seed=3)
    loader = StatefulDataLoader(Numbers(12), batch_size=2, sampler=sampler, num_workers=workers, collate_fn=collate)
    return StatefulLoaderIterator(loader, set_epoch=sampler.set_epoch)


def from_a_stream(workers: int) -> StatefulLoaderIterator:
    return StatefulLoaderIterator(StatefulDataLoader(Stream(8), batch_size=2, num_workers=workers, collate_fn=collate))


LOADERS = [shuffled, in_megatrons_order, by_distributed_sampler, from_a_stream]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("make", LOADERS)
def test_a_resumed_loader_gives_what_the_uninterrupted_one_gives(make: Any, workers: int) -> None:
    """Over two and a half epochs; stopped at the start, inside an epoch, at its end, and in the next one."""
    batches = 10
    straight = make(workers)
    whole = [indices(next(straight)) for _ in range(batches)]
    assert straight.save_state()["epoch"] >= 2
    one = make(workers)
    for stop in range(7):
        if stop in (0, 2, 3, 4, 6):
            state = through_a_file(one.save_state())
            other = make(workers)
            other.load_state(state)
            assert [indices(next(other)) for _ in range(batches - stop)] == whole[stop:]
        # Saving has not moved the loader that was saved.
        assert indices(next(one)) == whole[stop]


def test_megatrons_order_is_that_of_our_own_iterator() -> None:
    theirs, ours = in_megatrons_order(0), TrainDataIterator(Numbers(18), 2, 1, 2)
    for _ in range(4):
        one, other = next(theirs), next(ours)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("make", LOADERS)
def test_reading_saving_and_loading_leave_the_random_numbers_of_training_alone(make: Any, workers: int) -> None:
    iterator = make(workers)
    before = torch.get_rng_state()
    state = iterator.save_state()
    for _ in range(5):
        next(iterator)
    iterator.load_state(state)
    next(iterator)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_that_was_saved_does_not_change_later() -> None:
    iterator = shuffled(0)
    next(iterator)
    state = iterator.save_state()
    copy = through_a_file(state)
    next(iterator)
    assert repr(state) == repr(copy)


def test_epochs_end() -> None:
    loader = StatefulDataLoader(Numbers(4), batch_size=2, collate_fn=collate)
    iterator = StatefulLoaderIterator(loader, epochs=2)
    assert [indices(batch) for batch in [next(iterator) for _ in range(4)]] == [[0, 1], [2, 3]] * 2
    for _ in range(2):
        with pytest.raises(DataExhaustedError, match="has given all its batches, 2 times over"):
            next(iterator)


def test_a_loader_without_batches_is_an_error_not_an_endless_loop() -> None:
    loader = StatefulDataLoader(Numbers(1), batch_size=2, drop_last=True, collate_fn=collate)
    with pytest.raises(DataExhaustedError, match="gave no batch"):
        next(StatefulLoaderIterator(loader))


@pytest.mark.parametrize("state", [{"consumed_samples": 4, "sample_order": 1}, [1]])
def test_the_state_of_another_kind_of_iterator_is_refused(state: Any) -> None:
    with pytest.raises(DataStateError, match=r"holds batches_of_epoch, epoch, loader; found .*: ignore"):
        shuffled(0).load_state(state)
