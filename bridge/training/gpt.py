"""From `GPTModelConfig` to Megatron-Core's GPTModel, one DDP-wrapped chunk for each virtual pipeline stage."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fusions import fused_layer_norm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils

from bridge import accelerator
from bridge.training.config import ConfigContainer, ConfigError, GPTModelConfig
from bridge.training.fsdp import wrap_in_megatron_fsdp
from bridge.training.torch_fsdp2 import wrap_in_torch_fsdp2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def padded_vocab_size(model: GPTModelConfig, tokenizer_vocab_size: int) -> int:
    """Rows of the embedding: `model.vocab_size`, or the tokenizer's size padded for tensor parallelism.

    Raises:
        ConfigError: `model.vocab_size` has no row for some of the tokenizer's ids.
    """
    if model.vocab_size is None:
        multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
        return -(-tokenizer_vocab_size // multiple) * multiple
    if model.vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {tokenizer_vocab_size} ids; "
            "leave it out to pad the tokenizer's size, or set at least that many"
        )
    return model.vocab_size


def uses_transformer_engine(model: GPTModelConfig) -> bool:
    """Whether the layers come from TransformerEngine.

    Raises:
        ConfigError: TransformerEngine is asked for and cannot be used here.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    usable = installed and accelerator.is_cuda()
    if model.transformer_layer_spec == "transformer_engine" and not usable:
        why = "it needs CUDA" if installed else "it is not installed"
        raise ConfigError(f"model.transformer_layer_spec is 'transformer_engine', but {why}; set 'auto' or 'local'")
    return usable and model.transformer_layer_spec != "local"


def check_layers(model: GPTModelConfig) -> None:
    """Refuse what Megatron-Core's own layers cannot do where TransformerEngine's are not used.

    Raises:
        ConfigError: context or sequence parallelism, or experts with a bias.
    """
    if uses_transformer_engine(model):
        return
    problems = []
    if model.context_parallel_size > 1:
        problems.append(
            f"model.context_parallel_size is {model.context_parallel_size}: context parallelism needs the layers "
            "of TransformerEngine, which are not used here; set it to 1"
        )
    if model.num_moe_experts is not None and model.add_bias_linear:
        # With one expert-parallel rank it adds the bias in place to a view, which autograd refuses.
        problems.append(
            "model.add_bias_linear is true: Megatron-Core's own experts cannot have a bias; set it to false"
        )
    if model.sequence_parallel and not fused_layer_norm.HAVE_FUSED_LAYER_NORM:
        problems.append(
            "model.sequence_parallel is true: sequence parallelism needs the layer norm of TransformerEngine or "
            "Apex, neither of which is used here; set it to false"
        )
    if problems:
        raise ConfigError(problems)


def transformer_config(model: GPTModelConfig) -> TransformerConfig:
    """Megatron-Core's configuration of the transformer layers.

    Raises:
        ConfigError: `model.transformer_overrides` names no field of TransformerConfig or one that a setting of
            its own decides, or Megatron-Core refuses the combination.
    """
    settings = _named_settings(model)
    _check_overrides(model.transformer_overrides, settings)
    if not accelerator.is_cuda():
        settings["batch_p2p_comm"] = False  # gloo has no batched sends
    try:
        return TransformerConfig(**{**settings, **model.transformer_overrides})
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"Megatron-Core does not accept the settings of `model`: {error}") from error


def _named_settings(model: GPTModelConfig) -> dict[str, Any]:
    dtype = DTYPES[model.precision]
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "kv_channels": model.kv_channels,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "activation_func": F.silu if model.activation == "swiglu" else F.gelu,
        "gated_linear_unit": model.activation == "swiglu",
        "add_bias_linear": model.add_bias_linear,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "init_method_std": model.init_method_std,
        "bf16": model.precision == "bf16",
        "fp16": model.precision == "fp16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": model.expert_tensor_parallel_size,
        "sequence_parallel": model.sequence_parallel,
        "recompute_granularity": model.recompute_granularity,
        "recompute_method": model.recompute_method,
        "recompute_num_layers": model.recompute_num_layers,
    }
    if model.num_moe_experts is not None:
        settings |= {
            "num_moe_experts": model.num_moe_experts,
            "moe_router_topk": model.moe_router_topk,
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
            "moe_ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        }
    return settings


def _check_overrides(overrides: dict[str, Any], named: dict[str, Any]) -> None:
    known = [field.name for field in fields(TransformerConfig) if field.init]
    problems = []
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(
                f"model.transformer_overrides.{name}: Megatron-Core's TransformerConfig has no such field{hint}"
            )
        elif name in named:
            problems.append(
                f"model.transformer_overrides.{name}: this field follows from a setting of `model` itself; use that one"
            )
    if problems:
        raise ConfigError(problems)


def build_model(
    cfg: ConfigContainer,
    tokenizer_vocab_size: int,
    before_wrapping: Callable[[list[torch.nn.Module]], None] | None = None,
) -> list[Any]:
    """This rank's chunks of the model, on the device, in the configured precision, wrapped in DDP or in FSDP.

    The process groups and the random state must be initialized. Replicas start equal unless
    `rng.data_parallel_random_init` is set, in which case those of data-parallel rank 0 are broadcast.

    Args:
        cfg: the run's configuration.
        tokenizer_vocab_size: ids of the tokenizer.
        before_wrapping: gets the chunks before they are wrapped, which is the last moment to change what
            requires gradients.
    """
    check_layers(cfg.model)
    config = transformer_config(cfg.model)
    config.finalize_model_grads_func = finalize_model_grads
    vocab_size = padded_vocab_size(cfg.model, tokenizer_vocab_size)
    if cfg.model.num_moe_experts is not None and not hasattr(moe_utils, "te_general_gemm"):
        # Megatron-Core 0.16 asks whether this is None without having defined it where TransformerEngine is absent.
        moe_utils.te_general_gemm = None
    stages = cfg.model.virtual_pipeline_model_parallel_size
    virtual_stages: list[int | None] = [None] if stages is None else list(range(stages))
    chunks = [_build_chunk(cfg.model, config, vocab_size, stage) for stage in virtual_stages]
    if before_wrapping is not None:
        before_wrapping(chunks)
    if cfg.ddp.use_megatron_fsdp:
        return [wrap_in_megatron_fsdp(cfg, config, chunk) for chunk in chunks]
    if cfg.dist.use_torch_fsdp2:
        engine = uses_transformer_engine(cfg.model)
        return [wrap_in_torch_fsdp2(cfg, config, chunk, transformer_engine=engine) for chunk in chunks]
    wrapped = [
        DistributedDataParallel(
            config,
            _ddp_config(cfg),
            chunk,
            # Only the first chunk's gradients become ready early enough to gain from buckets.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    if cfg.rng.data_parallel_random_init:
        for chunk in wrapped:
            chunk.broadcast_params()
    if cfg.ddp.overlap_grad_reduce:
        contexts = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
    return wrapped


def _build_chunk(
    model: GPTModelConfig, config: TransformerConfig, vocab_size: int, stage: int | None
) -> torch.nn.Module:
    virtual = stage is not None
    chunk: torch.nn.Module = GPTModel(
        config,
        _layer_spec(model, config, stage),
        vocab_size=vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=not virtual, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=not virtual, vp_stage=stage),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        **({"vp_stage": stage} if virtual else {}),
    )
    chunk = chunk.to(accelerator.device())
    if model.precision != "fp32":
        chunk = Float16Module(config, chunk)
    return chunk


def _layer_spec(model: GPTModelConfig, config: TransformerConfig, stage: int | None) -> Any:
    engine = uses_transformer_engine(model)
    if config.num_moe_experts is not None:
        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=engine, normalization=model.normalization, vp_stage=stage
        )
    if engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=model.normalization)


def _ddp_config(cfg: ConfigContainer) -> DistributedDataParallelConfig:
    ddp = cfg.ddp
    return DistributedDataParallelConfig(
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        average_in_collective=ddp.average_in_collective,
        check_for_nan_in_grad=ddp.check_for_nan_in_grad,
        bucket_size=ddp.bucket_size,
    )
