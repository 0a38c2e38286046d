from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.training.data import DataExhaustedError, DatasetError, DataStateError, TrainDataIterator

SEQ_LENGTH = 3


class Numbers:
    """A dataset in which sample i consists of the number i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = torch.full((SEQ_LENGTH,), index)
        return {
            "tokens": sample,
            "labels": sample + 1,
            "loss_mask": torch.ones(SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH),
            "dataset_id": 0,
        }


def indices(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["tokens"][:, 0].tolist()


def stream(iterator: TrainDataIterator, batches: int) -> list[list[int]]:
    return [indices(next(iterator)) for _ in range(batches)]


def test_a_batch_holds_the_stacked_tensors_of_its_samples() -> None:
    batch = next(TrainDataIterator(Numbers(10), 2, 0, 1))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((2, SEQ_LENGTH), torch.int64),
        "labels": ((2, SEQ_LENGTH), torch.int64),
        "loss_mask": ((2, SEQ_LENGTH), torch.float32),
        "position_ids": ((2, SEQ_LENGTH), torch.int64),
    }
    assert batch["tokens"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[1, 1, 1], [2, 2, 2]]


def test_ranks_take_slices_of_consecutive_blocks() -> None:
    ranks = [TrainDataIterator(Numbers(16), 2, rank, 3, consumed_samples=4) for rank in range(3)]
    assert [stream(rank, 2) for rank in ranks] == [
        [[4, 5], [10, 11]],
        [[6, 7], [12, 13]],
        [[8, 9], [14, 15]],
    ]


def megatron_pretraining_sampler(
    total: int, consumed: int, micro_batch_size: int, rank: int, ranks: int
) -> list[list[int]]:
    """Megatron-LM's MegatronPretrainingSampler (megatron/training/datasets/data_samplers.py), drop_last."""
    batch: list[int] = []
    batches = []
    for index in range(consumed, total):
        batch.append(index)
        if len(batch) == micro_batch_size * ranks:
            start = rank * micro_batch_size
            batches.append(batch[start : start + micro_batch_size])
            batch = []
    return batches


@given(st.data())
def test_the_order_is_that_of_megatron_lm(data: st.DataObject) -> None:
    total, micro_batch_size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    ranks, consumed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, total))
    rank = data.draw(st.integers(0, ranks - 1))
    expected = megatron_pretraining_sampler(total, consumed, micro_batch_size, rank, ranks)
    iterator = TrainDataIterator(Numbers(total), micro_batch_size, rank, ranks, consumed)
    assert stream(iterator, len(expected)) == expected
    with pytest.raises(DataExhaustedError):
        next(iterator)


def run_steps(
    iterators: list[TrainDataIterator], micro_batches: list[int]
) -> tuple[list[list[int]], list[dict[str, int]]]:
    """One list of consumed samples a step, and the state of each rank at the end."""
    steps = []
    for count in micro_batches:
        step = [index for _ in range(count) for iterator in iterators for index in indices(next(iterator))]
        steps.append(step)
    return steps, [iterator.save_state() for iterator in iterators]


@given(st.data())
def test_resuming_repeats_and_skips_no_sample_whatever_changes_between_steps(data: st.DataObject) -> None:
    """Each segment is one run: its own parallel size, micro-batch size and (ramped) batch size, resumed
    from the state that any rank of the run before saved."""
    total = 400
    state = {"consumed_samples": 0}
    seen: list[int] = []
    for _ in range(data.draw(st.integers(1, 4))):
        ranks, micro_batch_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
        micro_batches = data.draw(st.lists(st.integers(1, 4), max_size=2))
        iterators = [TrainDataIterator(Numbers(total), micro_batch_size, r, ranks) for r in range(ranks)]
        for iterator in iterators:
            iterator.load_state(state)
        steps, states = run_steps(iterators, micro_batches)
        seen += [index for step in steps for index in step]
        state = data.draw(st.sampled_from(states))
        assert all(other == state for other in states)
        assert state["consumed_samples"] == len(seen)
    assert seen == list(range(len(seen)))


@given(ranks=st.integers(1, 3), micro_batch_size=st.integers(1, 3), stop=st.integers(0, 5))
def test_an_interrupted_rank_sees_what_an_uninterrupted_one_sees(ranks: int, micro_batch_size: int, stop: int) -> None:
    for rank in range(ranks):
        whole = stream(TrainDataIterator(Numbers(60), micro_batch_size, rank, ranks), 6)
        first = TrainDataIterator(Numbers(60), micro_batch_size, rank, ranks)
        before = stream(first, stop)
        second = TrainDataIterator(Numbers(60), micro_batch_size, rank, ranks)
        second.load_state(first.save_state())
        assert before + stream(second, 6 - stop) == whole


@settings(max_examples=5, deadline=None)
@given(workers=st.integers(1, 3), consumed=st.integers(0, 7), batches=st.integers(0, 6))
def test_workers_that_read_ahead_change_nothing(workers: int, consumed: int, batches: int) -> None:
    plain = TrainDataIterator(Numbers(40), 2, 1, 2, consumed)
    ahead = TrainDataIterator(Numbers(40), 2, 1, 2, consumed, num_workers=workers)
    assert stream(ahead, batches) == stream(plain, batches)
    # The workers have read further by now; the state is that of what was handed out.
    assert ahead.save_state() == plain.save_state()
    assert ahead.save_state()["consumed_samples"] == consumed + 4 * batches
    ahead.load_state({"consumed_samples": 8})
    assert stream(ahead, 2) == [[10, 11], [14, 15]]
    ahead.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_random_numbers_of_training_alone(workers: int) -> None:
    before = torch.get_rng_state()
    iterator = TrainDataIterator(Numbers(8), 2, 0, 1, num_workers=workers)
    stream(iterator, 2)
    iterator.load_state({"consumed_samples": 2})
    stream(iterator, 1)
    assert torch.equal(torch.get_rng_state(), before)
    iterator.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_running_out_is_a_clear_error_each_time(workers: int) -> None:
    iterator = TrainDataIterator(Numbers(9), 2, 0, 2, num_workers=workers)
    stream(iterator, 2)
    for _ in range(2):
        with pytest.raises(DataExhaustedError) as caught:
            next(iterator)
        assert str(caught.value) == (
            "the training data holds 9 samples and 8 are consumed: not enough for 2 data-parallel ranks with "
            "micro-batches of 2; the data is built for train.train_iters * train.global_batch_size samples"
        )
    assert iterator.consumed_samples == 8


def test_an_error_in_the_data_is_not_a_consumed_sample() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 4:
                raise OSError("unreadable")
            return super().__getitem__(index)

    iterator = TrainDataIterator(Broken(10), 2, 0, 1)
    stream(iterator, 2)
    for _ in range(2):
        with pytest.raises(OSError, match="unreadable"):
            next(iterator)
        assert iterator.consumed_samples == 4


def test_the_state_is_plain_integers() -> None:
    iterator = TrainDataIterator(Numbers(10), 2, 0, 1)
    next(iterator)
    assert {key: type(value) for key, value in iterator.save_state().items()} == {
        "consumed_samples": int,
        "sample_order": int,
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must hold the integer 'consumed_samples'; found None"),
        ({"consumed_samples": "7"}, "found '7'"),
        ({"consumed_samples": True}, "found True"),
        ({"consumed_samples": -1}, "the data position is sample -1, but the training data holds 10"),
        ({"consumed_samples": 11}, "the data position is sample 11, but the training data holds 10"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_moves_nothing(state: dict[str, Any], message: str) -> None:
    iterator = TrainDataIterator(Numbers(10), 2, 0, 1)
    next(iterator)
    with pytest.raises(DataStateError, match=message):
        iterator.load_state(state)
    assert stream(iterator, 1) == [[2, 3]]


def test_a_state_from_data_in_another_order_is_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = TrainDataIterator(Numbers(10), 2, 0, 1, consumed_samples=4).save_state()
    same, other = TrainDataIterator(Numbers(10), 2, 0, 1), TrainDataIterator(Numbers(12), 2, 0, 1)
    with caplog.at_level(logging.WARNING):
        same.load_state(state)
        assert not caplog.records
        other.load_state(state)
    assert "From sample 4 on, samples may be repeated or left out" in caplog.text
    assert other.consumed_samples == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "train.micro_batch_size is 0"),
        ((1, 2, 2), "rank 2 does not exist in a data-parallel group of 2"),
        ((1, -1, 2), "rank -1 does not exist"),
        ((1, 0, 1, 0, -1), "dataset.num_workers is -1"),
        ((1, 0, 1, 11), "sample 11, but the training data holds 10"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        TrainDataIterator(Numbers(10), *arguments)


@given(st.data())
def test_the_states_of_any_ranks_divide_the_data_anew(data: st.DataObject) -> None:
    """The samples of all ranks together go on without a gap, whatever the sizes before and after."""
    before, after = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    old = [TrainDataIterator(Numbers(200), 1, rank, before) for rank in range(before)]
    (_, states) = run_steps(old, data.draw(st.lists(st.integers(1, 4), max_size=3)))
    new = [TrainDataIterator(Numbers(200), 2, rank, after) for rank in range(after)]
    for rank, iterator in enumerate(new):
        iterator.reshard_state(states, rank, after)
    ((step,), _) = run_steps(new, [2])
    start = states[0]["consumed_samples"]
    assert step == list(range(start, start + 4 * after))


def test_ranks_that_stopped_at_different_samples_cannot_be_divided_anew() -> None:
    iterator = TrainDataIterator(Numbers(20), 1, 0, 1)
    with pytest.raises(DataStateError, match=r"were at different samples: \[4, 8\]; set checkpoint\.load_datal"):
        iterator.reshard_state([{"consumed_samples": 4}, {"consumed_samples": 8}], 0, 1)
    with pytest.raises(DataStateError, match="this is the iterator of data-parallel rank 0 of 1, not of 1 of 2"):
        iterator.reshard_state([{"consumed_samples": 4}], 1, 2)
