"""What is restored and why not: a table over the saved and the wanted."""

from dataclasses import replace
from typing import Any

import pytest

from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.load_plan import Part, Saved, Wanted, plan_load

SAVED = Saved(
    iteration=10,
    release=False,
    layout=Layout(tensor=2, pipeline=2, data=2),
    layout_is_known=True,
    content_metadata={"distrib_optim_sharding_type": "dp_reshardable"},
    has_optimizer=True,
    has_rng=True,
    has_train_state=True,
    data_iterator_ranks=2,
)
WANTED = Wanted(
    layout=Layout(tensor=2, pipeline=2, data=2),
    load_optim=True,
    load_rng=True,
    has_optimizer=True,
    uses_distributed_optimizer=True,
)


def test_a_plain_resume_restores_everything() -> None:
    plan = plan_load(SAVED, WANTED)
    assert plan.table().splitlines() == [
        "  model          restored  always",
        "  optimizer      restored  saved and wanted",
        "  scheduler      restored  with the optimizer",
        "  rng            restored  saved and wanted",
        "  train state    restored  saved and wanted",
        "  data iterator  restored  saved and wanted",
    ]


@pytest.mark.parametrize(
    ("part", "saved", "wanted", "reason"),
    [
        ("optimizer", {}, {"has_optimizer": False}, "this run has no optimizer"),
        ("optimizer", {}, {"load_optim": False}, "checkpoint.load_optim is false"),
        ("optimizer", {"has_optimizer": False}, {}, "it was saved with checkpoint.save_optim: false"),
        ("optimizer", {"release": True}, {}, "it is a release checkpoint"),
        ("rng", {}, {"load_rng": False}, "checkpoint.load_rng is false"),
        ("rng", {"has_rng": False}, {}, "it was saved with checkpoint.save_rng: false"),
        (
            "rng",
            {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}},
            {"layout": Layout(tensor=2, pipeline=1, data=4)},
            "the pipeline size was 2 and is 1; all generators are seeded anew",
        ),
        ("rng", {"layout_is_known": False}, {}, "the checkpoint does not say under which parallel sizes it was saved"),
        ("optimizer", {}, {"model_only": "it is the pretrained checkpoint"}, "it is the pretrained checkpoint"),
        ("rng", {}, {"model_only": "it is the pretrained checkpoint"}, "it is the pretrained checkpoint"),
        ("train_state", {}, {"model_only": "it is the pretrained checkpoint"}, "it is the pretrained checkpoint"),
        ("data_iterator", {}, {"model_only": "it is the pretrained checkpoint"}, "it is the pretrained checkpoint"),
        (
            "data_iterator",
            {},
            {"load_dataloader_state": "ignore"},
            "checkpoint.load_dataloader_state is ignore; the position follows from the consumed samples",
        ),
        ("data_iterator", {"data_iterator_ranks": 0}, {}, "not saved; the position follows from the consumed samples"),
    ],
)
def test_parts_that_are_left_out_say_why(part: str, saved: dict[str, Any], wanted: dict[str, Any], reason: str) -> None:
    plan = plan_load(replace(SAVED, **saved), replace(WANTED, **wanted))
    assert getattr(plan, part) == Part(False, reason)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_the_data_of_another_number_of_ranks_is_divided_anew(mode: str) -> None:
    plan = plan_load(replace(SAVED, data_iterator_ranks=4), replace(WANTED, load_dataloader_state=mode))
    assert plan.data_iterator == Part(True, "saved by 4 data-parallel ranks and divided anew among 2")


def test_a_required_position_in_the_data_that_was_not_saved_is_an_error() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_load(replace(SAVED, data_iterator_ranks=0), replace(WANTED, load_dataloader_state="require"))
    assert str(caught.value) == (
        "checkpoint.load_dataloader_state is require, and the checkpoint holds no state of a data iterator; "
        "set it to auto to go on after the samples that the train state counts"
    )


def test_random_states_that_still_apply_are_restored_and_the_rest_seeded_anew() -> None:
    saved = replace(SAVED, content_metadata={"distrib_optim_sharding_type": "fully_reshardable"})
    plan = plan_load(saved, replace(WANTED, layout=Layout(tensor=1, pipeline=2, data=4)))
    reason = "the tensor size was 2 and is 1: tensor-parallel generators are seeded anew"
    assert plan.rng == Part(True, reason, partly=True)
    assert plan.reseed_rng
    assert f"  rng            partly    {reason}" in plan.table().splitlines()
    assert not plan_load(SAVED, WANTED).reseed_rng
    assert not plan_load(saved, replace(WANTED, layout=Layout(pipeline=1), load_rng=False)).reseed_rng


def test_a_release_checkpoint_keeps_its_counters_but_not_its_iteration() -> None:
    plan = plan_load(replace(SAVED, release=True), WANTED)
    reason = "a release checkpoint: counters without the iteration, which starts at 0"
    assert plan.train_state == Part(True, reason, partly=True)


def test_another_data_parallel_size_keeps_optimizer_and_random_states() -> None:
    plan = plan_load(SAVED, replace(WANTED, layout=Layout(tensor=2, pipeline=2, data=1)))
    assert plan.optimizer.restore
    assert plan.rng.restore


def test_optimizer_state_that_cannot_be_resharded_is_refused_unless_it_is_left_out() -> None:
    wanted = replace(WANTED, layout=Layout(tensor=1, pipeline=2, data=4))
    with pytest.raises(CheckpointMismatchError, match="with other model-parallel sizes, and the tensor size was 2 and"):
        plan_load(SAVED, wanted)
    plan = plan_load(SAVED, replace(wanted, load_optim=False))
    assert plan.model.restore
    assert not plan.optimizer.restore
