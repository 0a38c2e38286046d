"""LoRA computes what its formula says, on every way to split a layer, and knows what it cannot adapt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model

from bridge.peft import LoRA
from bridge.peft.linear import LinearAdapter, adapt, merged_weight
from bridge.training.config import ConfigError
from bridge.training.gpt import build_model
from bridge.training.initialize import LaunchEnvironment, initialize_distributed, set_seeds
from tests.distributed.launch import init_model_parallel, run_ranks
from tests.training.tiny import tiny_config

INPUTS, OUTPUTS, DIM, SCALE = 8, 12, 3, 2.0
VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"activation": "swiglu", "normalization": "RMSNorm"},
    "grouped queries": {"num_query_groups": 2},
    "experts": {"num_moe_experts": 4, "add_bias_linear": False},
}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def own_part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    return tensor.chunk(group.size(), dim)[group.rank()].contiguous()


def adapted_layer(kind: type, tp: int, sequence_parallel: bool) -> Any:
    """A layer with random weight, A and B, which are the same whatever the tensor-parallel size."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=2,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
    )
    options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.normal_, "skip_bias_add": True}
    is_column = kind is ColumnParallelLinear
    options |= {"gather_output": False} if is_column else {"input_is_parallel": True}
    layer = kind(INPUTS, OUTPUTS, bias=True, **options)
    layer.requires_grad_(False)
    adapter = LinearAdapter(layer, dim=DIM, scale=SCALE, dropout=0.0, linear_in_init="kaiming")
    adapt(layer, adapter)
    with torch.no_grad():
        layer.weight.copy_(own_part(random(1, OUTPUTS, INPUTS), 0 if is_column else 1))
        linear_in, linear_out = random(2, DIM, INPUTS), random(3, OUTPUTS, DIM)
        adapter.linear_in.weight.copy_(linear_in if is_column else own_part(linear_in, 1))
        adapter.linear_out.weight.copy_(own_part(linear_out, 0) if is_column else linear_out)
    return layer


def check_layer(kind: type, tp: int, sequence_parallel: bool) -> None:
    """Output and every gradient of the split layer against the formula on whole tensors."""
    is_column = kind is ColumnParallelLinear
    layer = adapted_layer(kind, tp, sequence_parallel)
    weight = random(1, OUTPUTS, INPUTS)
    linear_in, linear_out = random(2, DIM, INPUTS).requires_grad_(), random(3, OUTPUTS, DIM).requires_grad_()
    inputs, probe = random(4, 4, 2, INPUTS).requires_grad_(), random(5, 4, 2, OUTPUTS)
    expected = inputs @ weight.t() + SCALE * (inputs @ linear_in.t()) @ linear_out.t()
    (expected * probe).sum().backward()

    def mine(tensor: torch.Tensor, is_split_by_features: bool) -> torch.Tensor:
        """What this rank holds of a tensor [sequence, batch, features]."""
        if is_split_by_features:
            return own_part(tensor, 2)
        return own_part(tensor, 0) if sequence_parallel else tensor

    given = mine(inputs.detach(), not is_column).requires_grad_()
    output, _ = layer(given)
    torch.testing.assert_close(output, mine(expected.detach(), is_column))
    (output * mine(probe, is_column)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(given.grad, mine(inputs.grad, not is_column))
    for projection, whole, axis in (
        (layer.adapter.linear_in, linear_in.grad, None if is_column else 1),
        (layer.adapter.linear_out, linear_out.grad, 0 if is_column else None),
    ):
        gradient = projection.weight.grad
        assert getattr(projection.weight, "sequence_parallel", False) == (sequence_parallel and axis is None)
        if axis is None and sequence_parallel:
            dist.all_reduce(gradient)  # as Megatron-Core does for parameters with this mark
        torch.testing.assert_close(gradient, whole if axis is None else own_part(whole, axis))
    merged = weight + SCALE * (linear_out @ linear_in).detach()
    torch.testing.assert_close(merged_weight(layer), own_part(merged, 0 if is_column else 1))


def test_a_layer_computes_the_formula_on_two_tensor_parallel_ranks() -> None:
    def check() -> None:
        init_model_parallel(tp=2)
        for kind in (ColumnParallelLinear, RowParallelLinear):
            for sequence_parallel in (False, True):
                check_layer(kind, 2, sequence_parallel)

    run_ranks(check, 2)


def chunks_of(model: dict[str, Any], peft: LoRA | None, tp: int = 1) -> list[Any]:
    """The bare chunks of a tiny model that starts from the same numbers every time."""
    cfg = tiny_config(model={**model, "tensor_model_parallel_size": tp})
    initialize_distributed(cfg, LaunchEnvironment.from_environ())
    set_seeds(cfg)
    return unwrap_model(build_model(cfg, 256, before_wrapping=None if peft is None else lambda chunks: peft(chunks)))


def logits(chunks: list[Any]) -> torch.Tensor:
    """[batch, sequence, this rank's part of the vocabulary]."""
    tokens = torch.arange(64).view(2, 32) % 250
    chunks[0].eval()
    with torch.no_grad():
        output: torch.Tensor = chunks[0](tokens, torch.arange(32).expand(2, 32), None)
    return output


def randomize(chunks: list[Any]) -> None:
    """Give every B values: with B at zero an adapter does nothing."""
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if "adapter.linear_out" in name:
                parameter.normal_(std=0.05)


def test_on_a_whole_model() -> None:
    def check(model: dict[str, Any]) -> dict[str, Any]:
        base = chunks_of(model, None)
        expected, base_keys = logits(base), set(base[0].state_dict())
        lora = LoRA(dim=4)
        chunks = chunks_of(model, lora)
        fresh = logits(chunks)
        trained = {name for name, parameter in chunks[0].named_parameters() if parameter.requires_grad}
        keys = set(chunks[0].state_dict())
        randomize(chunks)
        changed = logits(chunks)
        is_own = trained == lora.params_to_save and all(".adapter." in name for name in trained)
        lora.merge(chunks)
        merged = logits(chunks)
        return {
            "fresh adapters change nothing": torch.equal(fresh, expected),
            "base keys": keys - trained == base_keys,
            "trained": is_own and not lora.params_to_save,
            "adapters": len(trained),
            "adapters do something": float((changed - expected).abs().max()) > 0.01,
            "merged": float((merged - changed).abs().max()) < 1e-5,
            "merged keys": set(chunks[0].state_dict()) == base_keys,
        }

    def check_all() -> dict[str, Any]:
        return {name: check(model) for name, model in VARIANTS.items()}

    (found,) = run_ranks(check_all, 1)
    # Four layers of linear_qkv, linear_proj, linear_fc1 and linear_fc2, two weights each; experts have fc1 and fc2
    # four times.
    counts = {"gelu": 32, "swiglu": 32, "grouped queries": 32, "experts": 16 + 64}
    for name, facts in found.items():
        assert facts.pop("adapters") == counts[name]
        assert all(facts.values()), (name, facts)


def test_initial_values_do_not_depend_on_the_tensor_parallel_size() -> None:
    def initial(tp: int) -> list[torch.Tensor]:
        attention = chunks_of({}, LoRA(dim=4), tp)[0].decoder.layers[2].self_attention
        whole, split = attention.linear_qkv.adapter, attention.linear_proj.adapter
        weights = whole.linear_in.weight, split.linear_in.weight, split.linear_out.weight
        return [weight.detach().clone() for weight in weights]

    (single,) = run_ranks(initial, 1, 1)
    first, second = run_ranks(initial, 2, 2)
    assert torch.equal(first[0], single[0]) and torch.equal(second[0], single[0])
    assert torch.equal(torch.cat([first[1], second[1]], dim=1), single[1])
    assert single[0].any() and single[1].any()
    assert not single[2].any() and not first[2].any()


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    def check() -> list[bool]:
        initialize_distributed(tiny_config(), LaunchEnvironment.from_environ())
        set_seeds(tiny_config())
        layer = adapted_layer(ColumnParallelLinear, 1, False)
        inputs = random(4, 4, 2, INPUTS)
        plain = layer(inputs)[0]
        layer.adapter.dropout = 0.5
        first, second = layer(inputs)[0], layer(inputs)[0]
        layer.eval()
        quiet = layer(inputs)[0]
        with torch.no_grad():
            layer.adapter.linear_out.weight.zero_()
        layer.train()
        base = layer(inputs)[0]
        return [
            not torch.equal(first, second),
            torch.equal(quiet, plain),
            torch.equal(base, layer(inputs)[0]),
        ]

    assert run_ranks(check, 1) == [[True, True, True]]


class _TransformerEngineLinear(torch.nn.Module):
    """Stands where a layer of another implementation would."""


def test_what_lora_cannot_adapt_is_refused() -> None:
    lora = LoRA(target_modules=["linear_qkv"])
    other = _TransformerEngineLinear()
    assert lora.transform(other, "linear_proj", "decoder.layers.0.self_attention") is other
    with pytest.raises(ConfigError) as caught:
        lora.transform(other, "linear_qkv", "decoder.layers.0.self_attention")
    assert str(caught.value) == (
        "peft.target_modules: decoder.layers.0.self_attention.linear_qkv is a "
        f"{__name__}._TransformerEngineLinear, and LoRA adapts the layers ColumnParallelLinear and RowParallelLinear "
        "of Megatron-Core itself; set model.transformer_layer_spec: local"
    )


def test_a_model_is_adapted_once() -> None:
    def check() -> str:
        with pytest.raises(ConfigError) as caught:
            LoRA()(chunks_of({}, LoRA()))
        return str(caught.value)

    assert run_ranks(check, 1) == [
        "peft: decoder.layers.0.self_attention.linear_proj has an adapter already; apply LoRA to a model only once"
    ]
