"""One training iteration: micro-batches through the pipeline, one optimizer step, the loss of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank

from bridge import accelerator
from bridge.training.config import ConfigContainer
from bridge.training.rerun import StepFailed, run_validated, validate_loss

Batch = dict[str, torch.Tensor]
LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one iteration gave."""

    loss: float | None
    """Mean loss over the iteration's counted tokens of all ranks, in nats; None before the last stage."""
    grad_norm: float | None
    updated: bool
    """False if the optimizer left the update out because a gradient overflowed, or the step failed."""
    failed: StepFailed | None = None
    """Set if the rerun state machine keeps this step from being taken; the optimizer has not stepped."""


def train_step(
    cfg: ConfigContainer,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    data: Iterator[Batch] | None,
) -> StepResult:
    """Run one iteration on this rank. Collective over all ranks.

    Args:
        cfg: the run's configuration.
        model: this rank's DDP-wrapped chunks.
        optimizer: Megatron-Core's optimizer.
        scheduler: moved on by the samples of the iteration, if the update was made.
        data: this rank's micro-batches; None on pipeline stages that need none.
    """
    microbatches = get_num_microbatches()

    def forward_backward(data: Iterator[Batch] | None) -> list[dict[str, torch.Tensor]]:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        # Of a rank's chunks only the first or the last stage of the whole model reads data: one stream is enough.
        streams = [data if _needs_data(chunk) else None for chunk in model]
        losses: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=streams if len(model) > 1 else streams[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=microbatches,
            seq_length=cfg.model.seq_length,
            micro_batch_size=cfg.train.micro_batch_size,
            forward_only=False,
        )
        return losses

    if cfg.rerun_state_machine.rerun_mode == "disabled":
        losses = forward_backward(data)
    else:
        losses, failed = run_validated(data, forward_backward)
        if failed is not None:
            return StepResult(None, None, False, failed)
    updated, grad_norm, _ = optimizer.step()
    if updated:
        ranks = parallel_state.get_data_parallel_world_size()
        scheduler.step(increment=microbatches * cfg.train.micro_batch_size * ranks)
    clear_aux_losses_tracker()  # otherwise the routers add to it for ever
    return StepResult(_mean_loss(losses), None if grad_norm is None else float(grad_norm), bool(updated))


def forward_step(data: Iterator[Batch] | None, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossResult]]:
    """One micro-batch through one chunk, as Megatron-Core's schedules call it.

    Returns:
        The chunk's output: the loss of each token [micro batch, sequence] on the last stage, else activations;
        and the function that reduces the former.
    """
    batch: Batch = {}
    if data is not None:
        batch = {name: tensor.to(accelerator.device()) for name, tensor in next(data).items()}
        batch = get_batch_on_this_cp_rank(batch)
    output = model(
        batch.get("tokens"), batch.get("position_ids"), batch.get("attention_mask"), labels=batch.get("labels")
    )
    return output, partial(_masked_loss, batch.get("loss_mask"))


def _masked_loss(mask: torch.Tensor | None, losses: torch.Tensor) -> LossResult:
    """Sum of the losses that count, their number, and both as float64 for the report."""
    if mask is None:
        raise RuntimeError("the last pipeline stage has no data iterator, so its loss has no mask")
    total = (losses.float().view(-1) * mask.view(-1)).sum()
    tokens = mask.sum().to(torch.int32)
    validate_loss(total)
    return total, tokens, {"loss": torch.stack([total.detach().double(), tokens.double()])}


def _mean_loss(losses: list[dict[str, torch.Tensor]]) -> float | None:
    if not losses:
        return None
    sums = torch.stack([entry["loss"] for entry in losses]).sum(dim=0)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    total, tokens = sums.tolist()
    return total / tokens if tokens else 0.0


def _needs_data(chunk: Any) -> bool:
    return bool(get_attr_wrapped_model(chunk, "pre_process") or get_attr_wrapped_model(chunk, "post_process"))
