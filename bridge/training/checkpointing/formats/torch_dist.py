"""`torch_dist`: torch DCP files, written and read through megatron-core's strategies.

The planning, the file contents and the metadata are megatron-core's, so stock megatron-core and torch
DCP read the result. What differs is who does the work: its own save ends in collectives that wait for
ever for a rank that failed between them, and starts a server process that outlives a killed trainer.
Here each rank writes without talking to anyone, and the caller decides when all have succeeded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing as mcore
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.background import ForkedCall
from bridge.training.checkpointing.contents import Sidecar, torch_bytes
from bridge.training.checkpointing.errors import CheckpointMismatchError, CheckpointSaveError
from bridge.training.checkpointing.formats import PayloadWrite
from bridge.training.checkpointing.layout import COMMON, MCORE_METADATA, PAYLOAD_METADATA

logger = logging.getLogger(__name__)

BACKEND = "torch_dist"
VERSION = 1
_CONTENT_METADATA = "content_metadata"
_LONGEST_REASON = 400  # characters


class PlanningStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's strategy up to the plan; the writing is left to the caller.

    `async_save` plans and stages as usual; then `writer` holds this rank's buckets and `metadata`, on
    rank 0, the global metadata.
    """

    def __init__(self, writers_per_rank: int) -> None:
        super().__init__(BACKEND, VERSION, thread_count=writers_per_rank)
        self.writer: FileSystemWriterAsync | None = None
        self.metadata: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def plan_save(
    state_dict: dict[str, Any],
    directory: Path,
    content_metadata: dict[str, Any],
    ranks: Ranks,
    *,
    strategy: Any | None = None,
    writers_per_rank: int = 1,
    parallelization_group: Any | None = None,
    preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[PayloadWrite, Any]:
    """Plan a save of `state_dict` into `directory`, stage device tensors in host memory, and write nothing yet.

    Args:
        state_dict: sharded state dict; consumed.
        directory: an existing directory that only this save uses.
        content_metadata: saved in `common.pt` under that key.
        ranks: all ranks; this is collective.
        strategy: the second value returned by an earlier call, to keep what it has cached.
        writers_per_rank: files, and processes writing them, of each rank.
        parallelization_group: replicas within this group share the writing; None: the main replica writes.
        preprocess_common: as megatron-core's `preprocess_common_before_consistancy_check`.

    Returns:
        The planned write, and the strategy.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    state_dict[_CONTENT_METADATA] = content_metadata
    sharded, common = ranks.run(
        "preparing the sharded state", lambda: save_preprocess(state_dict, validate_access_integrity=False)
    )
    if strategy is None:
        # Checked once for a structure: the answer does not change while the model stays the same.
        _validate_sharding(sharded, preprocess_common(common) if preprocess_common else common, ranks)
        strategy = PlanningStrategy(writers_per_rank)
        if parallelization_group is not None:
            strategy = FullyParallelSaveStrategyWrapper(strategy, parallelization_group)
    planned = _plan(strategy, sharded, directory, ranks)
    sidecars = (Sidecar(COMMON, torch_bytes(common)),) if ranks.is_first else ()
    return PayloadWrite(planned.write, planned.finish, sidecars), strategy


def load(
    template: dict[str, Any],
    directory: Path,
    ranks: Ranks,
    *,
    strictness: str,
    parallelization_group: Any | None = None,
) -> dict[str, Any]:
    """Load the parts of a checkpoint that `template` asks for.

    Args:
        template: sharded state dict of this rank.
        directory: the checkpoint.
        ranks: all ranks; this is collective.
        strictness: one of megatron-core's `StrictHandling` values. The two that return key sets log them here.
        parallelization_group: each rank of this group reads a share and they exchange; None: everybody reads.

    Returns:
        The state dict with loaded values.

    Raises:
        CheckpointMismatchError: keys, shapes or formats do not fit.
    """

    def read() -> dict[str, Any]:
        strategy = get_default_load_sharded_strategy(str(directory))
        if parallelization_group is not None:
            strategy = FullyParallelLoadStrategyWrapper(strategy, parallelization_group)
        try:
            loaded = mcore.load(template, str(directory), strategy, strict=strictness)
        except (CheckpointingException, CheckpointException) as error:
            raise CheckpointMismatchError(
                f"the checkpoint in {directory} does not fit this run: {_reason(error)} "
                f"(checkpoint.dist_ckpt_strictness is {strictness!r})"
            ) from error
        if isinstance(loaded, tuple):
            loaded, missing, unexpected = loaded
            logger.warning("in the checkpoint but not requested: %s", sorted(missing) or "nothing")
            logger.warning("requested but not in the checkpoint: %s", sorted(unexpected) or "nothing")
        return loaded  # type: ignore[no-any-return]

    return ranks.run("reading the checkpoint", read)


def _reason(error: BaseException) -> str:
    """The causes, with the ranks that met them: torch wraps each rank's exception and traceback in a dictionary."""
    ranks_by_cause: dict[str, list[str]] = {}
    for rank, (cause, _) in sorted(getattr(error, "failures", {}).items()):
        ranks_by_cause.setdefault(_shortened(f"{type(cause).__name__}: {cause}"), []).append(str(rank))
    if not ranks_by_cause:
        return _shortened(str(error))
    return "; ".join(f"{cause} (rank {', '.join(ranks)})" for cause, ranks in ranks_by_cause.items())


def _shortened(text: str) -> str:
    """Without the lists of all keys that torch and megatron-core append."""
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"


def _validate_sharding(sharded: Any, common: dict[str, Any], ranks: Ranks) -> None:
    def validate() -> None:
        metadata = determine_global_metadata(sharded)[1]
        try:
            validate_sharding_integrity(metadata, common_state_dict=common)
        except (CheckpointingException, AssertionError) as error:
            raise CheckpointSaveError(f"the shards of the ranks do not make up whole tensors: {error}") from error

    ranks.run("validating the sharding", validate)


@dataclass(frozen=True)
class _Planned:
    """One rank's plan: buckets of host tensors, a file each."""

    writer: FileSystemWriterAsync
    metadata: Any
    directory: Path

    def write(self) -> tuple[list[str], Any]:
        """Write and sync this rank's files; return their names and the write results by bucket."""
        buckets = self.writer.write_buckets or []
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        if len(buckets) <= 1:
            results = [_write_bucket(transforms, bucket) for bucket in buckets]
        else:
            calls = [
                ForkedCall(partial(_write_bucket, transforms, bucket), f"writer of {bucket[1]}") for bucket in buckets
            ]
            results = [call.result() for call in calls]
        return [bucket[1] for bucket in buckets], [result for results_ in results for result in results_]

    def finish(self, results: list[Any]) -> list[str]:
        """Write the global metadata from all ranks' write results; rank 0 only."""
        if self.metadata is None:
            raise CheckpointSaveError("the plan has no global metadata on this rank; only rank 0 can finish a save")
        self.writer.finish(self.metadata, results)
        save_config(CheckpointingConfig(BACKEND, VERSION), str(self.directory))
        return [PAYLOAD_METADATA, MCORE_METADATA]


def _plan(strategy: Any, sharded: Any, directory: Path, ranks: Ranks) -> _Planned:
    planner: PlanningStrategy = getattr(strategy, "base_strategy", strategy)
    # megatron-core would start a spawned server process here to carry results between processes; they
    # travel through our own pipes, so any object that is not None keeps it from doing that.
    filesystem_async._results_queue = filesystem_async._results_queue or object()

    def plan() -> _Planned:
        strategy.async_save(sharded, directory)
        if planner.writer is None:
            raise CheckpointSaveError("megatron-core's strategy returned no plan")
        planned = _Planned(planner.writer, planner.metadata, directory)
        planner.writer, planner.metadata = None, None
        buckets = planned.writer.write_buckets
        on_device = any(tensor.device.type != "cpu" for bucket in buckets or [] for _, tensor in bucket[2][1])
        if on_device:
            planned.writer.write_buckets = FileSystemWriterAsync.preload_tensors(buckets, non_blocking=True)
        return planned

    return ranks.run("planning the save", plan)


class _Results:
    """Stands for both queues that megatron-core's writer function reports to."""

    def __init__(self) -> None:
        self.value: Any = None

    def put(self, value: Any) -> None:
        self.value = value

    def get(self) -> None:
        return None

    def task_done(self) -> None:
        return None


def _write_bucket(transforms: list[Any], bucket: Any) -> Any:
    report = _Results()
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, report, report, use_fsync=True)
    _, results = report.value
    if isinstance(results, Exception):
        raise CheckpointSaveError(f"writing {bucket[0]} failed: {type(results).__name__}: {results}") from results
    return results
