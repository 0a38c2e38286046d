"""`fsdp_dtensor` for real: train under Megatron FSDP, save, load under the same and under other world sizes, go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bridge.training.setup import Run, setup
from bridge.training.train import _save, train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.fsdp import MOE, SWIGLU, fsdp_config, run_to_end
from tests.training.tiny import tiny_config

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}

RESUMES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "gated layers in bf16": (2, {"precision": "bf16", **SWIGLU}, {}),
    "gradients and optimizer state only": (2, {}, {"data_parallel_sharding_strategy": "optim_grads"}),
    "TP2": (2, {**TP2, **SWIGLU}, {}),
    "EP2": (2, {**EP2, **MOE}, {}),
    "EP2 x DP2": (4, {"precision": "bf16", **EP2, **MOE}, {}),
    "TP2 x DP2": (4, {"precision": "bf16", **TP2, **SWIGLU}, {}),
}
"""World size, model and ddp settings; dropout is on in all."""


def resume(root: Path, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Every case of `RESUMES` of this world size: without interruption, until the save, and from there."""
    init_ranks()
    found = {}
    for name, (size, model, ddp) in RESUMES.items():
        if size == ranks:
            path = str(root / name.replace(" ", "-"))
            settings: dict[str, Any] = {"model": SMALL | model, "ddp": ddp}
            runs = [
                run_to_end(fsdp_config(**settings)),
                run_to_end(fsdp_config(train_iters=2, save=path, storage_writers_per_rank=2, **settings)),
                run_to_end(fsdp_config(save=path, load=path, strict_fsdp_dtensor_load=True, **settings)),
            ]
            found[name] = [{key: value for key, value in run.items() if key != "whole"} for run in runs]
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    root = tmp_path_factory.mktemp("resumed")
    by_name: dict[str, list[Any]] = {}
    for ranks in (1, 2, 4):
        for found in run_ranks(resume, ranks, root, ranks, timeout=300):
            for name, runs in found.items():
                by_name.setdefault(name, []).append(runs)
    return root, by_name


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_ends_like_one_without_interruption_bit_for_bit(name: str, resumed: Any) -> None:
    for whole, first, second in resumed[1][name]:
        assert first["saved"] == [("iter_0000002", 2, "persistent")]
        assert second["started at"] == 2
        assert second["saved"] == [("iter_0000004", 4, "persistent")]
        assert first["losses"] + second["losses"] == whole["losses"]
        assert second["digests"] == whole["digests"]


def test_a_checkpoint_consists_of_dcp_files_and_the_sidecars(resumed: Any) -> None:
    path = resumed[0] / "gated-layers-in-bf16/iter_0000002"
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {
        *(f"__{rank}_{number}.distcp" for rank in (0, 1) for number in (0, 1)),
        *(".metadata", "manifest.json", "run_config.yaml", "train_state.pt"),
        *(f"dataloader_state/train_dataloader_dprank00{rank}.pt" for rank in (0, 1)),
    }
    assert json.loads((path / "manifest.json").read_text())["checkpoint_format"] == "fsdp_dtensor"


def test_the_keys_are_those_that_other_programs_expect(resumed: Any) -> None:
    keys = FileSystemReader(resumed[0] / "gated-layers-in-bf16/iter_0000002").read_metadata().state_dict_metadata
    layer = "module.decoder.layers.0.mlp"
    assert {key for key in keys if layer in key and "param_to_group" not in key} == {
        *(f"model.{layer}.linear_fc1.weight_{half}" for half in "wv"),
        f"model.{layer}.linear_fc2.weight",
        *(
            f"optimizer.state.module.module.{layer}.{name}.{moment}"
            for name in ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight")
            for moment in ("exp_avg", "exp_avg_sq")
        ),
    }
    assert f"optimizer.param_to_group_meta.module.module.{layer}.linear_fc1.weight.step" in keys
    assert {"checkpoint_version", "iteration", "opt_param_scheduler.num_steps"} <= keys.keys()
    assert {key for key in keys if key.startswith("rng_state.") and key.endswith("torch_rng_state")} == {
        "rng_state.(0, 0).0.torch_rng_state"
    }


def test_experts_have_global_numbers_and_random_states_of_their_own(resumed: Any) -> None:
    keys = FileSystemReader(resumed[0] / "EP2-x-DP2/iter_0000002").read_metadata().state_dict_metadata
    experts = {key.split("local_experts.")[1].split(".")[0] for key in keys if "local_experts" in key}
    assert experts == {"0", "1", "2", "3"}
    assert {key.split(".")[2] for key in keys if key.startswith("rng_state.")} == {"0", "1", "2", "3"}


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model and of the optimizer in a checkpoint, whole, as stock torch DCP reads them."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("rng_state")
    }
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


LAYOUTS: dict[str, dict[int, dict[str, Any]]] = {
    "dense": {size: {"precision": "bf16", **SWIGLU} for size in (1, 2, 4)},
    "experts": {1: MOE, 2: {**EP2, **MOE}, 4: {**EP2, **MOE}},
    "tensor parallel": {1: SWIGLU, 2: {**TP2, **SWIGLU}, 4: {**TP2, **SWIGLU}},
}
"""By model: its settings for each world size."""

CHANGES = [("dense", source, ranks) for source in (1, 2, 4) for ranks in (1, 2, 4) if source != ranks] + [
    (name, 2, ranks) for name in ("experts", "tensor parallel") for ranks in (1, 4)
]
"""Model, the world size that saves, and the one that loads."""


def save_in_every_layout(root: Path, ranks: int) -> dict[str, list[float]]:
    init_ranks()
    losses = {}
    for name in sorted({name for name, source, _ in CHANGES if source == ranks}):
        model = SMALL | NO_DROPOUT | LAYOUTS[name][ranks]
        run = run_to_end(fsdp_config(model=model, save=str(root / f"{name}-{ranks}"), save_interval=2))
        losses[name] = run["losses"]
    return losses


def load_from_every_layout(root: Path, ranks: int) -> dict[tuple[str, int], list[float]]:
    """Load what other world sizes saved, save it at once, and go on."""
    init_ranks()
    losses: dict[tuple[str, int], list[float]] = {}
    for name, source, _ in (change for change in CHANGES if change[2] == ranks):
        cfg = fsdp_config(
            model=SMALL | NO_DROPOUT | LAYOUTS[name][ranks],
            load=str(root / f"{name}-{source}"),
            ckpt_step=2,
            save=str(root / f"{name}-{source}-{ranks}"),
            strict_fsdp_dtensor_load=True,
        )
        run = setup(cfg)
        _save(run, "persistent", None)
        losses[name, source] = losses_of(run)
    return losses


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    root = tmp_path_factory.mktemp("resharded")
    before = {size: run_ranks(save_in_every_layout, size, root, size, timeout=300)[0] for size in (1, 2, 4)}
    after = {size: run_ranks(load_from_every_layout, size, root, size, timeout=300)[0] for size in (1, 2, 4)}
    return root, before, after


@pytest.mark.parametrize(("name", "source", "ranks"), CHANGES)
def test_another_world_size_takes_over_every_value_and_goes_on(
    name: str, source: int, ranks: int, resharded: Any
) -> None:
    root, before, after = resharded
    saved = stored(root / f"{name}-{source}/iter_0000002")
    again = stored(root / f"{name}-{source}-{ranks}/iter_0000002")
    assert saved.keys() == again.keys()
    assert [key for key in saved if not torch.equal(saved[key], again[key])] == []
    assert not any(value.isnan().any() for value in saved.values())
    # Gradients are summed in another order, so the losses are not equal to the last bit.
    assert after[ranks][name, source] == pytest.approx(before[source][name][2:], abs=2e-3)


def losses_of(run: Run) -> list[float]:
    """Train to the end; the loss of every step."""
    seen: list[float] = []
    run.callback_manager.register("on_train_step_end", lambda _: seen.append(run.state.metrics["loss"]))
    train(run)
    return seen


def train_both_ways() -> list[tuple[list[float], list[float]]]:
    init_ranks()
    pairs = []
    for model in ({}, MOE | EP2, TP2):
        settings = SMALL | NO_DROPOUT | model
        other = tiny_config(model=settings, scheduler={"lr_decay_iters": 8})
        pairs.append((losses_of(setup(other)), run_to_end(fsdp_config(model=settings))["losses"]))
    return pairs


@pytest.mark.parametrize("ranks", [2, 4])
def test_megatron_fsdp_trains_like_ddp(ranks: int) -> None:
    """Also where a group that shares parameters has one rank only, with several micro-batches."""
    for plain, sharded in run_ranks(train_both_ways, ranks, timeout=300)[0]:
        assert sharded == pytest.approx(plain, abs=1e-4)
