"""Which parts of a real checkpoint reach a run: pretrained, finetune, main parameters, strictness, random states."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel

from bridge.training.checkpointing import CheckpointError
from bridge.training.checkpointing.loading import load_checkpoint_from_path
from bridge.training.config import ConfigError
from bridge.training.setup import Run, setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, run_to_end, tiny_config

MOE = {
    "expert_model_parallel_size": 2,
    "num_moe_experts": 4,
    "moe_aux_loss_coeff": 0.01,
    "add_bias_linear": False,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2 and 4, from two ranks."""
    save = tmp_path_factory.mktemp("saved")
    run_ranks(run_to_end, 2, tiny_config(train_iters=4, checkpoint={"save": str(save), "save_interval": 2}))
    return save


def model_digests(run: Run) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if name.startswith("model")}


def started(cfg: Any) -> dict[str, Any]:
    """Set up and report what the run starts with, or the error."""
    try:
        run = setup(cfg)
    except CheckpointError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {
        "step": run.state.train_state.step,
        "samples": run.state.train_state.consumed_train_samples,
        "from": run.state.loaded_from,
        "model": model_digests(run),
        "scheduled": run.scheduler.num_steps,
        "all": digests(run),
    }


def on_two(**checkpoint: Any) -> dict[str, Any]:
    first, _ = run_ranks(started, 2, tiny_config(train_iters=6, checkpoint=checkpoint))
    return first


def test_a_pretrained_checkpoint_gives_the_model_until_load_has_one(saved: Path, tmp_path: Path) -> None:
    resumed = on_two(load=str(saved))
    for pretrained in (saved, saved / "iter_0000004"):
        fresh = on_two(pretrained_checkpoint=str(pretrained), load=str(tmp_path / "mine"))
        assert (fresh["step"], fresh["samples"], fresh["scheduled"]) == (0, 0, 0)
        assert fresh["from"] == str(saved / "iter_0000004")
        assert fresh["model"] == resumed["model"]
    alone = on_two(pretrained_checkpoint=str(saved))
    assert alone["model"] == resumed["model"]
    shutil.copytree(saved / "iter_0000002", tmp_path / "mine" / "iter_0000002")
    assert on_two(pretrained_checkpoint=str(saved), load=str(tmp_path / "mine"))["step"] == 2


def test_ckpt_step_applies_to_load_only(saved: Path, tmp_path: Path) -> None:
    load = str(shutil.copytree(saved, tmp_path / "mine"))
    shutil.rmtree(tmp_path / "mine" / "iter_0000004")
    assert on_two(pretrained_checkpoint=str(saved), load=load, ckpt_step=2)["step"] == 2
    missing = on_two(pretrained_checkpoint=str(saved), load=load, ckpt_step=4)
    assert missing["error"] == "CheckpointNotFoundError"


def test_a_pretrained_checkpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    missing = on_two(pretrained_checkpoint=str(tmp_path / "absent"))
    assert missing == {
        "error": "CheckpointNotFoundError",
        "message": f"checkpoint.pretrained_checkpoint: there is no checkpoint in {tmp_path / 'absent'}",
    }


def test_finetune_takes_only_the_model_from_load(saved: Path) -> None:
    tuned = on_two(load=str(saved), finetune=True)
    assert (tuned["step"], tuned["samples"], tuned["scheduled"]) == (0, 0, 0)
    assert tuned["model"] == on_two(load=str(saved))["model"]


def test_a_release_checkpoint_gives_model_and_counters(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "iter_0000004", tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    released = on_two(load=str(tmp_path))
    assert (released["step"], released["samples"], released["scheduled"]) == (0, 32, 0)
    assert released["from"] == str(tmp_path / "release")
    assert released["model"] == on_two(load=str(saved))["model"]


def main_parameters(cfg: Any) -> dict[str, Any]:
    """The float32 main parameters and the model's own, by name, of a run with a plain optimizer."""
    run = setup(cfg)
    named = dict(run.model[0].named_parameters())
    return {
        name: (getattr(parameter, "main_param", parameter).detach().float().numpy(), parameter.detach().float().numpy())
        for name, parameter in named.items()
    }


def test_main_parameters_come_from_the_checkpoint_at_the_saved_precision(saved: Path) -> None:
    exact = run_ranks(main_parameters, 1, tiny_config(train_iters=6, checkpoint={"load": str(saved)}))[0]
    half = {"model": {"precision": "bf16"}, "ddp": {"use_distributed_optimizer": False}, "train_iters": 6}
    checkpoint = {"load": str(saved), "load_optim": False}
    rounded = run_ranks(main_parameters, 1, tiny_config(**half, checkpoint=checkpoint))[0]
    checkpoint = checkpoint | {"load_main_params_from_ckpt": True}
    taken = run_ranks(main_parameters, 1, tiny_config(**half, checkpoint=checkpoint))[0]
    names = {name.replace("module.module.", "module."): name for name in taken}
    assert set(names) == set(exact)
    for name, half_name in names.items():
        main, own = taken[half_name]
        assert np.array_equal(main, exact[name][0]), name
        assert np.array_equal(own, torch.from_numpy(main).bfloat16().float().numpy()), name
    assert any(not np.array_equal(rounded[half_name][0], exact[name][0]) for name, half_name in names.items())


def warnings_of(cfg: Any) -> tuple[dict[str, Any], list[str]]:
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bridge").addHandler(handler)
    return started(cfg), records


BIGGER = {"num_layers": 4, "add_bias_linear": True, "normalization": "LayerNorm"}


@pytest.mark.parametrize(
    ("strictness", "outcome"),
    [
        ("assume_ok_unexpected", "CheckpointMismatchError"),
        ("raise_unexpected", "CheckpointMismatchError"),
        ("raise_all", "CheckpointMismatchError"),
        ("log_unexpected", "started"),
        ("log_all", "started"),
        ("return_unexpected", "started"),
        ("return_all", "started"),
        ("ignore_all", "started"),
    ],
)
def test_strictness_when_the_checkpoint_lacks_keys(saved_without_bias: Path, strictness: str, outcome: str) -> None:
    checkpoint = {"load": str(saved_without_bias), "load_optim": False, "dist_ckpt_strictness": strictness}
    found, warnings = run_ranks(warnings_of, 1, tiny_config(train_iters=6, checkpoint=checkpoint))[0]
    assert found.get("error", "started") == outcome
    if outcome != "started":
        assert f"checkpoint.dist_ckpt_strictness is '{strictness}'" in found["message"]
    if strictness.startswith("return_"):
        assert any(
            w.startswith("requested but not in the checkpoint: decoder.layers.mlp.linear_fc1.bias") for w in warnings
        )


@pytest.fixture(scope="module")
def saved_without_bias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("without-bias")
    cfg = tiny_config(train_iters=2, checkpoint={"save": str(save)}, model={"add_bias_linear": False})
    run_ranks(run_to_end, 1, cfg)
    return save


@pytest.mark.parametrize(
    ("strictness", "outcome"), [("raise_unexpected", "started"), ("raise_all", "CheckpointMismatchError")]
)
def test_strictness_when_the_checkpoint_has_more_keys(saved: Path, strictness: str, outcome: str) -> None:
    checkpoint = {"load": str(saved), "load_optim": False, "dist_ckpt_strictness": strictness}
    model = {"add_bias_linear": False}
    found = run_ranks(started, 1, tiny_config(train_iters=6, checkpoint=checkpoint, model=model))[0]
    assert found.get("error", "started") == outcome


def test_a_path_can_be_loaded_whatever_the_settings_say(saved: Path) -> None:
    def load(cfg: Any) -> tuple[int, dict[str, str]]:
        run = setup(cfg)
        step, _ = load_checkpoint_from_path(
            str(saved), run.state, run.model, None, None, ignore_ckpt_step=True, pg_collection=run.pg_collection
        )
        return step, model_digests(run)

    expected = on_two(load=str(saved))["model"]
    assert run_ranks(load, 2, tiny_config(train_iters=6)) == [(0, expected)] * 2


def random_states(run: Run) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if name.startswith("rng")}


def disturb(cfg: Any) -> dict[str, str]:
    """Save with every generator in a state of this rank's own; return the states."""
    from bridge.training.checkpointing import CheckpointSaveContext

    run = setup(cfg)
    draws = 1 + torch.distributed.get_rank()
    for _ in range(draws):
        random.random()
        np.random.rand()
        torch.rand(1)
        for name in tensor_parallel.get_cuda_rng_tracker().get_states():
            with tensor_parallel.get_cuda_rng_tracker().fork(name):
                torch.rand(1)
    run.state.train_state.step = 3
    run.manager.save(CheckpointSaveContext(run.state, run.model, None, None, 0), None)
    return random_states(run)


def restored_states(cfg: Any) -> dict[str, str]:
    return random_states(setup(cfg))


def states(tmp_path: Path, ranks: tuple[int, int], before: dict[str, Any], after: dict[str, Any]) -> tuple[Any, Any]:
    """Random states by rank: as saved under `before`, and as restored under `after`."""
    saving = tiny_config(train_iters=6, checkpoint={"save": str(tmp_path)}, **before)
    loading = {"load": str(tmp_path), "load_optim": False, **after.pop("checkpoint", {})}
    expected = run_ranks(disturb, ranks[0], saving)
    return expected, run_ranks(restored_states, ranks[1], tiny_config(train_iters=6, checkpoint=loading, **after))


def test_ranks_that_are_initialised_apart_get_their_own_states_back(tmp_path: Path) -> None:
    own = {"rng": {"data_parallel_random_init": True}}
    before, after = states(tmp_path, (4, 4), dict(own), dict(own))
    assert after == before
    assert len({rank["rng torch"] for rank in after}) == 4


def test_more_ranks_that_are_initialised_apart_are_seeded_anew(tmp_path: Path) -> None:
    own = {"rng": {"data_parallel_random_init": True}}
    before, after = states(tmp_path, (2, 4), dict(own), dict(own))
    assert after[:2] == before
    assert len({rank["rng torch"] for rank in after}) == 4


def test_expert_parallel_ranks_get_their_own_states_back(tmp_path: Path) -> None:
    before, after = states(tmp_path, (2, 2), {"model": MOE}, {"model": MOE})
    assert after == before


def test_twice_the_expert_parallel_ranks_continue_their_counterparts_states(tmp_path: Path) -> None:
    before, after = states(
        tmp_path, (2, 4), {"model": MOE}, {"model": MOE, "checkpoint": {"fully_parallel_load": True}}
    )
    assert after == [before[0], before[1], before[0], before[1]]


def test_another_tensor_size_keeps_the_stages_states(tmp_path: Path) -> None:
    tp2 = {"model": {"tensor_model_parallel_size": 2}}
    before, after = states(tmp_path, (2, 1), tp2, {})
    kept = {"rng python", "rng numpy", "rng torch", "rng tracker data-parallel-rng"}
    assert {name for name in after[0] if after[0][name] == before[0][name]} == kept


def test_another_pipeline_size_seeds_everything_anew_and_always_the_same(tmp_path: Path) -> None:
    pp2 = {"model": {"pipeline_model_parallel_size": 2}}
    before, after = states(tmp_path / "a", (2, 1), dict(pp2), {})
    _, again = states(tmp_path / "b", (2, 1), dict(pp2), {})
    fresh = run_ranks(restored_states, 1, tiny_config(train_iters=6))
    assert after == again
    assert not set(after[0].values()) & (set(before[0].values()) | set(before[1].values()) | set(fresh[0].values()))


class Extra:
    """A class of the user's own, in `common.pt`."""

    def __init__(self) -> None:
        self.value = 5


def add_to_common(saved: Path, copy: Path) -> Path:
    """A copy of `saved`, as another program's, whose `common.pt` holds an Extra."""
    shutil.copytree(saved, copy)
    iteration = copy / "iter_0000004"
    (iteration / "manifest.json").unlink()
    config = iteration / "run_config.yaml"
    config.write_text(config.read_text().replace("_target_: bridge.", "_target_: another."))
    common = torch.load(iteration / "common.pt", weights_only=True)
    torch.save(common | {"extra": Extra()}, iteration / "common.pt")
    return copy


def test_a_class_that_is_not_allowed_is_refused_with_the_way_to_allow_it(saved: Path, tmp_path: Path) -> None:
    load = add_to_common(saved, tmp_path / "copy")
    name = f"{Extra.__module__}.Extra"
    refused = on_two(load=str(load))
    assert refused["error"] == "UnsafeCheckpointError"
    assert f"holds an object of the class {name}, which loading does not allow" in refused["message"]
    assert f"checkpoint.safe_globals: [{name}]" in refused["message"]
    assert f"torch.serialization.add_safe_globals([{name}])" in refused["message"]
    assert on_two(load=str(load), safe_globals=[name])["step"] == 4


def test_a_class_that_cannot_be_imported_is_a_configuration_error(saved: Path) -> None:
    def attempt(cfg: Any) -> str:
        try:
            setup(cfg)
        except ConfigError as error:
            return str(error)
        return "started"

    cfg = tiny_config(train_iters=6, checkpoint={"load": str(saved), "safe_globals": ["nowhere.Thing"]})
    assert run_ranks(attempt, 1, cfg) == [
        "checkpoint.safe_globals: 'nowhere.Thing' cannot be imported (No module named 'nowhere'); write module.Class"
    ]
