"""From the model section to Megatron-Core's model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.config import ConfigError, GPTModelConfig
from bridge.training.gpt import (
    check_layers,
    padded_vocab_size,
    transformer_config,
    uses_transformer_engine,
)


@given(size=st.integers(1, 10_000), divisor=st.integers(1, 256), tensor_parallel=st.sampled_from([1, 2, 4]))
def test_the_vocabulary_is_padded_to_the_next_multiple(size: int, divisor: int, tensor_parallel: int) -> None:
    model = GPTModelConfig(make_vocab_size_divisible_by=divisor, tensor_model_parallel_size=tensor_parallel)
    padded = padded_vocab_size(model, size)
    assert padded % (divisor * tensor_parallel) == 0
    assert size <= padded < size + divisor * tensor_parallel


def test_a_given_vocabulary_is_used_as_it_is_and_must_hold_the_tokenizer() -> None:
    assert padded_vocab_size(GPTModelConfig(vocab_size=300), 257) == 300
    with pytest.raises(ConfigError) as error:
        padded_vocab_size(GPTModelConfig(vocab_size=256), 257)
    assert str(error.value) == (
        "model.vocab_size is 256, but the tokenizer has 257 ids; leave it out to pad the tokenizer's size, "
        "or set at least that many"
    )


def test_settings_reach_the_transformer() -> None:
    config = transformer_config(
        GPTModelConfig(
            activation="swiglu",
            precision="bf16",
            num_query_groups=2,
            init_method_std=0.01,
            transformer_overrides={"qk_layernorm": True},
        )
    )
    assert config.activation_func is torch.nn.functional.silu
    assert config.gated_linear_unit and config.bf16 and config.qk_layernorm
    assert config.pipeline_dtype is torch.bfloat16
    assert (config.num_query_groups, config.init_method_std) == (2, 0.01)


def test_an_unknown_override_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as error:
        transformer_config(GPTModelConfig(transformer_overrides={"qk_layernom": True, "bf16": True}))
    assert error.value.problems == (
        "model.transformer_overrides.qk_layernom: Megatron-Core's TransformerConfig has no such field; "
        "did you mean 'qk_layernorm'?",
        "model.transformer_overrides.bf16: this field follows from a setting of `model` itself; use that one",
    )


def test_what_megatron_core_refuses_is_a_config_error() -> None:
    overrides = {"cpu_offloading": True, "cpu_offloading_num_layers": 99}
    with pytest.raises(ConfigError, match=r"^Megatron-Core does not accept the settings of `model`: CPU offloading"):
        transformer_config(GPTModelConfig(transformer_overrides=overrides))


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what holds without CUDA")
def test_layers_that_are_not_here_are_refused() -> None:
    assert not uses_transformer_engine(GPTModelConfig())
    with pytest.raises(ConfigError, match=r"^model.transformer_layer_spec is 'transformer_engine', but it"):
        uses_transformer_engine(GPTModelConfig(transformer_layer_spec="transformer_engine"))
    with pytest.raises(ConfigError) as error:
        check_layers(
            GPTModelConfig(
                tensor_model_parallel_size=2,
                sequence_parallel=True,
                context_parallel_size=2,
                num_moe_experts=2,
            )
        )
    assert [problem.partition(" ")[0] for problem in error.value.problems] == [
        "model.context_parallel_size",
        "model.add_bias_linear",
        "model.sequence_parallel",
    ]
