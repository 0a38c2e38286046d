"""Having ready, before the first asynchronous save, what its snapshot needs: the writer process and the memory.

Both take a moment that the first save would have to wait for. The process comes up beside the first training step; the
memory is made behind it, when the optimizer's state is there and says how much is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from bridge.training.checkpointing.contents.optimizer_forms import chained
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.save_plans import writer_of

logger = logging.getLogger(__name__)

_PER_TENSOR = 2 << 10
"""Bytes that surround a tensor in its file, at most."""
_REST = 1 << 20
"""Bytes for everything else that a rank saves."""


@dataclass
class WarmUp:
    """What is done for the first save of a run, a part of it before each of the first steps."""

    checkpoint_config: Any
    context: dict[str, Any]
    model: list[Any] | None = None
    optimizer: Any | None = None
    groups: Any | None = None
    _steps: int = 0

    def know(self, model: list[Any], optimizer: Any | None, groups: Any | None) -> None:
        """What is going to be saved, and the process groups of the ranks that share it."""
        if self._is_due:
            self.model, self.optimizer, self.groups = model, optimizer, groups

    def before_step(self, state: Any) -> None:
        """Do what is due before a training step. Local; it waits for nothing, and never raises."""
        if not self._is_due:
            return
        self._steps += 1
        try:
            if self._steps == 1:
                writer_of(self.context).warm()
            elif self.model:
                groups = self.groups or default_pg_collection()
                size = expected_bytes(
                    self.checkpoint_config, self.model, self.optimizer, groups, state.peft is not None
                )
                self.model = self.optimizer = self.groups = None
                writer_of(self.context).warm(size)
        except Exception:
            logger.debug("nothing is made ready for the first save", exc_info=True)

    @property
    def _is_due(self) -> bool:
        return self._steps < 2 and _is_wanted(self.checkpoint_config)


def expected_bytes(cfg: Any, model: list[Any], optimizer: Any | None, groups: Any, only_trained: bool) -> int:
    """About how many bytes this rank is going to write in each save, as far as tensors that are there now say it.

    Args:
        cfg: checkpoint configuration.
        model: model chunks of this rank.
        optimizer: megatron-core optimizer, with state after its first step; or None.
        groups: process groups, with `dp_cp`.
        only_trained: whether only parameters that are trained are saved.
    """
    parameters = [p for chunk in model for p in chunk.parameters() if p.requires_grad or not only_trained]
    copied, own, tensors = _bytes_of(parameters), 0, len(parameters)
    for part in chained(optimizer) if cfg.save_optim and optimizer is not None else ():
        state = _state_of(part, {id(parameter) for parameter in parameters})
        tensors += len(state)
        if isinstance(part, DistributedOptimizer):
            own += _bytes_of(state)
        else:
            copied += _bytes_of(state)
    if cfg.fully_parallel_save:
        copied //= groups.dp_cp.size()
    elif groups.dp_cp.rank() > 0:
        copied = 0
    return copied + own + tensors * _PER_TENSOR + _REST


def _is_wanted(cfg: Any) -> bool:
    """Whether there will be a save that the writer process writes, and not only one at the end."""
    is_global = cfg.non_persistent_ckpt_type == "global"
    every = cfg.save_interval or cfg.save_interval_minutes or (is_global and cfg.non_persistent_save_interval)
    writes = cfg.ckpt_format in ("torch_dist", "fsdp_dtensor") and cfg.io_backend == "direct"
    return bool(cfg.async_save and cfg.save is not None and writes and every)


def _state_of(part: Any, of_model: set[int]) -> list[torch.Tensor]:
    """The tensors of an optimizer's state, and its own copies of parameters."""
    inner = getattr(part, "optimizer", None)
    if inner is None:
        return []
    groups = [parameter for group in inner.param_groups for parameter in group["params"]]
    found = [parameter for parameter in groups if id(parameter) not in of_model]
    return found + [
        value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
