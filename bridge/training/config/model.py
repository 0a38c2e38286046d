"""The model: its architecture, its numeric precision and how it is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class GPTModelConfig:
    """A GPT model of megatron-core, by the names that megatron-core and its users know."""

    num_layers: int = 2
    """Transformer layers over all pipeline stages."""

    hidden_size: int = 128
    """Width of the residual stream."""

    num_attention_heads: int = 4
    """Attention heads over all tensor-parallel ranks."""

    num_query_groups: int | None = None
    """Key/value heads of grouped-query attention; None gives every attention head its own."""

    ffn_hidden_size: int | None = None
    """Inner width of the MLP; None is four times `hidden_size`."""

    kv_channels: int | None = None
    """Width of one attention head; None is `hidden_size / num_attention_heads`."""

    seq_length: int = 256
    """Tokens in a training sequence."""

    vocab_size: int | None = None
    """Rows of the embedding, used as given; None is the tokenizer's size, padded (see the next setting)."""

    make_vocab_size_divisible_by: int = 128
    """The tokenizer's size is padded up to a multiple of this times `tensor_model_parallel_size`."""

    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How a position enters the model."""

    rotary_base: int = 10000
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Share of a head's channels that is rotated, in (0, 1]."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalization layer."""

    layernorm_epsilon: float = 1e-5
    """Added to the variance by the normalization layers."""

    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP; `swiglu` is gated."""

    add_bias_linear: bool = True
    """Whether linear layers have a bias."""

    share_embeddings_and_output_weights: bool = True
    """Whether the output layer uses the embedding's weights."""

    attention_dropout: float = 0.1
    """Dropout probability on attention weights."""

    hidden_dropout: float = 0.1
    """Dropout probability on what a sub-layer adds to the residual stream."""

    init_method_std: float = 0.02
    """Standard deviation of the normal distribution that initializes weights."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of parameters and activations; the optimizer keeps fp32 main parameters in any case."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""

    pipeline_model_parallel_size: int = 1
    """Stages into which the layers are divided."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks on each pipeline stage (interleaved schedule); None does not interleave."""

    context_parallel_size: int = 1
    """Ranks that share each sequence."""

    expert_model_parallel_size: int = 1
    """Ranks over which the experts are distributed."""

    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; None is `tensor_model_parallel_size`."""

    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also share the sequence in norms and dropout."""

    num_moe_experts: int | None = None
    """Experts in each layer; None makes a dense model."""

    moe_router_topk: int = 2
    """Experts that process each token."""

    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss."""

    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "allgather"
    """How tokens travel to their experts."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """What is recomputed in the backward pass instead of kept; None keeps everything."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers are recomputed; needed with granularity `full`, meaningless otherwise."""

    recompute_num_layers: int | None = None
    """Layers of a recomputed unit (`uniform`) or of each stage (`block`); needed with granularity `full`."""

    transformer_layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers; `auto` takes TransformerEngine where it is installed and usable."""

    transformer_overrides: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's TransformerConfig, passed on as they are."""
