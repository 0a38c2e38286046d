"""Steps that are run again: nothing changes when all is well, and a bad step is saved, resumed and judged."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.rerun_state_machine import get_rerun_state_machine

from bridge.training.checkpointing.contents.rerun import get_rerun_state, set_rerun_state
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, tiny_config

ITERS = 4


def run(mode: str, *, fault: str | None = None, elsewhere: bool = False, **checkpoint: Any) -> dict[str, Any]:
    """Train on this rank as the mode says, perhaps with simulated faults, perhaps as if on another node."""
    rerun = {"rerun_mode": mode}
    if fault is not None:
        rerun |= {"error_injection_rate": 1, "error_injection_type": fault}
    run = setup(tiny_config(train_iters=ITERS, rerun_state_machine=rerun, checkpoint=checkpoint))
    machine = get_rerun_state_machine()
    found = {"state": machine.state.name, "started at": run.state.train_state.step}
    if elsewhere:
        machine.suspicious_node = "another node"
    outcome = train(run)
    return found | {"exit": outcome.exit_code, "iteration": outcome.iteration, "digests": digests(run)}


def both_modes() -> list[dict[str, Any]]:
    return [run(mode) for mode in ("disabled", "validate_results")]


def test_without_faults_validation_changes_nothing() -> None:
    for disabled, validated in run_ranks(both_modes, 2, timeout=120):
        assert disabled["iteration"] == ITERS and disabled["exit"] == 0
        assert validated == disabled


def fail_and_resume(directory: Path) -> dict[str, dict[str, Any]]:
    save = str(directory)
    found = {"uninterrupted": run("disabled")}
    found["failing"] = run("validate_results", fault="persistent_error", save=save)
    found["same device"] = run("validate_results", load=save)
    found["other device"] = run("validate_results", load=save, elsewhere=True)
    found["disabled"] = run("disabled", load=save)
    found["transient"] = run("validate_results", fault="transient_error", save=save + "-transient")
    found["after transient"] = run("validate_results", load=save + "-transient")
    return found


def test_a_step_that_cannot_be_trusted_is_saved_and_repeated(tmp_path: Path) -> None:
    for found in run_ranks(fail_and_resume, 2, tmp_path / "save", timeout=180):
        whole = found["uninterrupted"]["digests"]
        # The first step is never validated, so the second one fails; the checkpoint is that of the first.
        failing = found["failing"]
        assert (failing["state"], failing["exit"], failing["iteration"]) == ("NOT_RUNNING_YET", 16, 1)
        same = found["same device"]
        assert (same["state"], same["started at"]) == ("WILL_RERUN_FROM_CHECKPOINT", 1)
        assert (same["exit"], same["iteration"]) == (16, 1)
        other = found["other device"]
        assert (other["state"], other["exit"], other["iteration"]) == ("WILL_RERUN_FROM_CHECKPOINT", 17, 1)
        disabled = found["disabled"]
        assert (disabled["state"], disabled["started at"], disabled["exit"]) == ("NOT_RUNNING_YET", 1, 0)
        assert differing(disabled["digests"], whole) == []
        assert (found["transient"]["exit"], found["transient"]["iteration"]) == (17, 1)
        assert found["after transient"]["state"] == "NOT_RUNNING_YET"
        assert differing(found["after transient"]["digests"], whole) == []


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """The machine draws from Python's generator to simulate faults; nothing else may differ."""
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name] and name != "rng python"]


def test_the_saved_section_has_the_documented_keys_and_only_fits_as_many_ranks(tmp_path: Path) -> None:
    save = tmp_path / "save"

    def fail() -> int:
        return run("validate_results", fault="persistent_error", save=str(save))["exit"]

    assert run_ranks(fail, 2) == [16, 16]

    def inspect() -> tuple[set[str], dict[str, Any]]:
        from tests.distributed.launch import init_ranks

        init_ranks()
        common = dist_checkpointing.load_common_state_dict(str(save / "iter_0000001"))["rerun_state_machine"]
        keys = load_sharded_metadata(str(save / "iter_0000001"))
        shards = sorted(key for key in keys if key.startswith("rerun_state_machine_state"))
        torch.distributed.destroy_process_group()
        return {*common, *shards}, run("validate_results", load=str(save))

    ((keys, resumed),) = run_ranks(inspect, 1)
    shards = {"rerun_state_machine_state/shard_0_2", "rerun_state_machine_state/shard_1_2"}
    assert keys == {"mode", "state", "current_iteration", *shards}
    assert (resumed["state"], resumed["started at"], resumed["iteration"]) == ("NOT_RUNNING_YET", 1, ITERS)


def test_a_section_that_the_machine_does_not_understand_is_a_typed_error() -> None:
    def restore() -> str:
        setup(tiny_config(rerun_state_machine={"rerun_mode": "validate_results"}))
        assert get_rerun_state() is None, "nothing is to be saved unless a step is to be run again"
        try:
            set_rerun_state({"mode": "validate_results"})
        except CheckpointMismatchError as error:
            return str(error)
        return "restored"

    assert run_ranks(restore, 1) == [
        "the checkpoint's rerun_state_machine section cannot be restored: KeyError: 'state'; "
        "set rerun_state_machine.rerun_mode: disabled to leave it out"
    ]
