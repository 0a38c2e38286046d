"""Runs under Megatron FSDP: their configuration, and everything of them that must be equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import gather_and_compute_chunk_metadata
from torch.distributed.tensor import DTensor

from bridge.training.config import ConfigContainer
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.training import tiny

FSDP = {"use_megatron_fsdp": True}
SWIGLU = {"activation": "swiglu", "add_bias_linear": False}
MOE = {"num_moe_experts": 4, "add_bias_linear": False, **SWIGLU}


def fsdp_config(
    *, train_iters: int = 4, model: dict[str, Any] | None = None, ddp: dict[str, Any] | None = None, **checkpoint: Any
) -> ConfigContainer:
    """A tiny run under Megatron FSDP whose learning rates do not depend on `train_iters`."""
    return tiny.tiny_config(
        train_iters=train_iters,
        model=model or {},
        ddp={**FSDP, **(ddp or {})},
        scheduler={"lr_decay_iters": 8},
        checkpoint={"ckpt_format": "fsdp_dtensor", **checkpoint},
    )


def run_to_end(cfg: ConfigContainer) -> dict[str, Any]:
    """Train as configured on this rank; return what was loaded and saved, and everything that the run then has."""
    saved = tiny.SavedCheckpoints()
    run = setup(cfg, saved.manager)
    started_at, losses = run.state.train_state.step, []
    saved.manager.register("on_train_step_end", lambda context: losses.append(run.state.metrics["loss"]))
    outcome = train(run)
    return {
        "started at": started_at,
        "loaded from": run.state.loaded_from,
        "iteration": outcome.iteration,
        "saved": saved.saved,
        "losses": losses,
        "digests": digests(run),
        "whole": whole(run),
    }


def shards(run: Run) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter and of the optimizer's state."""
    (chunk,) = run.model
    tensors: dict[str, Any] = dict(chunk.state_dict_for_save_checkpoint())
    optimizer = run.optimizer.optimizer
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{number}.{position}.{key}"] = value
    return {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def digests(run: Run) -> dict[str, str]:
    """One hash for each shard, and everything else of this rank's run."""
    found = {key: tiny._hash(_local(value)) for key, value in shards(run).items()}
    for number, group in enumerate(run.optimizer.optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        found[f"optimizer.group{number}"] = repr(sorted(settings.items()))
    found["scheduler"] = repr(run.scheduler.state_dict())
    found["train state"] = repr(run.state.train_state)
    return found | tiny.digests_of_random_states()


def whole(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of `shards`, put together from all ranks; collective."""
    return {key: _gathered(value) for key, value in sorted(shards(run).items()) if isinstance(value, DTensor)}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(tensor: DTensor) -> torch.Tensor:
    chunk = gather_and_compute_chunk_metadata(tensor)
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, (tuple(chunk.offsets), tensor.to_local().detach().clone()))
    full = torch.full(tensor.shape, float("nan"))
    for offsets, piece in pieces:
        if piece.numel():
            full[tuple(slice(start, start + n) for start, n in zip(offsets, piece.shape, strict=True))] = piece.float()
    return full
