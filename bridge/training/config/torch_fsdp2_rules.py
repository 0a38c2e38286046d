"""Rules of torch FSDP2: what it needs, and what it does not go together with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config.fsdp_rules import FORMAT
from bridge.training.config.schema import Violation, default_of, show

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig
    from bridge.training.config.model import GPTModelConfig
    from bridge.training.config.optimizer import DistributedDataParallelConfig
    from bridge.training.config.training import DistributedInitConfig

_WITH = "does not work with dist.use_torch_fsdp2"

_OF_BUCKETS = ("overlap_grad_reduce", "overlap_param_gather", "average_in_collective", "bucket_size")
"""Settings of `ddp` that FSDP2 decides itself."""

_OF_MAIN_GRADIENTS = ("gradient_accumulation_fusion", "calculate_per_token_loss")
"""Fields of TransformerConfig for the gradients that megatron-core's own wrappers keep beside torch's."""


def torch_fsdp2_rules(
    dist: DistributedInitConfig,
    ddp: DistributedDataParallelConfig,
    model: GPTModelConfig,
    checkpoint: CheckpointConfig,
) -> Iterator[Violation]:
    """What torch FSDP2 needs of the other sections."""
    if not dist.use_torch_fsdp2:
        return
    if ddp.use_megatron_fsdp:
        yield Violation(
            "dist.use_torch_fsdp2", True, "does not work with ddp.use_megatron_fsdp", "set one of them to false"
        )
        return
    if checkpoint.ckpt_format == FORMAT:
        yield Violation(
            "dist.use_torch_fsdp2",
            True,
            f"does not work with checkpoint.ckpt_format {FORMAT!r}",
            "set checkpoint.ckpt_format to 'torch_dist', or this to false",
        )
    yield from _ddp_rules(ddp, model)
    yield from _model_rules(model)


def _ddp_rules(ddp: DistributedDataParallelConfig, model: GPTModelConfig) -> Iterator[Violation]:
    if ddp.use_distributed_optimizer:
        yield Violation(
            "ddp.use_distributed_optimizer",
            True,
            f"{_WITH}, which shards the optimizer's state itself",
            "set it to false",
        )
    if ddp.grad_reduce_in_fp32 and model.precision == "bf16":
        yield Violation(
            "ddp.grad_reduce_in_fp32",
            True,
            f"{_WITH} and model.precision 'bf16': FSDP2 keeps and reduces gradients in bf16",
            "set it to false",
        )
    for field in _OF_BUCKETS:
        value, default = getattr(ddp, field), default_of(type(ddp), field)
        if value != default:
            yield Violation(
                f"ddp.{field}", value, "has no effect with dist.use_torch_fsdp2", f"leave it at {show(default)}"
            )


def _model_rules(model: GPTModelConfig) -> Iterator[Violation]:
    """Megatron-LM has the rules about stages, experts, shared embeddings and fp16 too."""
    if model.pipeline_model_parallel_size > 1:
        yield Violation("model.pipeline_model_parallel_size", model.pipeline_model_parallel_size, _WITH, "set it to 1")
    if model.expert_model_parallel_size > 1:
        yield Violation(
            "model.expert_model_parallel_size",
            model.expert_model_parallel_size,
            f"{_WITH}, which shards experts among the same ranks as all else",
            "set it to 1",
        )
    if model.expert_tensor_parallel_size not in (None, model.tensor_model_parallel_size):
        yield Violation(
            "model.expert_tensor_parallel_size",
            model.expert_tensor_parallel_size,
            f"{_WITH}, which shards experts among the same ranks as all else",
            "leave it at null",
        )
    if model.share_embeddings_and_output_weights:
        yield Violation(
            "model.share_embeddings_and_output_weights",
            True,
            f"{_WITH}, which gathers the embedding for its own layer only",
            "set it to false",
        )
    if model.precision == "fp16":
        yield Violation("model.precision", "fp16", _WITH, "set it to 'bf16' or 'fp32'")
    for field in _OF_MAIN_GRADIENTS:
        if model.transformer_overrides.get(field):
            yield Violation(
                f"model.transformer_overrides.{field}", model.transformer_overrides[field], _WITH, "set it to false"
            )
