"""Deleting extra states, and loading a module that misses some of them but nothing else."""

import logging
from typing import Any

import pytest
import torch

from bridge.training.checkpointing.contents.extra_state import delete_extra_state, is_model_section
from bridge.training.checkpointing.contents.model import load_module_state_dict
from bridge.training.checkpointing.errors import CheckpointMismatchError


class Scaled(torch.nn.Linear):
    """A layer with an extra state, as TransformerEngine's layers have."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


@pytest.fixture
def module() -> torch.nn.Module:
    return torch.nn.Sequential(Scaled(), torch.nn.Linear(2, 2))


def other_values(module: torch.nn.Module) -> dict[str, Any]:
    values = {name: value + 1 if torch.is_tensor(value) else value for name, value in module.state_dict().items()}
    return values | {"0._extra_state": {"scale": 7.0}}


def assert_loaded(module: torch.nn.Module, values: dict[str, Any]) -> None:
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, values[name]), name


def test_a_whole_state_dict_loads_with_its_extra_state(module: torch.nn.Module) -> None:
    values = other_values(module)
    load_module_state_dict(module, values, strict=True)
    assert_loaded(module, values)
    assert module[0].scale == 7.0


def test_missing_and_unknown_extra_states_are_passed_over_with_a_warning(
    module: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    values = other_values(module)
    del values["0._extra_state"]
    values["1._extra_state"] = {"scale": 2.0}
    with caplog.at_level(logging.WARNING):
        load_module_state_dict(module, values, strict=True)
    assert_loaded(module, values)
    assert module[0].scale == 1.0
    assert caplog.messages == [
        "extra states differ and start afresh: missing in the checkpoint ['0._extra_state']; "
        "unknown to the module ['1._extra_state']"
    ]


@pytest.mark.parametrize("drops_extra_state", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.pop("1.weight"), '"1.weight"'),
        (lambda values: values.update({"2.weight": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "2.weight"'),
        (lambda values: values.update({"1.weight": torch.zeros(3, 2)}), "size mismatch for 1.weight"),
    ],
)
def test_a_real_mismatch_is_never_swallowed(
    module: torch.nn.Module, change: Any, said: str, drops_extra_state: bool
) -> None:
    values = other_values(module)
    change(values)
    if drops_extra_state:
        del values["0._extra_state"]
    with pytest.raises(CheckpointMismatchError) as raised:
        load_module_state_dict(module, values, strict=True)
    assert said in str(raised.value)


def test_without_strict_keys_may_differ_and_shapes_may_not(module: torch.nn.Module) -> None:
    values = other_values(module)
    before = module[1].weight.detach().clone()
    load_module_state_dict(module, {name: values[name] for name in ("0.weight", "0.bias")}, strict=False)
    assert torch.equal(module[0].weight, values["0.weight"]) and torch.equal(module[1].weight, before)
    with pytest.raises(CheckpointMismatchError, match=r"size mismatch for 1\.weight"):
        load_module_state_dict(module, {"1.weight": torch.zeros(3, 2)}, strict=False)


def test_extra_states_are_deleted_from_every_model_section_and_nowhere_else() -> None:
    def section() -> dict[str, int]:
        return {"a.weight": 1, "a._extra_state": 2, "b._extra_state/shard_0_4": 3}

    checkpoint = {"model": section(), "optimizer": section(), "iteration": 3}
    assert delete_extra_state(checkpoint) is checkpoint
    assert checkpoint == {"model": {"a.weight": 1}, "optimizer": section(), "iteration": 3}
    virtual = {"model0": section(), "model1": section(), "rng_state": section()}
    assert delete_extra_state(virtual) == {
        "model0": {"a.weight": 1},
        "model1": {"a.weight": 1},
        "rng_state": section(),
    }
    assert delete_extra_state(section()) == {"a.weight": 1}
    assert delete_extra_state({"model": None}) == {"model": None}
    assert delete_extra_state(None) is None


@pytest.mark.parametrize("key", ["model", "model0", "model1", "model12"])
def test_model_sections(key: str) -> None:
    assert is_model_section(key)


@pytest.mark.parametrize("key", ["", "models", "model_0", "model1a", "optimizer", "model.weight", "iteration", "Model"])
def test_other_sections(key: str) -> None:
    assert not is_model_section(key)
