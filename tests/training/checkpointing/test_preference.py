"""Which checkpoint of which tier a run starts from: every combination of what four tiers may hold."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.errors import CheckpointNotFoundError
from bridge.training.checkpointing.resolve import Offer, Persistent, Source, preference

SAVE = Path("/run")
OTHERS: tuple[CheckpointKind, ...] = ("in_memory", "local", "non_persistent_global")
HELD = (None, 4, 8)


def persistent(iteration: int | None, *, release: bool = False) -> Persistent:
    if iteration is None:
        return Persistent(None, 0, "checkpoint.ckpt_step: it is not there")
    return Persistent(Source(SAVE / str(iteration), release, "the tracker names it"), iteration)


def offer(kind: CheckpointKind, iteration: int) -> Offer:
    return Offer(kind, iteration, Path(f"/{kind}/{iteration}"))


def chosen(sources: list[Source]) -> list[tuple[CheckpointKind, int]]:
    return [(source.kind, int(source.path.name)) for source in sources]


@pytest.mark.parametrize("held", itertools.product(HELD, HELD, HELD, HELD))
def test_the_newest_wins_and_the_persistent_one_among_equals(held: tuple[int | None, ...]) -> None:
    own, *others = held
    offers = [offer(kind, iteration) for kind, iteration in zip(OTHERS, others, strict=True) if iteration is not None]
    for order in itertools.permutations(offers):
        found = chosen(preference(persistent(own), order, None))
        if not offers and own is None:
            assert found == []
            continue
        newest = max(iteration for iteration in held if iteration is not None)
        holders = [kind for kind, iteration in zip(("persistent", *OTHERS), held, strict=True) if iteration == newest]
        assert found[0] == (holders[0], newest)
        # What follows is for the case that the best turns out to be damaged: never newer, ending with the persistent.
        assert [iteration for _, iteration in found] == sorted((i for _, i in found), reverse=True)
        if own is not None:
            assert found[-1] == ("persistent", own)
            assert all(iteration > own for kind, iteration in found if kind != "persistent")


@pytest.mark.parametrize("held", itertools.product(HELD, HELD, HELD, HELD))
@pytest.mark.parametrize("step", [4, 8])
def test_an_explicit_step_is_taken_from_the_first_tier_that_has_it(held: tuple[int | None, ...], step: int) -> None:
    own, *others = held
    offers = [offer(kind, iteration) for kind, iteration in zip(OTHERS, others, strict=True) if iteration is not None]
    # With an explicit step the look for a persistent checkpoint finds that one or none.
    found_persistent = persistent(own if own == step else None)
    holders = [kind for kind, iteration in zip(("persistent", *OTHERS), held, strict=True) if iteration == step]
    if holders:
        assert chosen(preference(found_persistent, offers, step)) == [(holders[0], step)]
        return
    with pytest.raises(CheckpointNotFoundError) as caught:
        preference(found_persistent, offers, step)
    assert str(caught.value).startswith("checkpoint.ckpt_step: it is not there")
    for kept in offers:
        assert str(kept.iteration) in str(caught.value).partition("non-persistent checkpoints: ")[2]


def test_iteration_zero_of_a_tier_does_not_beat_a_release_checkpoint() -> None:
    release = persistent(0, release=True)
    assert chosen(preference(release, [offer("local", 0)], None)) == [("persistent", 0)]
    assert chosen(preference(release, [offer("local", 1)], None)) == [("local", 1), ("persistent", 0)]


def test_older_ones_of_a_tier_stand_behind_its_newest() -> None:
    offers = [offer("local", 6), offer("local", 9), offer("in_memory", 9), offer("local", 3)]
    expected = [("in_memory", 9), ("local", 9), ("local", 6), ("persistent", 4)]
    assert chosen(preference(persistent(4), offers, None)) == expected
