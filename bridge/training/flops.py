"""How many floating-point operations training a GPT model takes."""

from __future__ import annotations

from bridge.training.config import GPTModelConfig


def flops_per_sequence(model: GPTModelConfig, vocab_size: int) -> float:
    """Floating-point operations of the forward and backward pass over one sequence.

    The count is that of the matrix products, two operations for each multiply-add and three times the
    forward pass in all (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix), extended by
    grouped-query attention, gated activations and the experts that a token visits. Recomputation is not
    counted: these are the model's operations, not the hardware's.
    """
    tokens = model.seq_length
    head_width = model.kv_channels or model.hidden_size // model.num_attention_heads
    query_width = head_width * model.num_attention_heads
    key_value_width = head_width * (model.num_query_groups or model.num_attention_heads)
    projections = model.hidden_size * (2 * query_width + 2 * key_value_width)
    scores = 2 * query_width * tokens
    ffn_width = model.ffn_hidden_size or 4 * model.hidden_size
    experts = 1 if model.num_moe_experts is None else model.moe_router_topk
    mlp = experts * (3 if model.activation == "swiglu" else 2) * model.hidden_size * ffn_width
    per_token = model.num_layers * (projections + scores + mlp) + model.hidden_size * vocab_size
    return float(6 * tokens * per_token)


def add_flops(total: int, spent: float) -> int:
    """`total + spent`, rounded to an integer that float64 represents: what a checkpoint can hold exactly."""
    return int(float(total) + spent)
