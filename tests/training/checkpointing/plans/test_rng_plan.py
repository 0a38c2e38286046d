"""Which random state a rank takes over, as tables and as properties over all layouts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.random_states import (
    Place,
    RngLayout,
    RngRequest,
    describe_changes,
    keeps_every_state,
    request_rng,
)

sizes = st.sampled_from([1, 2, 4])


@st.composite
def rng_layouts(draw: st.DrawFn) -> RngLayout:
    expert = draw(sizes)
    layout = Layout(
        tensor=draw(sizes),
        pipeline=draw(st.sampled_from([1, 2])),
        context=draw(st.sampled_from([1, 2])),
        expert=expert,
        data=expert * draw(sizes),
    )
    return RngLayout(layout, draw(st.booleans()))


def places(now: RngLayout) -> list[Place]:
    layout = now.layout
    return [
        Place(*place) for place in itertools.product(range(layout.pipeline), range(layout.tensor), range(now.replicas))
    ]


@given(rng_layouts())
def test_an_unchanged_layout_gives_every_rank_its_own_state(layout: RngLayout) -> None:
    assert keeps_every_state(layout, layout)
    for place in places(layout):
        request = request_rng(layout, layout, place)
        own = (place.pipeline, place.tensor)
        if layout.layout.expert > 1:
            expected = RngRequest(layout.shape, (*own, place.replica), 0, 0, True, True)
        else:
            expected = RngRequest(layout.shape, own, place.replica, 0, True, True)
        entry = place.replica if layout.data_parallel_random_init else 0
        assert request == RngRequest(**{**expected.__dict__, "entry": entry})


@given(rng_layouts(), rng_layouts())
def test_requests_stay_inside_what_was_saved(saved: RngLayout, now: RngLayout) -> None:
    for place in places(now):
        request = request_rng(saved, now, place)
        if request is None:
            continue
        assert request.shape == saved.shape
        assert all(0 <= index < size for index, size in zip(request.offset, request.shape, strict=True))
        assert 0 <= request.entry < (saved.replicas if saved.data_parallel_random_init else 1)


@given(rng_layouts(), rng_layouts())
def test_every_group_that_shares_reading_has_one_first_reader_of_each_shard(saved: RngLayout, now: RngLayout) -> None:
    """megatron-core's shared reading wants exactly one replica 0 of a shard in each data-parallel group."""
    for pipeline, tensor in itertools.product(range(now.layout.pipeline), range(now.layout.tensor)):
        requests = [
            request
            for replica in range(now.replicas)
            if (request := request_rng(saved, now, Place(pipeline, tensor, replica))) is not None
        ]
        for offset in {request.offset for request in requests}:
            readers = [request.replica_id for request in requests if request.offset == offset]
            assert readers.count(0) == 1
            assert len(set(readers)) == len(readers)


@given(rng_layouts(), rng_layouts())
def test_ranks_that_are_initialised_apart_never_share_a_state(saved: RngLayout, now: RngLayout) -> None:
    if not now.data_parallel_random_init:
        return
    for pipeline, tensor in itertools.product(range(now.layout.pipeline), range(now.layout.tensor)):
        requests = [request_rng(saved, now, Place(pipeline, tensor, replica)) for replica in range(now.replicas)]
        taken = [(request.offset, request.entry) for request in requests if request is not None]
        assert len(set(taken)) == len(taken)


@pytest.mark.parametrize(
    ("saved", "now", "place", "expected"),
    [
        # another data-parallel size: the replicas had equal states
        (Layout(data=2), Layout(data=4), Place(0, 0, 3), RngRequest((1, 1), (0, 0), 3, 0, True, True)),
        # another tensor size: the stage's states apply, the tensor-parallel one does not
        (Layout(tensor=2), Layout(data=2), Place(0, 0, 1), RngRequest((1, 2), (0, 0), 1, 0, False, False)),
        (Layout(), Layout(tensor=2), Place(0, 1, 0), RngRequest((1, 1), (0, 0), 0, 0, False, False)),
        # another pipeline size: nothing applies
        (Layout(pipeline=2), Layout(), Place(0, 0, 0), None),
        # expert parallelism, twice the replicas: rank 3 continues what its counterpart 1 had
        (
            Layout(expert=2, data=2),
            Layout(expert=2, data=4),
            Place(0, 0, 3),
            RngRequest((1, 1, 2), (0, 0, 1), 1, 0, True, True),
        ),
        # another expert size: the stage's and the tensor-parallel states apply
        (
            Layout(expert=2, data=2),
            Layout(data=2),
            Place(0, 0, 1),
            RngRequest((1, 1, 2), (0, 0, 0), 1, 0, True, False),
        ),
    ],
)
def test_table(saved: Layout, now: Layout, place: Place, expected: RngRequest | None) -> None:
    assert request_rng(RngLayout(saved), RngLayout(now), place) == expected


def test_the_log_says_what_changed() -> None:
    saved = RngLayout(Layout(tensor=2, expert=2, data=2))
    assert describe_changes(saved, RngLayout(Layout(pipeline=2))) == (
        "the pipeline size was 1 and is 2; all generators are seeded anew"
    )
    assert describe_changes(saved, RngLayout(Layout(data=4), data_parallel_random_init=True)) == (
        "the tensor size was 2 and is 1: tensor-parallel generators are seeded anew; "
        "the expert size was 2 and is 1: expert generators are seeded anew; "
        "data-parallel ranks from 1 on have no saved state and are seeded anew"
    )
