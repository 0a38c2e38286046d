"""A repair of megatron-core 0.16: fully reshardable optimizer state of buffers with padding between buckets.

`DistributedOptimizer.get_parameter_state_dp_zero` gathers a buffer's buckets without the padding at their ends,
and `sharded_param_state_fully_reshardable` cuts the parameters out of the result by positions that count the
padding. So whenever a bucket other than a buffer's last one is padded, every parameter of the later buckets gets
its neighbours' state, and the last ones are filled up with zeros, with a warning. Buckets are padded to a
multiple of lcm(data-parallel size, 128) elements. There are several where tied embeddings get one of their own
(pipeline parallelism), and where gradients are reduced while the backward pass goes on (`ddp.bucket_size`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bridge.training.checkpointing.errors import CheckpointSaveError

_GATHERED = ("param", "exp_avg", "exp_avg_sq")


def is_padded_between_buckets(buffer: Any) -> bool:
    """Whether a `_ParamAndGradBuffer` has padding at the end of a bucket that is not its last one."""
    return any(bucket.grad_data.numel() != bucket.numel_unpadded for bucket in buffer.buckets[:-1])


@contextmanager
def padding_between_buckets(optimizers: Sequence[Any]) -> Iterator[None]:
    """Within this context, the state that distributed optimizers gather has the padding that its readers expect.

    Args:
        optimizers: unchained optimizers; those that gather nothing are left alone.

    Raises:
        CheckpointSaveError: at the end of the context, on the rank that gathers: other ranks gather for the next
            optimizer meanwhile and must not wait for it.
    """
    repaired = [
        optimizer for optimizer in optimizers if any(map(is_padded_between_buckets, getattr(optimizer, "buffers", ())))
    ]
    problems: list[str] = []
    for optimizer in repaired:
        optimizer.get_parameter_state_dp_zero = _Gather(optimizer, problems)  # hides the method of the class
    try:
        yield
    finally:
        for optimizer in repaired:
            del optimizer.get_parameter_state_dp_zero
    if problems:
        raise CheckpointSaveError(problems[0])


class _Gather:
    """megatron-core's gathering, with each buffer's buckets put where its parameters are looked for."""

    def __init__(self, optimizer: Any, problems: list[str]) -> None:
        self._problems = problems
        self._buffers = optimizer.buffers
        self._gather = optimizer.get_parameter_state_dp_zero

    def __call__(self, **options: Any) -> dict[Any, Any] | None:
        state: dict[Any, Any] | None = self._gather(**options)
        if state is not None:
            for index, buffer in enumerate(self._buffers):
                for tensors in state[index].values():
                    for name in _GATHERED:
                        tensors[name] = self._spread(tensors[name], buffer)
        return state

    def _spread(self, packed: torch.Tensor, buffer: Any) -> torch.Tensor:
        """The buckets of a buffer, one after the other in `packed`, at their offsets in the buffer."""
        spread = torch.zeros(buffer.numel, dtype=packed.dtype, device=packed.device)
        if packed.numel() != buffer.numel_unpadded:
            self._problems.append(
                f"megatron-core gathered {packed.numel()} elements of a buffer that has {buffer.numel_unpadded} "
                "without padding; which belong to which parameter is not known, so the optimizer state is not "
                "written. Set checkpoint.dist_ckpt_optim_fully_reshardable: false, or avoid several buckets in a "
                "buffer with model.share_embeddings_and_output_weights: false and ddp.overlap_grad_reduce: false"
            )
            return spread
        start = 0
        for bucket in buffer.buckets:
            spread[bucket.offset :][: bucket.numel_unpadded] = packed[start : start + bucket.numel_unpadded]
            start += bucket.numel_unpadded
        return spread
