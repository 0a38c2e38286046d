"""Two-stage loading: one replica of each shard is read from storage, and goes from there to the others.

It wraps the load strategy of any format. The ranks of a data-parallel group tell one another what they want, each
computes the same assignment, and reads its share in rounds of a limited size. After each round all ranks agree that
nothing has failed before anything of it is sent, so a rank that cannot read leaves no other waiting. While a round is
exchanged, the next one is read. Tensors are read and received in the memory where they are wanted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.formats.read_assignment import MESSAGE_BYTES, Assignment, UnitId, assign
from bridge.training.checkpointing.formats.read_choice import (
    Choice,
    Measured,
    Work,
    choose,
    process_group,
    worth_measuring,
)
from bridge.training.checkpointing.formats.read_probe import probe
from bridge.training.checkpointing.formats.read_rounds import (
    OBJECT,
    ROUND_BYTES,
    TENSOR,
    LoadTimes,
    Prepare,
    Rounds,
    is_tensor,
    summary,
)

logger = logging.getLogger(__name__)

_OBJECT_BYTES = 1024
"""What an object counts for when the reading is divided. Only reading it would tell its size."""


@runtime_checkable
class ReadsAlone(Protocol):
    """A load strategy that can read on one rank without the others; such reading overlaps with the exchange."""

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """Check everything that can be checked without changing a tensor, and return what reads. Both are local.

        What is returned reads the tensors, into their own memory where they have some, and returns what the
        strategy's `load` would.
        """


def two_stage(strategy: Any, group: Any, ranks: Ranks) -> Any:
    """The strategy that reads what `parallelization_group` asks for.

    Args:
        strategy: the format's load strategy for one checkpoint.
        group: None: every rank reads what it needs, and `strategy` is returned as it is. A process group: its ranks
            read each shard once. A `Measured` group: whichever of the two is expected to be faster.
        ranks: all ranks.
    """
    if group is None:
        return strategy
    measured = group if isinstance(group, Measured) else None
    return TwoStageDataParallelLoadShardedStrategy(
        process_group(group), base_strategy=strategy, ranks=ranks, measured=measured
    )


class TwoStageDataParallelLoadShardedStrategy(LoadShardedStrategy):  # type: ignore[misc]
    """Loads one replica of each shard from storage and sends it to the other ranks of a group.

    The name is that of megatron-core's strategy of the same purpose, which read by tensorstore only.
    """

    def __init__(
        self,
        data_parallel_group: Any,
        *,
        base_strategy: Any,
        ranks: Ranks | None = None,
        measured: Measured | None = None,
        round_bytes: int = ROUND_BYTES,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        """
        Args:
            data_parallel_group: the ranks among which each shard is read once.
            base_strategy: what reads. Where it is `ReadsAlone`, reading overlaps with the exchange. Any other is
                taken for collective: all ranks of the job call its `load` equally often.
            ranks: all ranks of the job; by default those of torch.distributed's default group. Collective then.
            measured: measure, and let every rank read everything where that is expected to be faster.
            round_bytes: what a rank reads at a time, if no single shard is larger.
            message_bytes: the most bytes that are sent at a time.
        """
        super().__init__()
        self.base_strategy = base_strategy
        self.choice: Choice | None = None
        """What `measured` came to in the last load."""
        self.times: list[LoadTimes] = []
        """All ranks' times of the last load, if it was in two stages."""
        self._group = data_parallel_group
        self._ranks = ranks or Ranks.current()
        self._measured = measured
        self._round_bytes = round_bytes
        self._message_bytes = message_bytes

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Load the sharded part of a checkpoint. Collective over all ranks.

        Returns:
            What the base strategy's `load` would return.

        Raises:
            CheckpointException: torch's, with the cause on every rank that failed; the same on every rank.
            RankLostError: a rank died.
        """
        ranks, self.choice, self.times = self._ranks, None, []
        wanted = ranks.run("listing what to load", lambda: _Wanted.of(sharded_state_dict))
        wants: list[Any] = [None] * dist.get_world_size(self._group)
        ranks.run(
            "exchanging what each rank loads",
            lambda: dist.all_gather_object(wants, wanted.sizes, group=self._group),
        )
        assignment = ranks.run("dividing the reading", lambda: assign(wants))
        if not self._reads_once(wanted, assignment, checkpoint_dir):
            return self.base_strategy.load(sharded_state_dict, checkpoint_dir)
        begun = time.monotonic()
        rounds = Rounds(
            self._prepare(checkpoint_dir),
            wanted.tensors(),
            wanted.objects(),
            assignment,
            self._group,
            ranks,
            alone=isinstance(self.base_strategy, ReadsAlone),
            round_bytes=self._round_bytes,
            message_bytes=self._message_bytes,
        )
        values = rounds.run()
        loaded = dict_list_map_outplace(lambda item: wanted.place(item, values), sharded_state_dict)
        self.times = ranks.gather_all("comparing load times", rounds.times(time.monotonic() - begun))
        if ranks.is_first:
            logger.info("%s", self.summarize_load_times())
        return loaded

    def _reads_once(self, wanted: _Wanted, assignment: Assignment, directory: Any) -> bool:
        ranks, me = self._ranks, dist.get_rank(self._group)
        if self._measured is None:
            return any(ranks.gather_all("comparing what ranks share", assignment.shares))
        tensors = {unit: size for unit, size in wanted.sizes.items() if is_tensor(unit)}
        work = Work(
            replicas=dist.get_world_size(self._group),
            wanted=sum(tensors.values()),
            share=assignment.bytes_read_by(me),
            received=sum(size for unit, size in tensors.items() if assignment.reader_of[unit] != me),
        )
        works = ranks.gather_all("comparing what ranks load", work)
        self.choice = worth_measuring(works, self._measured.small_bytes)
        if self.choice is None:
            speeds = probe(self._prepare(directory), wanted.tensors(), assignment, self._group, ranks)
            works = ranks.gather_all("comparing speeds", replace(work, speeds=speeds))
            self.choice = choose(works)
        if ranks.is_first:
            how = "each shard once" if self.choice.once else "everything on every rank"
            logger.info("checkpoint.fully_parallel_load is 'auto': reading %s: %s", how, self.choice.reason)
        return self.choice.once

    def _prepare(self, directory: Any) -> Prepare:
        strategy = self.base_strategy
        if isinstance(strategy, ReadsAlone):
            return lambda part: strategy.prepare_alone(part, directory)
        return lambda part: lambda: strategy.load(part, directory)

    def summarize_load_times(self) -> str:
        """One line about the last load; empty if there was none in two stages."""
        return summary(self.times) if self.times else ""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """As the base strategy."""
        return bool(self.base_strategy.can_handle_sharded_objects)

    def load_tensors_metadata(self, checkpoint_dir: Any) -> Any:
        """As the base strategy."""
        return self.base_strategy.load_tensors_metadata(checkpoint_dir)

    def load_sharded_metadata(self, checkpoint_dir: Any) -> Any:
        """As the base strategy."""
        return self.base_strategy.load_sharded_metadata(checkpoint_dir)

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        """As the base strategy."""
        self.base_strategy.check_backend_compatibility(loaded_backend)

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """As the base strategy."""
        self.base_strategy.check_version_compatibility(loaded_version)


@dataclass(frozen=True)
class _Wanted:
    """What this rank loads, by shard; the places of a state dict that want the same shard are one entry."""

    items: dict[UnitId, Any]
    sizes: dict[UnitId, int]

    @classmethod
    def of(cls, sharded_state_dict: Any) -> _Wanted:
        items: dict[UnitId, Any] = {}
        for item in nested_values(sharded_state_dict):
            items.setdefault(_unit(item), item)
        return cls(items, {unit: _size(item) for unit, item in items.items()})

    def tensors(self) -> dict[UnitId, ShardedTensor]:
        return {unit: item for unit, item in self.items.items() if is_tensor(unit)}

    def objects(self) -> dict[UnitId, ShardedObject]:
        return {unit: item for unit, item in self.items.items() if not is_tensor(unit)}

    def place(self, item: Any, values: Mapping[UnitId, Any]) -> Any:
        """The value for one place of the state dict."""
        unit = _unit(item)
        value = values[unit]
        if not is_tensor(unit):
            return value
        if item.data is None:
            # Each place gets memory of its own, as from any other strategy.
            return value if item is self.items[unit] else value.clone()
        if item.data.data_ptr() == value.data_ptr():
            return value
        with torch.no_grad():
            return item.data.detach().copy_(value.view(item.data.shape))


def _unit(item: Any) -> UnitId:
    if isinstance(item, ShardedTensor):
        shape = (tuple(item.global_shape), tuple(item.global_offset), tuple(item.local_shape), item.prepend_axis_num)
        return (TENSOR, item.key, *shape, str(item.dtype), item.allow_shape_mismatch)
    if isinstance(item, ShardedObject):
        return (OBJECT, item.unique_key)
    raise CheckpointMismatchError(f"a {type(item).__name__} is neither a sharded tensor nor a sharded object")


def _size(item: Any) -> int:
    if isinstance(item, ShardedTensor):
        return int(math.prod(item.local_shape) * item.dtype.itemsize)
    return _OBJECT_BYTES
