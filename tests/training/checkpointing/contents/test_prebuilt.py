"""State dicts that the caller prepares: prebuilt ones without a model, preprocessed common state, namespaced states."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from bridge.training.checkpointing import generate_state_dict, load_checkpoint, save_checkpoint
from bridge.training.checkpointing.contents.run_config import read_run_config
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, tiny_config

ROOT = Path(__file__).resolve().parents[4]


def weights(run: Any) -> dict[str, str]:
    return {name: value for name, value in digests(run).items() if name.startswith("model")}


def without_a_model(directory: Path) -> dict[str, Any]:
    """Save a model that is gone by then, and load it; also two virtual stages, whose number nobody can count later."""
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "activation": "swiglu"}
    run = setup(tiny_config(model=sizes, checkpoint={"save": str(directory)}))
    expected = weights(run)
    building = {"metadata": {"dp_cp_group": run.pg_collection.dp_cp}}
    state_dict = generate_state_dict(run.cfg.checkpoint, run.model, None, None, None, 7, model_sd_kwargs=building)
    apply_factories(state_dict)
    run.model.clear()
    run.state.train_state.step = 7
    save_checkpoint(run.state, [], None, None, 0, prebuilt_state_dict=state_dict, pg_collection=run.pg_collection)
    resumed = setup(tiny_config(train_iters=10, model=sizes, checkpoint={"load": str(directory)}))
    return {"equal": weights(resumed) == expected, "step": resumed.state.train_state.step}


def test_a_prebuilt_state_dict_is_saved_without_the_model(tmp_path: Path) -> None:
    assert run_ranks(without_a_model, 2, tmp_path) == [{"equal": True, "step": 7}] * 2
    checkpoint = tmp_path / "iter_0000007"
    manifest, config = read_manifest(checkpoint), read_run_config(checkpoint)
    assert manifest is not None and manifest.parallel_sizes["virtual_pipeline"] == 2
    # What the state dict does not hold is not promised to readers.
    assert config is not None and config["checkpoint"]["save_optim"] is False
    assert config["checkpoint"]["save_rng"] is False


def preprocess(directory: Path) -> tuple[list[str], list[str]]:
    """Save with a function that looks at the common state and takes something out of the comparison."""
    run = setup(tiny_config(checkpoint={"save": str(directory)}))
    seen: list[str] = []

    def without_iteration(common: dict[str, Any]) -> dict[str, Any]:
        seen.extend(sorted(common))
        return {key: value for key, value in common.items() if key != "iteration"}

    save_checkpoint(
        run.state, run.model, run.optimizer, run.scheduler, 0, preprocess_common_state_dict_fn=without_iteration
    )
    return seen, sorted(load_common_state_dict(str(directory / "iter_0000000")))


def test_common_state_is_preprocessed_for_the_comparison_and_saved_as_it_is(tmp_path: Path) -> None:
    keys = ["checkpoint_version", "content_metadata", "iteration", "opt_param_scheduler", "optimizer"]
    for seen, saved in run_ranks(preprocess, 2, tmp_path):
        assert seen == keys
        assert saved == keys


def namespaced(directory: Path) -> tuple[list[str], bool, str]:
    run = setup(tiny_config(checkpoint={"save": str(directory), "load": str(directory)}))
    torch.manual_seed(99)
    expected = torch.get_rng_state()
    save_checkpoint(run.state, run.model, run.optimizer, run.scheduler, 0, module_name="vision")
    names = load_sharded_metadata(str(directory / "iter_0000000"))
    torch.manual_seed(1)
    load_checkpoint(run.state, run.model, run.optimizer, run.scheduler, module_name="vision")
    restored = torch.equal(torch.get_rng_state(), expected)
    try:
        load_checkpoint(run.state, run.model, run.optimizer, run.scheduler, module_name="language")
    except CheckpointMismatchError as error:
        return sorted(name for name in names if name.startswith("rng_state")), restored, str(error)
    return [], restored, "loaded"


def test_a_module_name_puts_the_random_states_into_a_namespace(tmp_path: Path) -> None:
    ((names, restored, message),) = run_ranks(namespaced, 1, tmp_path)
    assert names == ["rng_state.vision/shard_0.0_1.1"]
    assert restored
    assert "rng_state.language/shard_0.0_1.1" in message


def test_the_low_memory_benchmark_runs_and_saves_the_same_tensors() -> None:
    benchmark = ["-m", "scripts.benchmarks.low_memory_save", "--layers", "1", "--hidden-size", "64"]
    command = [sys.executable, "-W", "ignore", *benchmark]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["way", "model", "peak", "peak", "/", "model"]
    assert lines[1].startswith("ordinary") and lines[2].startswith("low memory")
    assert lines[3] == "the saved tensors are the same"
