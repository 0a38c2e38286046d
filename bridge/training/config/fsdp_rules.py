"""Rules of Megatron FSDP: what it needs, and what it does not go together with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config.schema import Violation, default_of, show

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig
    from bridge.training.config.model import GPTModelConfig
    from bridge.training.config.optimizer import DistributedDataParallelConfig
    from bridge.training.config.peft import LoRAConfig
    from bridge.training.config.training import RerunStateMachineConfig

FORMAT = "fsdp_dtensor"

_OF_OTHER_FORMATS = (
    "async_save",
    "fully_parallel_save",
    "fully_parallel_load",
    "dist_ckpt_strictness",
    "dist_ckpt_optim_fully_reshardable",
    "ckpt_assume_constant_structure",
    "load_main_params_from_ckpt",
)
"""Settings of `checkpoint` that `fsdp_dtensor` does not carry out."""


def fsdp_checkpoint_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    """What the format `fsdp_dtensor` carries out."""
    if checkpoint.ckpt_format != FORMAT:
        if checkpoint.strict_fsdp_dtensor_load:
            yield Violation(
                "checkpoint.strict_fsdp_dtensor_load",
                True,
                f"has no effect with checkpoint.ckpt_format {checkpoint.ckpt_format!r}",
                "leave it at false, or see checkpoint.dist_ckpt_strictness",
            )
        return
    for field in _OF_OTHER_FORMATS:
        value, default = getattr(checkpoint, field), default_of(type(checkpoint), field)
        if value != default and field != "async_save":  # which has a rule of its own
            yield Violation(
                f"checkpoint.{field}",
                value,
                f"does not work with checkpoint.ckpt_format {FORMAT!r}",
                f"leave it at {show(default)}",
            )
    if checkpoint.non_persistent_ckpt_type in ("local", "in_memory"):
        yield Violation(
            "checkpoint.non_persistent_ckpt_type",
            checkpoint.non_persistent_ckpt_type,
            f"does not work with checkpoint.ckpt_format {FORMAT!r}",
            "set it to 'global', or to null",
        )


def fsdp_rules(
    ddp: DistributedDataParallelConfig,
    model: GPTModelConfig,
    checkpoint: CheckpointConfig,
    peft: LoRAConfig | None,
    rerun: RerunStateMachineConfig,
) -> Iterator[Violation]:
    """What Megatron FSDP needs of the other sections."""
    if not ddp.use_megatron_fsdp:
        if checkpoint.ckpt_format == FORMAT:
            yield Violation(
                "checkpoint.ckpt_format",
                FORMAT,
                "is for models under Megatron FSDP only",
                "set ddp.use_megatron_fsdp to true, or ckpt_format to 'torch_dist'",
            )
        default = default_of(type(ddp), "data_parallel_sharding_strategy")
        if ddp.data_parallel_sharding_strategy != default:
            yield Violation(
                "ddp.data_parallel_sharding_strategy",
                ddp.data_parallel_sharding_strategy,
                "has no effect without ddp.use_megatron_fsdp",
                f"set that to true, or leave this at {show(default)}",
            )
        return
    if checkpoint.ckpt_format != FORMAT:
        yield Violation(
            "ddp.use_megatron_fsdp",
            True,
            f"does not work with checkpoint.ckpt_format {checkpoint.ckpt_format!r}",
            f"set checkpoint.ckpt_format to {FORMAT!r}, or this to false",
        )
    yield from _strategy_rules(ddp)
    yield from _model_rules(model)
    if peft is not None:
        yield Violation("peft", "set", "does not work with ddp.use_megatron_fsdp", "set that to false")
    if rerun.rerun_mode != "disabled":
        yield Violation(
            "rerun_state_machine.rerun_mode",
            rerun.rerun_mode,
            "does not work with ddp.use_megatron_fsdp",
            "set it to 'disabled'",
        )


def _strategy_rules(ddp: DistributedDataParallelConfig) -> Iterator[Violation]:
    strategy = ddp.data_parallel_sharding_strategy
    if strategy not in ("optim_grads", "optim_grads_params"):
        # Measured with megatron-core 0.16.1: on two ranks their gradients and losses leave those of DDP at once.
        yield Violation(
            "ddp.data_parallel_sharding_strategy",
            strategy,
            "trains wrongly with megatron-core 0.16",
            "set it to 'optim_grads_params' or 'optim_grads'",
        )
    if not ddp.use_distributed_optimizer:
        yield Violation(
            "ddp.use_distributed_optimizer",
            False,
            "does not work with ddp.use_megatron_fsdp, which shards the optimizer's state",
            "set it to true",
        )
    if ddp.average_in_collective:
        yield Violation(
            "ddp.average_in_collective",
            True,
            "does not work with ddp.use_megatron_fsdp, which scales the gradients of experts by another factor",
            "set it to false",
        )


def _model_rules(model: GPTModelConfig) -> Iterator[Violation]:
    if model.pipeline_model_parallel_size > 1:
        yield Violation(
            "model.pipeline_model_parallel_size",
            model.pipeline_model_parallel_size,
            "does not work with ddp.use_megatron_fsdp: the stages' parameters would be stored under the same names",
            "set it to 1",
        )
    if model.precision == "fp16":
        yield Violation(
            "model.precision",
            "fp16",
            "does not work with ddp.use_megatron_fsdp: megatron-core 0.16 cannot unscale its gradients",
            "set it to 'bf16' or 'fp32'",
        )
