"""Formats of the user's own: the strategy of the documentation trains, saves and resumes, and mistakes are named."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import base

from bridge.training.checkpointing import disk, save_checkpoint
from bridge.training.checkpointing.errors import CheckpointMismatchError, NotEnoughSpaceError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import SaveCommitted
from bridge.training.checkpointing.formats.registry import format_named
from bridge.training.setup import setup
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.formats import zarr_states as states
from tests.training.tiny import run_to_end, tiny_config

PAUSE = 0.2
PAGE = Path(__file__).resolve().parents[4] / "docs" / "formats.md"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The directory in which the documentation's module can be imported."""
    found = re.search(r"<!-- file: mypackage/flat.py -->\n```python\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "flat.py").write_text(found[1])
    return tmp_path


def test_the_strategy_of_the_documentation_is_short() -> None:
    found = re.search(r"class FlatSave.*?\n```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert len([line for line in found[0].splitlines() if line.strip()]) <= 31


def test_it_resumes_bit_for_bit(package: Path) -> None:
    for continued, expected in run_ranks(train_and_resume, 2, package):
        assert continued["started at"] == 2
        assert continued["digests"] == expected["digests"]
    checkpoint = package / "runs" / "iter_0000002"
    assert json.loads((checkpoint / "metadata.json").read_text())["sharded_backend"] == "flat"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["checkpoint_format"] == "flat"
    assert {"flat_0.pt", "flat_1.pt", "rng_state/shard_0.0_1.1.pt", "common.pt"} <= manifest["files"].keys()
    # By its backend's name, which the program has registered.
    by_name = json.loads((package / "by-name" / "iter_0000004" / "manifest.json").read_text())
    assert by_name["checkpoint_format"] == "flat"
    (saved,) = [event for event in read_events(package / "by-name").events if isinstance(event, SaveCommitted)]
    assert saved.write_seconds is not None and saved.write_seconds >= PAUSE  # the strategy writes while it is planned


def train_and_resume(package: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    sys.path.insert(0, str(package))
    init_ranks()
    named = {"ckpt_format": "mypackage.flat.FlatSave"}
    whole = run_to_end(tiny_config(checkpoint={"save": str(package / "runs"), "save_interval": 2, **named}))
    continued = run_to_end(tiny_config(checkpoint={"load": str(package / "runs"), "ckpt_step": 2, **named}))
    from mypackage.flat import FlatSave

    class Slow(FlatSave):  # type: ignore[misc]
        def save(self, *arguments: Any) -> Any:
            time.sleep(PAUSE)
            return super().save(*arguments)

    base.register_default_strategy(base.StrategyAction.SAVE_SHARDED, "flat", 1, Slow())
    again = {"load": str(package / "runs"), "ckpt_step": 2, "save": str(package / "by-name"), "ckpt_format": "flat"}
    assert run_to_end(tiny_config(checkpoint=again))["digests"] == whole["digests"]
    return continued, whole


def test_nothing_is_written_before_it_is_known_that_there_is_room(package: Path) -> None:
    (found,) = run_ranks(save_without_room, 1, package)
    assert found == [["writes"], ["writes"], ["NotEnoughSpaceError"]]


def save_without_room(package: Path) -> list[list[str]]:
    """What the strategy does in two saves, and in a third one for which there is no room."""
    sys.path.insert(0, str(package))
    from mypackage.flat import FlatSave

    done: list[str] = []

    class Noting(FlatSave):  # type: ignore[misc]
        def save(self, *arguments: Any) -> Any:
            done.append("writes")
            return super().save(*arguments)

    base.register_default_strategy(base.StrategyAction.SAVE_SHARDED, "flat", 1, Noting())
    run = setup(tiny_config(checkpoint={"save": str(package / "runs"), "ckpt_format": "flat"}))
    context: dict[str, Any] = {}
    found = []
    for step in (1, 2, 3):
        run.state.train_state.step = step
        if step == 3:
            disk.available_bytes = lambda path: 1000  # in this forked rank only
        try:
            save_checkpoint(run.state, run.model, run.optimizer, run.scheduler, 0, context)
        except NotEnoughSpaceError as error:
            done.append(type(error).__name__)
        found.append([*done])
        done.clear()
    return found


def test_a_checkpoint_of_an_unknown_backend_is_refused(package: Path) -> None:
    run_ranks(load_without_the_strategy, 2, package)


def load_without_the_strategy(package: Path) -> None:
    sys.path.insert(0, str(package))
    init_ranks()
    n, rank = states.world()
    states.save(states.shards(n, rank), package / "mine", "mypackage.flat.FlatSave")
    states.require_equal(
        states.load(states.template(n, rank), package / "mine", strictness="raise_unexpected").state_dict, n, rank
    )
    assert base.default_strategies["load_sharded"].pop(("flat", 1))
    with pytest.raises(CheckpointMismatchError, match=r"mine is in the format 'flat', and this cannot be read"):
        states.load(states.template(n, rank), package / "mine")


class Fails(base.SaveShardedStrategy):  # type: ignore[misc]
    """Fails on one rank."""

    def __init__(self) -> None:
        super().__init__("fails", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        if dist.get_rank() == 1:
            raise ValueError("no luck")


def test_a_strategy_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    expected = "saving with Fails(fails, 1) failed on rank 1: ValueError: no luck"
    assert run_ranks(save_with_failure, 2, tmp_path) == [expected, expected]


def save_with_failure(root: Path) -> str:
    init_ranks()
    n, rank = states.world()
    with pytest.raises(Exception) as raised:
        states.save(states.shards(n, rank), root / "x", f"{__name__}.Fails")
    return str(raised.value)


MISTAKES = {
    "nowhere.Save": "checkpoint.ckpt_format: 'nowhere.Save' cannot be imported (No module named 'nowhere')",
    "json.Save": "checkpoint.ckpt_format: 'json.Save' cannot be imported (module 'json' has no attribute 'Save')",
    "json.JSONDecoder": "is a JSONDecoder, and no SaveShardedStrategy of megatron-core",
    "megatron.core.dist_checkpointing.strategies.base.SaveShardedStrategy": "write module.name of megatron-core's",
    "tar": "there is no format 'tar': this version has 'torch_dist', 'zarr', 'fsdp_dtensor', and no save strategy",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    with pytest.raises(CheckpointMismatchError) as raised:
        format_named(name)
    assert MISTAKES[name] in str(raised.value)
