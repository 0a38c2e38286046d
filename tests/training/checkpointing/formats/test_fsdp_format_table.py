"""The table of formats: what each goes together with trains, saves, loads and goes on; everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import ConfigError
from tests.distributed.launch import init_ranks, run_ranks
from tests.training import fsdp, tiny, torch_fsdp2
from tests.training.tiny import tiny_config

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
DDP = {"use_distributed_optimizer": False}
DISTRIBUTED_OPTIMIZER = {"use_distributed_optimizer": True}
MEGATRON_FSDP = {"use_megatron_fsdp": True}
TORCH_FSDP2 = {"use_distributed_optimizer": False, "grad_reduce_in_fp32": True}
"""Of `ddp`; with it goes `dist.use_torch_fsdp2`."""

TICKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torch_dist, DDP": (DDP, {"ckpt_format": "torch_dist"}),
    "torch_dist, distributed optimizer": (DISTRIBUTED_OPTIMIZER, {"ckpt_format": "torch_dist"}),
    "torch_dist, async": (DISTRIBUTED_OPTIMIZER, {"ckpt_format": "torch_dist", "async_save": True}),
    "zarr, DDP": (DDP, {"ckpt_format": "zarr"}),
    "zarr, distributed optimizer": (DISTRIBUTED_OPTIMIZER, {"ckpt_format": "zarr"}),
    "fsdp_dtensor, Megatron FSDP": (MEGATRON_FSDP, {"ckpt_format": "fsdp_dtensor"}),
    "torch_dist, torch FSDP2": (TORCH_FSDP2, {"ckpt_format": "torch_dist"}),
    "torch_dist, torch FSDP2, async": (TORCH_FSDP2, {"ckpt_format": "torch_dist", "async_save": True}),
    "zarr, torch FSDP2": (TORCH_FSDP2, {"ckpt_format": "zarr"}),
}
"""Settings of `ddp` and `checkpoint`."""

CROSSES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "torch_dist, Megatron FSDP": (
        MEGATRON_FSDP,
        {"ckpt_format": "torch_dist"},
        "ddp.use_megatron_fsdp: true does not work with checkpoint.ckpt_format 'torch_dist'; "
        "set checkpoint.ckpt_format to 'fsdp_dtensor', or this to false",
    ),
    "zarr, Megatron FSDP": (
        MEGATRON_FSDP,
        {"ckpt_format": "zarr"},
        "ddp.use_megatron_fsdp: true does not work with checkpoint.ckpt_format 'zarr'; "
        "set checkpoint.ckpt_format to 'fsdp_dtensor', or this to false",
    ),
    "zarr, async": (
        DISTRIBUTED_OPTIMIZER,
        {"ckpt_format": "zarr", "async_save": True, "save": "/s"},
        "checkpoint.async_save: true does not work with checkpoint.ckpt_format 'zarr'; "
        "set ckpt_format to 'torch_dist', or async_save to false",
    ),
    "fsdp_dtensor, DDP": (
        DDP,
        {"ckpt_format": "fsdp_dtensor"},
        "checkpoint.ckpt_format: 'fsdp_dtensor' is for models under Megatron FSDP only; "
        "set ddp.use_megatron_fsdp to true, or ckpt_format to 'torch_dist'",
    ),
    "fsdp_dtensor, distributed optimizer": (
        DISTRIBUTED_OPTIMIZER,
        {"ckpt_format": "fsdp_dtensor"},
        "checkpoint.ckpt_format: 'fsdp_dtensor' is for models under Megatron FSDP only; "
        "set ddp.use_megatron_fsdp to true, or ckpt_format to 'torch_dist'",
    ),
    "fsdp_dtensor, async": (
        MEGATRON_FSDP,
        {"ckpt_format": "fsdp_dtensor", "async_save": True, "save": "/s"},
        "checkpoint.async_save: true does not work with checkpoint.ckpt_format 'fsdp_dtensor'; "
        "set ckpt_format to 'torch_dist', or async_save to false",
    ),
}
"""Settings of `ddp` and `checkpoint`, and the refusal."""

FURTHER_CROSSES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "another strategy": (
        {"ddp": {"data_parallel_sharding_strategy": "optim"}},
        "ddp.data_parallel_sharding_strategy: 'optim' trains wrongly with megatron-core 0.16; "
        "set it to 'optim_grads_params' or 'optim_grads'",
    ),
    "pipeline stages": (
        {"model": {"pipeline_model_parallel_size": 2}},
        "model.pipeline_model_parallel_size: 2 does not work with ddp.use_megatron_fsdp: the stages' parameters would "
        "be stored under the same names; set it to 1",
    ),
    "fp16": (
        {"model": {"precision": "fp16"}, "optimizer": {"loss_scale": 1.0}},
        "model.precision: 'fp16' does not work with ddp.use_megatron_fsdp: megatron-core 0.16 cannot unscale its "
        "gradients; set it to 'bf16' or 'fp32'",
    ),
    "an optimizer that is not distributed": (
        {"ddp": {"use_distributed_optimizer": False}},
        "ddp.use_distributed_optimizer: false does not work with ddp.use_megatron_fsdp, which shards the optimizer's "
        "state; set it to true",
    ),
    "averaging": (
        {"ddp": {"average_in_collective": True}},
        "ddp.average_in_collective: true does not work with ddp.use_megatron_fsdp, which scales the gradients of "
        "experts by another factor; set it to false",
    ),
    "steps that are run again": (
        {"rerun_state_machine": {"rerun_mode": "validate_results"}},
        "rerun_state_machine.rerun_mode: 'validate_results' does not work with ddp.use_megatron_fsdp; "
        "set it to 'disabled'",
    ),
    "local checkpoints": (
        {
            "checkpoint": {
                "save": "/s",
                "non_persistent_ckpt_type": "local",
                "non_persistent_local_ckpt_dir": "/l",
            }
        },
        "checkpoint.non_persistent_ckpt_type: 'local' does not work with checkpoint.ckpt_format 'fsdp_dtensor'; "
        "set it to 'global', or to null",
    ),
    "a strictness of other formats": (
        {"checkpoint": {"dist_ckpt_strictness": "raise_all"}},
        "checkpoint.dist_ckpt_strictness: 'raise_all' does not work with checkpoint.ckpt_format 'fsdp_dtensor'; "
        "leave it at 'assume_ok_unexpected'",
    ),
}
"""What else Megatron FSDP does not go together with: settings, and the refusal."""


TORCH_FSDP2_CROSSES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "a distributed optimizer": (
        {"ddp": {"use_distributed_optimizer": True}},
        "ddp.use_distributed_optimizer: true does not work with dist.use_torch_fsdp2, which shards the optimizer's "
        "state itself; set it to false",
    ),
    "gradients of another precision": (
        {"model": {"precision": "bf16"}},
        "ddp.grad_reduce_in_fp32: true does not work with dist.use_torch_fsdp2 and model.precision 'bf16': FSDP2 keeps "
        "and reduces gradients in bf16; set it to false",
    ),
    "a setting of buckets": (
        {"ddp": {"overlap_grad_reduce": True}},
        "ddp.overlap_grad_reduce: true has no effect with dist.use_torch_fsdp2; leave it at false",
    ),
    "pipeline stages": (
        {"model": {"pipeline_model_parallel_size": 2}},
        "model.pipeline_model_parallel_size: 2 does not work with dist.use_torch_fsdp2; set it to 1",
    ),
    "experts of their own ranks": (
        {"model": torch_fsdp2.MOE | {"expert_model_parallel_size": 2}},
        "model.expert_model_parallel_size: 2 does not work with dist.use_torch_fsdp2, which shards experts among the "
        "same ranks as all else; set it to 1",
    ),
    "experts that more ranks share": (
        {"model": torch_fsdp2.MOE | {"expert_tensor_parallel_size": 2}},
        "model.expert_tensor_parallel_size: 2 does not work with dist.use_torch_fsdp2, which shards experts among the "
        "same ranks as all else; leave it at null",
    ),
    "shared embeddings": (
        {"model": {"share_embeddings_and_output_weights": True}},
        "model.share_embeddings_and_output_weights: true does not work with dist.use_torch_fsdp2, which gathers the "
        "embedding for its own layer only; set it to false",
    ),
    "fp16": (
        {"model": {"precision": "fp16"}, "optimizer": {"loss_scale": 1.0}},
        "model.precision: 'fp16' does not work with dist.use_torch_fsdp2; set it to 'bf16' or 'fp32'",
    ),
    "gradients of megatron-core's own": (
        {"model": {"transformer_overrides": {"calculate_per_token_loss": True}}},
        "model.transformer_overrides.calculate_per_token_loss: true does not work with dist.use_torch_fsdp2; "
        "set it to false",
    ),
}
"""What torch FSDP2 does not go together with: settings, and the refusal."""


def run(name: str, **settings: Any) -> dict[str, Any]:
    ddp, checkpoint = TICKS[name]
    iterations = settings.pop("train_iters", 4)
    if ddp is MEGATRON_FSDP:
        return fsdp.run_to_end(fsdp.fsdp_config(train_iters=iterations, model=SMALL, **settings))
    if ddp is TORCH_FSDP2:
        chosen = (checkpoint if settings else {}) | settings
        return torch_fsdp2.run_to_end(torch_fsdp2.fsdp2_config(train_iters=iterations, **chosen))
    return tiny.run_to_end(
        tiny_config(
            train_iters=iterations,
            model=SMALL,
            ddp=ddp,
            scheduler={"lr_decay_iters": 8},
            checkpoint=(checkpoint if settings else {}) | settings,
        )
    )


def train_save_load_and_go_on(root: Path, names: list[str]) -> dict[str, tuple[bool, bool, int]]:
    init_ranks()
    found = {}
    for number, name in enumerate(names):
        path = str(root / str(number))
        whole = run(name)
        first = run(name, train_iters=2, save=path)
        second = run(name, save=path, load=path)
        found[name] = (bool(first["saved"]), whole["digests"] == second["digests"], second["started at"])
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # Two launches, because the groups of every run stay open.
    halves = [[name for name in TICKS if ("FSDP2" in name) is wanted] for wanted in (False, True)]
    found = [
        run_ranks(train_save_load_and_go_on, 2, tmp_path_factory.mktemp("ticks"), names, timeout=300)
        for names in halves
    ]
    return [first | second for first, second in zip(*found, strict=True)]


@pytest.mark.parametrize("name", TICKS)
def test_a_tick_trains_saves_loads_and_goes_on_bit_for_bit(name: str, outcomes: Any) -> None:
    assert [rank[name] for rank in outcomes] == [(True, True, 2)] * 2


@pytest.mark.parametrize("name", CROSSES)
def test_a_cross_is_refused(name: str) -> None:
    ddp, checkpoint, message = CROSSES[name]
    with pytest.raises(ConfigError) as refused:
        tiny_config(ddp=ddp, checkpoint=checkpoint).validate(world_size=2)
    assert str(refused.value) == message


@pytest.mark.parametrize("name", FURTHER_CROSSES)
def test_what_megatron_fsdp_does_not_go_together_with_is_refused(name: str) -> None:
    settings, message = FURTHER_CROSSES[name]
    cfg = tiny_config(**settings)
    cfg.ddp.use_megatron_fsdp, cfg.checkpoint.ckpt_format = True, "fsdp_dtensor"
    with pytest.raises(ConfigError) as refused:
        cfg.validate(world_size=2)
    assert str(refused.value) == message


def test_torch_fsdp2_does_not_go_together_with_megatron_fsdp_or_its_format() -> None:
    cfg = torch_fsdp2.fsdp2_config(ckpt_format="fsdp_dtensor")
    with pytest.raises(ConfigError) as refused:
        cfg.validate(world_size=2)
    assert str(refused.value).splitlines()[-1].strip(" -") == (
        "dist.use_torch_fsdp2: true does not work with checkpoint.ckpt_format 'fsdp_dtensor'; "
        "set checkpoint.ckpt_format to 'torch_dist', or this to false"
    )
    cfg.ddp.use_megatron_fsdp, cfg.ddp.use_distributed_optimizer = True, True
    with pytest.raises(ConfigError) as refused:
        cfg.validate(world_size=2)
    assert str(refused.value) == (
        "dist.use_torch_fsdp2: true does not work with ddp.use_megatron_fsdp; set one of them to false"
    )


@pytest.mark.parametrize("name", TORCH_FSDP2_CROSSES)
def test_what_torch_fsdp2_does_not_go_together_with_is_refused(name: str) -> None:
    settings, message = TORCH_FSDP2_CROSSES[name]
    cfg = torch_fsdp2.fsdp2_config(model=torch_fsdp2.MODEL | settings.get("model", {}), ddp=settings.get("ddp"))
    for setting, value in settings.get("optimizer", {}).items():
        setattr(cfg.optimizer, setting, value)
    with pytest.raises(ConfigError) as refused:
        cfg.validate(world_size=4)
    assert str(refused.value) == message


def load_into_the_other_kind(root: Path) -> dict[str, str]:
    init_ranks()
    sharded, plain = str(root / "sharded"), str(root / "plain")
    fsdp.run_to_end(fsdp.fsdp_config(train_iters=1, model=SMALL, save=sharded))
    tiny.run_to_end(
        tiny_config(train_iters=1, model=SMALL, scheduler={"lr_decay_iters": 8}, checkpoint={"save": plain})
    )
    found = {}
    for name, cfg in {
        "into DDP": tiny_config(model=SMALL, checkpoint={"load": sharded}),
        "into FSDP": fsdp.fsdp_config(model=SMALL, load=plain),
        "another precision": fsdp.fsdp_config(model=SMALL | {"precision": "bf16"}, load=sharded),
    }.items():
        try:
            fsdp.setup(cfg)
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_a_checkpoint_of_the_other_kind_is_refused_with_the_setting_that_decides(tmp_path: Path) -> None:
    expected = {
        "into DDP": "CheckpointMismatchError: the checkpoint is in the format fsdp_dtensor, which only a model under "
        "Megatron FSDP can load, and this run sets ddp.use_megatron_fsdp: false; set it to true, and "
        "checkpoint.ckpt_format: fsdp_dtensor",
        "into FSDP": "CheckpointMismatchError: the checkpoint is not in the format fsdp_dtensor, the only one that a "
        "model under Megatron FSDP can load, and this run sets ddp.use_megatron_fsdp: true; set it to false, and "
        "checkpoint.ckpt_format as it was",
        "another precision": "CheckpointMismatchError: the checkpoint's optimizer state is fsdp_dtensor: it can only "
        "be loaded with the model.precision that it was saved with, fp32, and this run sets bf16; keep it, or set "
        "checkpoint.load_optim: false to take only the model",
    }
    assert run_ranks(load_into_the_other_kind, 2, tmp_path) == [expected] * 2
