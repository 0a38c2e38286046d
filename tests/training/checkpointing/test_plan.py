"""What is restored and why not: a table over the saved and the wanted."""

from dataclasses import replace
from typing import Any

import pytest

from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plan import Part, Saved, Wanted, plan_load

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
        "  train state    restored  train_state.pt",
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
            {"layout": Layout(tensor=1, pipeline=2, data=4)},
            "the tensor size was 2 and is 1; seeded from rng.seed instead",
        ),
        (
            "rng",
            {"layout": Layout(expert=2, data=4)},
            {"layout": Layout(expert=2, data=2)},
            "the data size was 4 and is 2; seeded from rng.seed instead",
        ),
        ("train_state", {"release": True}, {}, "it is a release checkpoint"),
        ("train_state", {"has_train_state": False}, {}, "not saved"),
        (
            "data_iterator",
            {"data_iterator_ranks": 4},
            {},
            "saved by 4 data-parallel ranks, now there are 2; the position follows from the consumed samples",
        ),
        ("data_iterator", {"data_iterator_ranks": 0}, {}, "not saved; the position follows from the consumed samples"),
    ],
)
def test_parts_that_are_left_out_say_why(part: str, saved: dict[str, Any], wanted: dict[str, Any], reason: str) -> None:
    plan = plan_load(replace(SAVED, **saved), replace(WANTED, **wanted))
    assert getattr(plan, part) == Part(False, reason)


def test_another_data_parallel_size_keeps_optimizer_and_random_states() -> None:
    plan = plan_load(SAVED, replace(WANTED, layout=Layout(tensor=2, pipeline=2, data=1)))
    assert plan.optimizer.restore
    assert plan.rng.restore


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (
            {},
            {"layout": Layout(tensor=1, pipeline=2, data=4)},
            "the checkpoint's optimizer state is dp_reshardable: it can be loaded with another data-parallel size but "
            "not with other model-parallel sizes, and the tensor size was 2 and is 1; keep the sizes, or set "
            "checkpoint.load_optim: false to take only the model",
        ),
        (
            {"content_metadata": {}},
            {},
            "the checkpoint was saved with an optimizer that is not distributed and this run sets "
            "ddp.use_distributed_optimizer: true; set it to false, or set checkpoint.load_optim: false to take only "
            "the model",
        ),
        (
            {},
            {"uses_distributed_optimizer": False},
            "the checkpoint was saved with a distributed optimizer and this run sets "
            "ddp.use_distributed_optimizer: false; set it to true, or set checkpoint.load_optim: false to take only "
            "the model",
        ),
        (
            {"content_metadata": None},
            {},
            "the checkpoint does not say how its optimizer state is sharded (it was written by megatron-core 0.14 or "
            "older), and such state can no longer be loaded; set checkpoint.load_optim: false to take only the model",
        ),
    ],
)
def test_optimizer_state_that_cannot_be_resharded_is_refused(
    saved: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_load(replace(SAVED, **saved), replace(WANTED, **wanted))
    assert str(caught.value) == message
    assert plan_load(replace(SAVED, **saved), replace(WANTED, load_optim=False, **wanted)).model.restore
