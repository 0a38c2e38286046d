"""Rules of the parallel sizes: what they divide, what they need, and how many ranks they fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config.errors import ConfigError
from bridge.training.config.schema import Violation, at_least, multiple_of

if TYPE_CHECKING:
    from bridge.training.config.model import GPTModelConfig
    from bridge.training.config.training import TrainingConfig


def model_parallel_rules(model: GPTModelConfig) -> Iterator[Violation]:
    """What the parallel sizes ask of the model."""
    yield from at_least(
        "model",
        model,
        1,
        *(
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
        ),
        *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    )
    yield from _tensor_parallel_rules(model)
    yield from _pipeline_rules(model)
    context = model.context_parallel_size
    if context > 1:
        # Causal attention is balanced by giving each rank one early and one late chunk.
        yield from multiple_of("model.seq_length", model.seq_length, "twice context_parallel_size,", 2 * context)
    yield from multiple_of(
        "model.num_moe_experts",
        model.num_moe_experts,
        "expert_model_parallel_size",
        model.expert_model_parallel_size,
    )


def _tensor_parallel_rules(model: GPTModelConfig) -> Iterator[Violation]:
    size = model.tensor_model_parallel_size
    what = "tensor_model_parallel_size"
    yield from multiple_of("model.num_attention_heads", model.num_attention_heads, what, size)
    yield from multiple_of("model.ffn_hidden_size", model.ffn_hidden_size, what, size)
    yield from multiple_of("model.vocab_size", model.vocab_size, what, size)
    groups = model.num_query_groups
    if groups is not None and groups >= 1 and size >= 1 and groups % size and size % groups:
        yield Violation(
            "model.num_query_groups",
            groups,
            f"is neither a multiple nor a divisor of {what} {size}",
            "change one of them",
        )
    if model.sequence_parallel:
        if size == 1:
            yield Violation(
                "model.sequence_parallel",
                True,
                f"has no ranks to share the sequence with {what} 1",
                f"set it to false, or {what} to 2 or more",
            )
        yield from multiple_of("model.seq_length", model.seq_length, what, size)
    if model.num_moe_experts is not None and size > 1 and not model.sequence_parallel:
        yield Violation(
            "model.sequence_parallel",
            False,
            f"does not work with num_moe_experts and {what} {size} together: megatron-core refuses it",
            f"set it to true, or {what} to 1",
        )


def _pipeline_rules(model: GPTModelConfig) -> Iterator[Violation]:
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if chunks is None:
        yield from multiple_of("model.num_layers", model.num_layers, "pipeline_model_parallel_size", stages)
        return
    if stages == 1:
        yield Violation(
            "model.virtual_pipeline_model_parallel_size",
            chunks,
            "interleaves nothing with pipeline_model_parallel_size 1",
            "leave it at null, or set pipeline_model_parallel_size to 2 or more",
        )
    yield from multiple_of(
        "model.num_layers",
        model.num_layers,
        "pipeline_model_parallel_size * virtual_pipeline_model_parallel_size,",
        stages * chunks,
    )


def data_parallel_size(model: GPTModelConfig, world_size: int) -> int:
    """Replicas of the model among `world_size` ranks.

    Raises:
        ConfigError: the world size is no multiple of the ranks of one replica.
    """
    found = [*_replica_rules(model, world_size)]
    if found:
        raise ConfigError([str(violation) for violation in found])
    return world_size // _ranks_of_a_replica(model)


def _ranks_of_a_replica(model: GPTModelConfig) -> int:
    sizes = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    return sizes[0] * sizes[1] * sizes[2]


def _replica_rules(model: GPTModelConfig, world_size: int) -> Iterator[Violation]:
    replica = _ranks_of_a_replica(model)
    if replica < 1 or world_size < 1 or world_size % replica:
        sizes = (
            f"tensor_model_parallel_size {model.tensor_model_parallel_size} * "
            f"pipeline_model_parallel_size {model.pipeline_model_parallel_size} * "
            f"context_parallel_size {model.context_parallel_size}"
        )
        yield Violation(
            "world size",
            world_size,
            f"is not a multiple of model.{sizes} = {replica}",
            f"start a multiple of {max(replica, 1)} ranks, or change the sizes",
        )


def world_size_rules(model: GPTModelConfig, train: TrainingConfig, world_size: int) -> Iterator[Violation]:
    """What the number of ranks must be a multiple of, and what must be a multiple of the replicas."""
    problems = list(_replica_rules(model, world_size))
    if problems:
        yield from problems
        return
    yield from _expert_world_rules(model, world_size)
    replicas = world_size // _ranks_of_a_replica(model)
    step = train.micro_batch_size * replicas
    what = f"micro_batch_size {train.micro_batch_size} * data-parallel size {replicas} ="
    yield from multiple_of("train.global_batch_size", train.global_batch_size, what, step)
    ramp = train.rampup_batch_size or []
    if len(ramp) == 3 and min(ramp) >= 1 and step >= 1 and (ramp[0] % step or ramp[1] % step):
        yield Violation(
            "train.rampup_batch_size",
            ramp,
            f"has a start or an increment that is not a multiple of {what} {step}",
            "change one of them",
        )


def _expert_world_rules(model: GPTModelConfig, world_size: int) -> Iterator[Violation]:
    if model.num_moe_experts is None:
        return
    tensor = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
    expert, stages = model.expert_model_parallel_size, model.pipeline_model_parallel_size
    # megatron-core: experts have their own grid, which spends the ranks of tensor and context parallelism.
    ranks = tensor * expert * stages
    if ranks >= 1 and world_size % ranks:
        yield Violation(
            "model.expert_model_parallel_size",
            expert,
            f"does not divide the {world_size} ranks: times expert tensor parallel size {tensor} and "
            f"pipeline_model_parallel_size {stages} it takes a multiple of {ranks}",
            "change one of them",
        )
