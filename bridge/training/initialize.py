"""Process groups, random seeds and batch sizes: what a process needs before anything is built."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bridge import accelerator
from bridge.training.config import ConfigContainer, ConfigError
from bridge.training.optimizer import global_batch_size


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process among those of its job, as torchrun describes it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environ(cls) -> LaunchEnvironment:
        """Read RANK, LOCAL_RANK and WORLD_SIZE; without torchrun this is the only rank.

        Raises:
            ConfigError: a variable is no number, or the rank does not exist.
        """
        try:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise ConfigError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}") from error
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"RANK is {rank} and WORLD_SIZE is {world_size}; start several ranks with torchrun, "
                "and a single one with neither variable set"
            )
        return cls(rank, local_rank, world_size)


def initialize_distributed(cfg: ConfigContainer, launch: LaunchEnvironment) -> None:
    """Start torch.distributed, unless it runs already, and Megatron-Core's groups over it."""
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if launch.world_size == 1:
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
        accelerator.set_device(launch.local_rank)
        dist.init_process_group(
            cfg.dist.backend or accelerator.process_group_backend(),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(minutes=cfg.dist.distributed_timeout_minutes),
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    model = cfg.model
    parallel_state.initialize_model_parallel(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
        distributed_timeout_minutes=cfg.dist.distributed_timeout_minutes,
        create_gloo_process_groups=True,
    )


def set_seeds(cfg: ConfigContainer) -> None:
    """Seed Python, numpy, torch and Megatron-Core's tracker as Megatron-LM does.

    Pipeline stages differ by 100, and data-parallel ranks by 10 if `rng.data_parallel_random_init` is set;
    tensor- and expert-parallel ranks differ inside the tracker.
    """
    seed = cfg.rng.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    if cfg.rng.data_parallel_random_init:
        seed += 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def initialize_microbatches(cfg: ConfigContainer) -> None:
    """Set up Megatron-Core's calculator of the micro-batches in an iteration, ramp-up included."""
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        dist.get_rank(),
        cfg.train.rampup_batch_size,
        global_batch_size(cfg, data_parallel_size),
        cfg.train.micro_batch_size,
        data_parallel_size,
    )


def shut_down() -> None:
    """Leave Megatron-Core's groups and torch.distributed, after all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
