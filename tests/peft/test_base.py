"""The base of all methods: what it freezes, what it calls its own, and what another method has to bring."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bridge.peft import PEFT, LoRA, build_peft
from bridge.training.config import ConfigError, LoRAConfig


class Chunk(torch.nn.Module):
    """A chunk that is no Megatron model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        self.last = torch.nn.Linear(2, 2)


@dataclass(kw_only=True)
class TrainBiases(PEFT):
    """A method that adds nothing: it trains the biases of linear layers."""

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        if isinstance(module, torch.nn.Linear):
            module.bias.requires_grad_()
        return module


@dataclass(kw_only=True)
class Replace(PEFT):
    """A method that exchanges whole modules."""

    target: str

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        return torch.nn.Linear(2, 2) if f"{prefix}/{name}" == self.target else module


def trained(chunk: torch.nn.Module) -> set[str]:
    return {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}


def test_everything_is_frozen_but_what_the_method_trains() -> None:
    chunks, method = [Chunk(), Chunk()], TrainBiases()
    assert method(chunks) is chunks
    for chunk in chunks:
        assert trained(chunk) == {"first.0.bias", "last.bias"} and chunk.training
    assert method.params_to_save == {"first.0.bias", "last.bias"}
    assert method.adapter_key_filter("last.bias") and not method.adapter_key_filter("last.weight")


def test_not_for_training_even_that_is_frozen() -> None:
    chunk, method = Chunk(), TrainBiases()
    method([chunk], training=False)
    assert trained(chunk) == set() and not chunk.training
    assert method.adapter_key_filter("last.bias")


@pytest.mark.parametrize("target", ["/last", "first/0"])
def test_a_method_may_exchange_modules(target: str) -> None:
    chunk, method = Chunk(), Replace(target=target)
    before = chunk.get_submodule(target.strip("/").replace("/", "."))
    method([chunk])
    name = target.strip("/").replace("/", ".")
    assert chunk.get_submodule(name) is not before
    assert trained(chunk) == {f"{name}.weight", f"{name}.bias"}


def test_a_chunk_without_anything_to_train_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^peft: Replace\(target='nowhere'\) finds nothing to train in model chunk 0"
    ):
        Replace(target="nowhere")([Chunk()])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight", True),
        ("decoder.adapters", True),
        ("decoder.layers.0.mlp.linear_fc1.weight", False),
        ("adapter", False),
        (("x", torch.nn.Parameter(torch.zeros(1))), True),
        (("x.adapter.y", torch.nn.Parameter(torch.zeros(1), requires_grad=False)), False),
    ],
)
def test_adapters_are_known_by_name_or_by_gradient(key: str | tuple[str, torch.Tensor], expected: bool) -> None:
    assert LoRA().adapter_key_filter(key) is expected


def test_the_section_of_the_configuration_becomes_a_method() -> None:
    assert build_peft(None) is None
    assert build_peft(LoRAConfig(dim=3, target_modules=["linear_fc1"])) == LoRA(dim=3, target_modules=["linear_fc1"])
