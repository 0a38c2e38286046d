"""Runs under torch FSDP2, and under DDP as they would be: configuration, and everything that must be equal."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bridge.training.config import ConfigContainer
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.training import tiny

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "share_embeddings_and_output_weights": False,
}
"""Divides evenly among 2 and among 4 ranks."""
SWIGLU = {"activation": "swiglu", "add_bias_linear": False}
UNEVEN = MODEL | SWIGLU | {"hidden_size": 31, "num_attention_heads": 1, "kv_channels": 16, "ffn_hidden_size": 33}
"""A gated model whose rows do not divide evenly, nor do the halves of its gated layers."""
MOE = MODEL | SWIGLU | {"num_moe_experts": 2, "moe_aux_loss_coeff": 0.01}
"""Has routers of two rows: with 4 ranks some have none of them."""
FSDP2 = {"use_torch_fsdp2": True}


def fsdp2_config(
    *,
    train_iters: int = 4,
    model: dict[str, Any] | None = None,
    sharded: bool = True,
    ddp: dict[str, Any] | None = None,
    **checkpoint: Any,
) -> ConfigContainer:
    """A tiny run under torch FSDP2, or, not `sharded`, under DDP; its learning rates do not depend on `train_iters`."""
    return tiny.tiny_config(
        train_iters=train_iters,
        model=MODEL if model is None else model,
        ddp={"use_distributed_optimizer": False, **(ddp or {})},
        dist=FSDP2 if sharded else {},
        scheduler={"lr_decay_iters": 8},
        checkpoint=checkpoint,
    )


def run_to_end(cfg: ConfigContainer) -> dict[str, Any]:
    """Train as configured on this rank; return what was loaded and saved, and everything that the run then has."""
    saved = tiny.SavedCheckpoints()
    run = setup(cfg, saved.manager)
    started_at, losses, norms = run.state.train_state.step, [], []
    begun_with = whole(run)

    def note(context: Any) -> None:
        del context
        losses.append(run.state.metrics["loss"])
        norms.append(run.state.metrics.get("grad_norm"))

    saved.manager.register("on_train_step_end", note)
    outcome = train(run)
    return {
        "started at": started_at,
        "loaded from": run.state.loaded_from,
        "iteration": outcome.iteration,
        "saved": saved.saved,
        "losses": losses,
        "norms": norms,
        "digests": tiny.digests(run),
        "begun with": begun_with,
        "whole": whole(run),
    }


def whole(run: Run) -> dict[str, torch.Tensor]:
    """Every parameter and the optimizer's state of it, put together from the data-parallel ranks; collective."""
    found: dict[str, torch.Tensor] = {}
    names = {}
    (chunk,) = run.model
    for name, parameter in chunk.named_parameters():
        found[name] = parameter
        names[id(getattr(parameter, "main_param", parameter))] = name
    for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for parameter, state in part.optimizer.state.items():
            found |= {f"{key} of {names[id(parameter)]}": value for key, value in state.items()}
    with torch.no_grad():
        return {key: _full(value).clone() for key, value in sorted(found.items())}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
