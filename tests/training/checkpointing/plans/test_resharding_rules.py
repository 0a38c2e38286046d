"""What a saved optimizer state can be loaded under: a table over the saved and the wanted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.contents.optimizer import build_sharded_state_dict_metadata
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.load_plan import Saved, Wanted
from bridge.training.checkpointing.plans.resharding import OptimizerForm, is_adapted, require_loadable, saved_form
from bridge.training.config import CheckpointConfig
from tests.training.resharding import DOCUMENT

DP = {"distrib_optim_sharding_type": "dp_reshardable"}
FULLY = {"distrib_optim_sharding_type": "fully_reshardable"}
DISTRIBUTED = OptimizerForm(distributed=True, main_params=True)
MIXED = OptimizerForm(distributed=False, main_params=True)
FP32 = OptimizerForm(distributed=False, main_params=False)

SAVED = Saved(
    iteration=10,
    release=False,
    layout=Layout(tensor=2, pipeline=2, data=2),
    layout_is_known=True,
    content_metadata=DP,
    has_optimizer=True,
    has_rng=True,
    has_train_state=True,
    data_iterator_ranks=2,
    optimizer_form=DISTRIBUTED,
    precision="bf16",
)
WANTED = Wanted(
    layout=SAVED.layout,
    load_optim=True,
    load_rng=True,
    has_optimizer=True,
    uses_distributed_optimizer=True,
    optimizer_form=DISTRIBUTED,
    precision="bf16",
)
PLAIN = {"uses_distributed_optimizer": False, "optimizer_form": MIXED}
SAVE_RESHARDABLE = (
    "start once more as it was saved, with checkpoint.dist_ckpt_optim_fully_reshardable: true, save, and load that"
)
MODEL_ONLY = "set checkpoint.load_optim: false to take only the model"

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "TP of dp_reshardable": (
        {},
        {"layout": Layout(tensor=1, pipeline=2, data=4)},
        "the checkpoint's optimizer state is dp_reshardable: it can be loaded with another data-parallel size but not "
        "with other model-parallel sizes, and the tensor size was 2 and is 1; keep the sizes, or "
        f"{SAVE_RESHARDABLE}, or {MODEL_ONLY}",
    ),
    "VPP and PP of dp_reshardable": (
        {},
        {"layout": Layout(tensor=2, pipeline=4, virtual_pipeline=2)},
        "the checkpoint's optimizer state is dp_reshardable: it can be loaded with another data-parallel size but not "
        "with other model-parallel sizes, and the pipeline size was 2 and is 4, the virtual-pipeline size was 1 and is "
        f"2; keep the sizes, or {SAVE_RESHARDABLE}, or {MODEL_ONLY}",
    ),
    "precision of dp_reshardable": (
        {},
        {"precision": "fp32"},
        "the checkpoint's optimizer state is dp_reshardable: it can only be loaded with the model.precision that it "
        f"was saved with, bf16, and this run sets fp32; keep it, or {SAVE_RESHARDABLE}, or {MODEL_ONLY}",
    ),
    "dp_reshardable into a plain optimizer": (
        {},
        PLAIN,
        "the checkpoint's optimizer state is dp_reshardable, which only a distributed optimizer can load, and this run "
        f"sets ddp.use_distributed_optimizer: false; set it to true, or {SAVE_RESHARDABLE}, or {MODEL_ONLY}",
    ),
    "no content metadata": (
        {"content_metadata": None},
        {},
        "the checkpoint does not say how its optimizer state is sharded (it was written by megatron-core 0.14 or "
        f"older), and such state can no longer be loaded; {MODEL_ONLY}",
    ),
    "a type of older versions": (
        {"content_metadata": {"distrib_optim_sharding_type": "fully_sharded_model_space"}},
        {},
        "the checkpoint's optimizer state is fully_sharded_model_space, which this version of megatron-core can no "
        f"longer read; {MODEL_ONLY}",
    ),
    "distributed without a type": (
        {"content_metadata": {}},
        {},
        "the checkpoint was saved with a distributed optimizer and does not say how its state is sharded; such state "
        f"cannot be loaded; {MODEL_ONLY}",
    ),
    "an unknown form": (
        {"content_metadata": {}, "optimizer_form": None},
        {},
        "the checkpoint was saved with an optimizer that is not distributed, in a form that cannot be translated, and "
        f"this run sets ddp.use_distributed_optimizer: true; set it to false, or {MODEL_ONLY}",
    ),
    "fp32 main parameters that are the model's": (
        {"content_metadata": {}, "optimizer_form": FP32, "precision": "fp32"},
        {},
        "the checkpoint was saved with an optimizer whose main parameters are the model's own, in fp32, and this run "
        f"keeps them apart (model.precision: bf16); set model.precision: fp32, or {MODEL_ONLY}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_reshard_is_refused_with_the_setting_that_would_have_allowed_it(case: str) -> None:
    saved, wanted, message = REFUSED[case]
    with pytest.raises(CheckpointMismatchError) as caught:
        require_loadable(replace(SAVED, **saved), replace(WANTED, **wanted))
    assert str(caught.value) == message


def test_the_documentation_shows_the_message() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        require_loadable(SAVED, replace(WANTED, layout=Layout(tensor=1, pipeline=2, data=4)))
    assert f"CheckpointMismatchError: {caught.value}" in " ".join(DOCUMENT.read_text().split())


SIZES = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
    virtual_pipeline=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]),
    expert=st.sampled_from([1, 2]),
    data=st.sampled_from([1, 2, 4]),
)


@given(saved=SIZES, wanted=SIZES)
def test_fully_reshardable_and_plain_state_follow_every_change_of_layout(saved: Layout, wanted: Layout) -> None:
    for metadata, form in ((FULLY, DISTRIBUTED), ({}, MIXED)):
        for own in ({}, PLAIN):
            require_loadable(
                replace(SAVED, layout=saved, content_metadata=metadata, optimizer_form=form),
                replace(WANTED, layout=wanted, **own),
            )


@given(saved=SIZES, wanted=SIZES)
def test_dp_reshardable_state_follows_data_and_context_parallelism_only(saved: Layout, wanted: Layout) -> None:
    same = replace(saved, data=1, context=1) == replace(wanted, data=1, context=1)
    try:
        require_loadable(replace(SAVED, layout=saved), replace(WANTED, layout=wanted))
    except CheckpointMismatchError:
        assert not same
    else:
        assert same


GROUPS = {"param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("section", "form"),
    [
        (None, None),
        ({}, None),
        ("something", None),
        ({"momentum": 1}, None),
        ({"state": {}, **GROUPS}, FP32),
        ({"optimizer": {"state": {}, **GROUPS}}, MIXED),
        ({"param_state_sharding_type": "dp_reshardable"}, DISTRIBUTED),
        ({"optimizer": GROUPS, "param_state_sharding_type": "fully_reshardable"}, DISTRIBUTED),
        ({0: {"state": {}, **GROUPS}, 1: {"state": {}, **GROUPS}}, replace(FP32, parts=2)),
        ({0: {"param_state_sharding_type": "x"}, 1: {"param_state_sharding_type": "x"}}, replace(DISTRIBUTED, parts=2)),
        ({0: {"param_state_sharding_type": "x"}, 1: {"optimizer": GROUPS}}, None),
    ],
)
def test_the_form_is_known_from_the_small_part_of_the_checkpoint(section: Any, form: OptimizerForm | None) -> None:
    assert saved_form(section) == form


@pytest.mark.parametrize(
    ("metadata", "saved", "wanted", "adapted"),
    [
        (FULLY, DISTRIBUTED, DISTRIBUTED, False),
        (FULLY, DISTRIBUTED, replace(DISTRIBUTED, main_params=False), False),  # both name them "param"
        (FULLY, DISTRIBUTED, replace(DISTRIBUTED, parts=2), True),
        (FULLY, DISTRIBUTED, MIXED, True),
        ({}, MIXED, DISTRIBUTED, True),
        ({}, MIXED, FP32, True),
        ({}, MIXED, MIXED, False),
        ({}, None, MIXED, False),
        (DP, DISTRIBUTED, DISTRIBUTED, False),
    ],
)
def test_only_another_form_is_translated(
    metadata: dict[str, Any], saved: OptimizerForm | None, wanted: OptimizerForm, adapted: bool
) -> None:
    assert is_adapted(metadata, saved, wanted) is adapted


@pytest.mark.parametrize(
    ("distributed", "settings", "expected"),
    [
        (False, {"dist_ckpt_optim_fully_reshardable": True}, {}),
        (True, {}, DP),
        (True, {"distrib_optim_fully_reshardable_mem_efficient": True}, DP),
        (
            True,
            {"dist_ckpt_optim_fully_reshardable": True},
            {**FULLY, "distrib_optim_fully_reshardable_mem_efficient": False},
        ),
        (
            True,
            {"dist_ckpt_optim_fully_reshardable": True, "distrib_optim_fully_reshardable_mem_efficient": True},
            {**FULLY, "distrib_optim_fully_reshardable_mem_efficient": True},
        ),
    ],
)
def test_content_metadata_says_how_the_state_is_sharded(
    distributed: bool, settings: dict[str, bool], expected: dict[str, Any]
) -> None:
    cfg = CheckpointConfig(**settings)
    cfg.check()
    assert build_sharded_state_dict_metadata(distributed, cfg) == {
        **expected,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
