"""The documented step-by-step functions, on a real checkpoint and real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from bridge.training import checkpointing as ck
from bridge.training.checkpointing.contents.model import generate_model_state_dict
from bridge.training.config import CheckpointConfig
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, run_to_end, tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2 and 4, from two ranks."""
    save = tmp_path_factory.mktemp("saved")
    run_ranks(run_to_end, 2, tiny_config(train_iters=4, checkpoint={"save": str(save), "save_interval": 2}))
    return save


def weights(run: Run) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if name.startswith("model")}


def test_iterations_are_resolved_as_documented(saved: Path, tmp_path: Path) -> None:
    resolve = ck._resolve_checkpoint_iteration
    assert resolve(None, None) == (-1, False)
    assert resolve(str(tmp_path), None) == (-1, False)
    assert resolve(str(saved), None) == (4, False)
    assert resolve(str(saved), 2) == (2, False)
    assert resolve(str(saved / "iter_0000002"), None) == (ck._DIRECT_ITERATION_DIR_SENTINEL, False)
    with pytest.raises(FileNotFoundError, match="ckpt_step: 3 is not in"):
        resolve(str(saved), 3)
    (tmp_path / "release").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert resolve(str(tmp_path), None) == (0, True)


def test_the_non_persistent_iteration_comes_from_the_tier(saved: Path, tmp_path: Path) -> None:
    newest = ck._get_non_persistent_iteration
    assert newest(str(saved)) == -1
    assert newest(str(saved), "global") == 4
    assert newest(str(tmp_path), "global") == -1
    for kind in ("local", "in_memory"):
        with pytest.raises(ck.CheckpointMismatchError, match="has no local_checkpoint_manager"):
            newest("", kind, {})
    with pytest.raises(ck.CheckpointMismatchError, match="'remote' is none of 'global', 'local', 'in_memory'"):
        newest("", "remote")


def test_the_context_is_empty_without_local_checkpoints() -> None:
    assert ck.init_checkpointing_context(CheckpointConfig()) == {}


def test_the_context_holds_the_manager_of_local_checkpoints(tmp_path: Path) -> None:
    """Saved by a run, found and read step by step through a context of the documented form."""

    def steps() -> tuple[tuple[int, int, list[str]], str]:
        cfg = tiny_config(
            train_iters=4,  # the end of all is not saved
            checkpoint={
                "save": str(tmp_path / "run"),
                "save_interval": 0,
                "non_persistent_ckpt_type": "local",
                "non_persistent_local_ckpt_dir": str(tmp_path / "node"),
                "non_persistent_save_interval": 1,
            },
        )
        run = setup(cfg)
        train(run)
        context = ck.init_checkpointing_context(cfg.checkpoint)
        newest = ck._get_non_persistent_iteration("", "local", context)
        common, path, release, kind = ck._load_non_persistent_base_checkpoint(
            "", cfg.checkpoint, True, None, newest, context, pg_collection=run.pg_collection
        )
        assert (release, kind) == (False, ck.CheckpointType.LOCAL)
        model = ck._generate_model_state_dict(run.model)
        loaded = ck._load_non_persistent_base_checkpoint(
            "", cfg.checkpoint, False, model, newest, context, pg_collection=run.pg_collection
        )[0]
        assert all(torch.equal(p, loaded["model"][n]) for n, p in unwrap_model(run.model[0]).named_parameters())
        return (newest, common["iteration"], sorted(context)), Path(path).name

    found, name = run_ranks(steps, 1)[0]
    assert found == (3, 3, ["local_checkpoint_manager"])
    assert name == "iter_0000003_0_local.pt"


def load_step_by_step(cfg: Any, saved: str) -> dict[str, Any]:
    """The base checkpoint in its parts, as a program that owns its loading would take them."""
    run = setup(cfg)
    config = CheckpointConfig(load=saved, non_persistent_ckpt_type="global")
    groups = {"pg_collection": run.pg_collection}
    common, path, release, kind = ck._load_base_checkpoint(saved, config, rank0=True, **groups)
    template = generate_model_state_dict(run.model, {"metadata": {"dp_cp_group": run.pg_collection.dp_cp}})
    loaded = ck._load_base_checkpoint(saved, config, sharded_state_dict=template, **groups)
    again = ck._load_non_persistent_base_checkpoint(saved, config, True, None, 2, **groups)
    nothing = ck._load_base_checkpoint(str(Path(saved) / "absent"), config, rank0=True, **groups)
    key = "embedding.word_embeddings.weight"
    same = torch.equal(loaded[0]["model"][key], template["model"][key].data)
    return {
        "common": (common["iteration"], Path(path).name, release, kind),
        "loaded": (loaded[0]["iteration"], Path(loaded[1]).name, loaded[2], loaded[3], same),
        "older": (again[0]["iteration"], Path(again[1]).name),
        "nothing": nothing,
    }


def test_the_base_checkpoint_is_loaded_step_by_step(saved: Path) -> None:
    for found in run_ranks(load_step_by_step, 2, tiny_config(), str(saved)):
        assert found == {
            "common": (4, "iter_0000004", False, ck.CheckpointType.GLOBAL),
            "loaded": (4, "iter_0000004", False, ck.CheckpointType.GLOBAL, True),
            "older": (2, "iter_0000002"),
            "nothing": (None, "", False, None),
        }


def load_weights(cfg: Any, checkpoint: str, parallel: bool) -> dict[str, str]:
    run = setup(cfg)
    assert ck._load_model_weights_from_checkpoint(checkpoint, run.model, fully_parallel_load=parallel) is None
    return weights(run)


@pytest.mark.parametrize("parallel", [False, True])
def test_weights_are_loaded_under_another_layout(saved: Path, parallel: bool) -> None:
    expected = run_ranks(lambda cfg: weights(setup(cfg)), 1, tiny_config(checkpoint={"load": str(saved)}))
    found = run_ranks(load_weights, 2, tiny_config(), str(saved / "iter_0000004"), parallel)
    assert found == [*expected, *expected]
    with_tp2 = tiny_config(
        model={"tensor_model_parallel_size": 2}, checkpoint={"load": str(saved), "load_optim": False}
    )
    sharded = run_ranks(lambda cfg: weights(setup(cfg)), 2, with_tp2)
    plain = tiny_config(model={"tensor_model_parallel_size": 2})
    assert run_ranks(load_weights, 2, plain, str(saved / "iter_0000004"), parallel) == sharded


def returned_weights(cfg: Any, checkpoint: str) -> tuple[Any, Any, Any]:
    run = setup(cfg)
    before = weights(run)
    plain = ck._load_model_weights_from_checkpoint(checkpoint, run.model, return_state_dict=True)
    three = ck._load_model_weights_from_checkpoint(
        checkpoint, run.model, return_state_dict=True, dist_ckpt_strictness="return_all"
    )
    unchanged = {name.removeprefix("model0."): before[name] for name in before}
    return sorted(plain), (sorted(three[0]), "optimizer" in str(three[1]), three[2]), bool(unchanged)


def test_weights_and_key_sets_are_returned(saved: Path) -> None:
    for plain, three, _ in run_ranks(returned_weights, 2, tiny_config(), str(saved / "iter_0000004")):
        assert plain == ["model"]
        assert three == (["model"], True, set())


def test_a_path_that_is_no_checkpoint_is_refused_on_every_rank(saved: Path) -> None:
    def attempt(cfg: Any) -> str:
        run = setup(cfg)
        try:
            ck._load_model_weights_from_checkpoint(str(saved), run.model)
        except FileNotFoundError as error:
            return str(error)
        return "loaded"

    message = f"checkpoint_path: {saved} is not a checkpoint; name an iter_N directory"
    assert run_ranks(attempt, 2, tiny_config()) == [message, message]
