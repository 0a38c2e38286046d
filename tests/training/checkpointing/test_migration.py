"""A run directory in the form that Megatron Bridge leaves is continued as it is, and stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, tiny_config

ITERS = 6
MIDDLE = 3
FOREIGN = "megatron.bridge.training.config.CheckpointConfig"


def write(directory: Path) -> dict[str, Any]:
    """Save in the middle, train to the end; return what everything is then."""
    checkpoint = {"save": str(directory), "save_interval": MIDDLE, "async_save": True}
    run = setup(tiny_config(train_iters=ITERS, checkpoint=checkpoint))
    train(run)
    return digests(run)


def make_foreign(directory: Path) -> None:
    """Leave what Megatron Bridge writes: no manifest, no positions in the data, its own classes, no hidden files."""
    shutil.rmtree(directory / f"iter_{ITERS:07d}")
    for path in directory.glob(".bridge-*"):
        path.unlink()
    checkpoint = directory / f"iter_{MIDDLE:07d}"
    (checkpoint / "manifest.json").unlink()
    shutil.rmtree(checkpoint / "dataloader_state")
    config = yaml.safe_load((checkpoint / "run_config.yaml").read_text())
    config["_target_"] = FOREIGN.replace("CheckpointConfig", "ConfigContainer")
    config["checkpoint"] |= {"_target_": FOREIGN, "async_strategy": "nvrx"}
    config["profiling"] = {"_target_": "megatron.bridge.training.config.ProfilingConfig", "profile_ranks": [0]}
    (checkpoint / "run_config.yaml").write_text(yaml.safe_dump(config))
    state = torch.load(checkpoint / "train_state.pt", weights_only=True)
    state["floating_point_operations_so_far"] = state["floating_point_operations_so_far"].float()
    torch.save(state, checkpoint / "train_state.pt")
    shutil.copy(checkpoint / "train_state.pt", directory / "latest_train_state.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text(str(MIDDLE))


def resume(load: Path, save: Path) -> dict[str, Any]:
    checkpoint = {"load": str(load), "save": str(save), "save_interval": 1, "most_recent_k": 1}
    run = setup(tiny_config(train_iters=ITERS, checkpoint=checkpoint))
    train(run)
    return digests(run)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp("foreign")
    ends = run_ranks(write, 2, directory)
    make_foreign(directory)
    return directory, ends


def without_flops(states: list[dict[str, str]]) -> list[dict[str, str]]:
    # Megatron Bridge rounds the FLOPs to float32.
    return [{name: digest for name, digest in state.items() if "train_state" not in name} for state in states]


def test_it_continues_bit_for_bit_and_is_not_touched(foreign: tuple[Path, list[Any]], tmp_path: Path) -> None:
    directory, ends = foreign
    before = files_of(directory)
    resumed = run_ranks(resume, 2, directory, tmp_path / "save")
    assert without_flops(resumed) == without_flops(ends)
    assert files_of(directory) == before


def test_it_continues_in_place_and_retention_leaves_what_is_not_ours(
    foreign: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    directory, ends = foreign
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    resumed = run_ranks(resume, 2, copy, copy)
    assert without_flops(resumed) == without_flops(ends)
    assert sorted(path.name for path in copy.glob("iter_*")) == [f"iter_{MIDDLE:07d}", f"iter_{ITERS:07d}"]
    assert (copy / "latest_checkpointed_iteration.txt").read_text() == str(ITERS)
