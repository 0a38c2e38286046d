"""A transformer of its own, as transformers computes it: from `config.json` and tensors by name to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


def logits_of(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, sequence, vocabulary]` of Llama, StableLM or Starcoder2.

    Args:
        config: the content of `config.json`.
        tensors: all of the model; what is asked for is all there is.
        tokens: `[batch, sequence]`.
    """
    used = dict(tensors)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, used.pop(f"{name}.weight"), used.pop(f"{name}.bias", None))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = used.pop(f"{name}.weight"), used.pop(f"{name}.bias", None)
        if config["model_type"] == "llama":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight
        epsilon = config["layer_norm_eps" if config["model_type"] == "stablelm" else "norm_epsilon"]
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        queries = heads(linear(f"{name}.q_proj", x), config["num_attention_heads"])
        keys = heads(linear(f"{name}.k_proj", x), config["num_key_value_heads"])
        values = heads(linear(f"{name}.v_proj", x), config["num_key_value_heads"])
        queries, keys = _rotated(queries, config), _rotated(keys, config)
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return linear(f"{name}.o_proj", found.transpose(1, 2).flatten(2))

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        if config["model_type"] == "starcoder2":
            return linear(f"{name}.c_proj", F.gelu(linear(f"{name}.c_fc", x)))
        gate, up = F.silu(linear(f"{name}.gate_proj", x)), linear(f"{name}.up_proj", x)
        return linear(f"{name}.down_proj", gate * up)

    embedding = used.pop("model.embed_tokens.weight")
    assert embedding.shape[0] == config["vocab_size"]
    x = embedding[tokens]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        x = x + attention(f"{layer}.self_attn", norm(f"{layer}.input_layernorm", x))
        x = x + mlp(f"{layer}.mlp", norm(f"{layer}.post_attention_layernorm", x))
    x = norm("model.norm", x)
    x = F.linear(x, embedding) if config["tie_word_embeddings"] else linear("lm_head", x)
    assert not used
    return x


def _rotated(x: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The first channels of each head turned with the position, the rest as it is."""
    rotation = config["rope_parameters"]
    size = int(x.shape[-1] * rotation.get("partial_rotary_factor", 1.0))
    assert (rotation["rope_type"], rotation["rope_theta"]) == ("default", config["rope_theta"])
    assert rotation.get("partial_rotary_factor") == config.get("partial_rotary_factor")
    turned, rest = x[..., :size], x[..., size:]
    frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(x.shape[-2]).float(), frequencies).repeat(1, 2)
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([turned, rest], -1)
