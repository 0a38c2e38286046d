"""Checkpoints of Megatron-LM: written here by megatron-core itself, with Megatron-LM's keys and files."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.utils import unwrap_model

from bridge.training.checkpointing.contents.legacy import (
    content_metadata_of,
    extract_megatron_lm_args,
    get_train_state,
)
from bridge.training.checkpointing.contents.rng import get_rng_state
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.setup import Run, setup
from bridge.training.state import TrainState
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, tiny_config

ITERS = 6
MIDDLE = 3


def args_of(run: Run) -> Namespace:
    """The part of Megatron-LM's arguments that means something here, and some of the kinds of values they have."""
    model, progress = run.cfg.model, run.state.train_state
    return Namespace(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=None,
        data_parallel_size=run.pg_collection.dp.size(),
        use_distributed_optimizer=True,
        no_save_optim=None,
        no_save_rng=None,
        ckpt_fully_parallel_save=True,
        data_parallel_random_init=False,
        consumed_train_samples=progress.consumed_train_samples,
        skipped_train_samples=0,
        consumed_valid_samples=5,
        params_dtype=torch.float32,
        bf16=False,
        fp16=False,
        betas=(0.9, 0.999),
        data_path=["a", "b"],
    )


def save_like_megatron_lm(run: Run, directory: Path, *, name: str | None = None, **left_out: bool) -> None:
    """Write an iteration directory and the tracker, as Megatron-LM does: no train state, configuration, manifest."""
    iteration = run.state.train_state.step
    path = directory / (name or f"iter_{iteration:07d}")
    content = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    (chunk,) = unwrap_model(run.model)
    building = {**content, "dp_cp_group": run.pg_collection.dp_cp}
    model = chunk.sharded_state_dict(metadata=building)
    state_dict: dict[str, Any] = {
        "args": args_of(run),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 12345,
        "model": model,
        "optimizer": run.optimizer.sharded_state_dict(model, metadata=building),
        "opt_param_scheduler": run.scheduler.state_dict(),
        "rng_state": get_rng_state(False, pg_collection=run.pg_collection),
    }
    for key in left_out:
        del state_dict[key]
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
    torch.distributed.barrier()
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), run.pg_collection.dp_cp)
    dist_checkpointing.save(state_dict, str(path), strategy, content_metadata=content)
    if torch.distributed.get_rank() == 0:
        (directory / "latest_checkpointed_iteration.txt").write_text(name or str(iteration))


def write(directory: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Train half, write fixtures of several kinds, train the rest; return what everything is at the end."""
    run = setup(tiny_config(train_iters=ITERS, model=model, train={"exit_interval": MIDDLE}))
    train(run)
    save_like_megatron_lm(run, directory / "whole")
    save_like_megatron_lm(run, directory / "released", name="release")
    save_like_megatron_lm(run, directory / "no_args", args=True)
    at_middle = digests(run)
    run.cfg.train.exit_interval = None
    train(run)
    return {"middle": at_middle, "end": digests(run)}


def resume(load: Path, model: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Load what is in `load`, and train to the end."""
    try:
        run = setup(tiny_config(train_iters=ITERS, model=model, checkpoint={"load": str(load)} | checkpoint))
    except CheckpointError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    loaded = digests(run)
    train(run)
    return {"loaded": loaded, "end": digests(run)}


LAYOUTS: dict[str, dict[str, Any]] = {"DP2": {}, "TP2": {"tensor_model_parallel_size": 2}}


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Any]]:
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, run_ranks(write, 2, directory, LAYOUTS[request.param])


def different(first: dict[str, str], second: dict[str, str], *ignored: str) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name] and not name.startswith(ignored)]


def test_a_megatron_lm_checkpoint_continues_bit_for_bit(written: tuple[str, Path, list[Any]]) -> None:
    layout, directory, expected = written
    for rank, found in enumerate(run_ranks(resume, 2, directory / "whole", LAYOUTS[layout], {})):
        assert "error" not in found, found
        # Of the counters, only those of validation samples and FLOPs come from the fixture's arguments.
        assert different(found["loaded"], expected[rank]["middle"], "train state") == []
        assert different(found["end"], expected[rank]["end"], "train state") == []
        assert found["loaded"]["train state"] == repr(
            TrainState(
                step=MIDDLE,
                consumed_train_samples=8 * MIDDLE,
                consumed_valid_samples=5,
                floating_point_operations_so_far=12345,
            )
        )


def test_a_release_checkpoint_gives_model_and_counters_but_no_iteration(written: tuple[str, Path, list[Any]]) -> None:
    layout, directory, expected = written
    for rank, found in enumerate(run_ranks(resume, 2, directory / "released", LAYOUTS[layout], {})):
        assert "error" not in found, found
        assert found["loaded"]["train state"].startswith(f"TrainState(step=0, consumed_train_samples={8 * MIDDLE},")
        model = {name: value for name, value in expected[rank]["middle"].items() if name.startswith("model")}
        assert {name: found["loaded"][name] for name in model} == model


def test_without_arguments_or_configuration_it_still_loads(written: tuple[str, Path, list[Any]]) -> None:
    layout, directory, expected = written
    for rank, found in enumerate(run_ranks(resume, 2, directory / "no_args", LAYOUTS[layout], {})):
        assert "error" not in found, found
        # Which ranks had which random states is unknown, and so is the number of samples.
        assert different(found["loaded"], expected[rank]["middle"], "train state", "rng", "data iterator") == []


def test_another_layout_needs_the_documented_override(written: tuple[str, Path, list[Any]]) -> None:
    layout, directory, _ = written
    other = next(name for name in LAYOUTS if name != layout)
    refused = run_ranks(resume, 2, directory / "whole", LAYOUTS[other], {})
    assert refused[0] == refused[1]
    assert "the tensor size was" in refused[0]["error"] and "checkpoint.load_optim: false" in refused[0]["error"]
    for found in run_ranks(resume, 2, directory / "whole", LAYOUTS[other], {"load_optim": False}):
        assert "error" not in found, found


def test_a_damaged_legacy_checkpoint_is_a_typed_error(written: tuple[str, Path, list[Any]], tmp_path: Path) -> None:
    layout, directory, _ = written
    copy = Path(shutil.copytree(directory / "whole", tmp_path / "copy"))
    (copy / f"iter_{MIDDLE:07d}" / "metadata.json").unlink()
    first, second = run_ranks(resume, 2, copy, LAYOUTS[layout], {})
    assert first == second
    assert first["error"].startswith("CheckpointDamagedError: ") and "it has no metadata.json" in first["error"]


def test_arguments_become_the_settings_that_loading_needs() -> None:
    args = Namespace(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        data_parallel_size=8,
        no_save_rng=True,
        no_save_optim=None,
        ckpt_fully_parallel_save=True,
        use_distributed_optimizer=True,
        bf16=True,
    )
    assert extract_megatron_lm_args({"args": args}) == {
        "model": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "context_parallel_size": 1,
            "expert_model_parallel_size": 1,
            "data_parallel_size": 8,
            "precision": "bf16",
        },
        "checkpoint": {"save_optim": True, "save_rng": False, "fully_parallel_save": True},
        "ddp": {"use_distributed_optimizer": True},
        "rng": {"data_parallel_random_init": False},
    }


def test_no_arguments_is_the_documented_runtime_error() -> None:
    with pytest.raises(RuntimeError) as raised:
        extract_megatron_lm_args({"iteration": 3})
    assert str(raised.value) == "Legacy checkpoint missing 'args' field in state_dict"


def test_the_train_state_comes_from_the_iteration_and_the_arguments() -> None:
    args = Namespace(consumed_train_samples=80, skipped_train_samples=8, consumed_valid_samples=4)
    state_dict = {"iteration": 10, "args": args, "num_floating_point_operations_so_far": 2.5e20}
    assert get_train_state(state_dict) == TrainState(10, 80, 8, 4, int(2.5e20), False, False, False)
    assert get_train_state({"iteration": 10}) == TrainState(10, do_train=False)
    assert get_train_state({}) == TrainState(0, do_train=False)


def test_only_an_optimizer_that_is_not_distributed_needs_no_content_metadata() -> None:
    saved = {"singleton_local_shards": False}
    assert content_metadata_of({"content_metadata": saved, "args": Namespace()}) == saved
    assert content_metadata_of({"args": Namespace(use_distributed_optimizer=False)}) == {}
    assert content_metadata_of({"args": Namespace(use_distributed_optimizer=True)}) is None
    assert content_metadata_of({}) is None
