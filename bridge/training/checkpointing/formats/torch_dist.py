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
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import CheckpointingException, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    parse_strict_flag,
    validate_integrity_and_strict_load,
    validate_sharding_integrity,
)
from torch.distributed.checkpoint.api import CheckpointException

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.checksums import DEFAULT
from bridge.training.checkpointing.collector import without_collector
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaveError,
)
from bridge.training.checkpointing.formats import Format, Loaded, PayloadWrite, may_drop
from bridge.training.checkpointing.formats.apart import State
from bridge.training.checkpointing.formats.direct import DirectWrite, contents_of
from bridge.training.checkpointing.formats.failures import load_error, unreadable
from bridge.training.checkpointing.formats.options import LoadOptions, SaveOptions
from bridge.training.checkpointing.formats.planning import Plan, SavePlanning, inherit, make_plan
from bridge.training.checkpointing.formats.prepared import prepare
from bridge.training.checkpointing.formats.staging import stage
from bridge.training.checkpointing.formats.strategies import load_strategy
from bridge.training.checkpointing.formats.two_stage import two_stage
from bridge.training.checkpointing.formats.writing import write_buckets
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io.access import left_to_validate
from bridge.training.checkpointing.layout import COMMON, MCORE_METADATA, PAYLOAD_METADATA
from bridge.training.checkpointing.safety.safe_globals import describe, load_torch_file

logger = logging.getLogger(__name__)

BACKEND = "torch_dist"
VERSION = 1
T = TypeVar("T")


@without_collector()
def plan_save(
    state_dict: State,
    directory: Path,
    content_metadata: dict[str, Any],
    ranks: Ranks,
    options: SaveOptions,
) -> tuple[PayloadWrite, SavePlanning]:
    """Plan a save of `state_dict` into `directory`, and write nothing yet.

    With the `direct` backend the values are copied by nobody until they are written; with `stock` those on a device
    are staged in host memory.

    Args:
        state_dict: sharded state dict; consumed.
        directory: an existing directory that only this save uses.
        content_metadata: saved in `common.pt` under that key.
        ranks: all ranks; this is collective.
        options: how. A structure that `strategy` knows is not validated again, and its plan is used again if no rank's
            structure has changed; the values are always those of `state_dict`.

    Returns:
        The planned write, and the `strategy` of the next save's options.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    planning: SavePlanning = options.strategy or SavePlanning()
    prepared = prepare(state_dict, content_metadata, ranks, planning, options)
    state, verdict, plan = prepared.state, prepared.verdict, planning.plan
    if plan is None or not verdict.planned:
        writers, group = options.writers_per_rank, options.parallelization_group
        plan = make_plan(state, ranks, planning, verdict, writers=writers, group=group)
    planning.note(prepared.structure, verdict, plan)
    if options.io_backend == "stock":
        planned = _Planned(plan, stage(plan, state, directory, ranks), directory)
        return PayloadWrite(plan.reporting(planned.write), planned.finish, prepared.sidecars), planning
    files = plan.files
    direct = DirectWrite.of(lambda: contents_of(files, state), directory, planning.frames, plan.places)
    finish = _Planned(plan, None, directory).finish
    return PayloadWrite(direct.write, finish, prepared.sidecars, direct, bequest=plan.bequest), planning


def load(template: dict[str, Any], directory: Path, ranks: Ranks, options: LoadOptions) -> Loaded:
    """Load the parts of a checkpoint that `template` asks for.

    Args:
        template: sharded state dict of this rank.
        directory: the checkpoint.
        ranks: all ranks; this is collective.
        options: how.

    Returns:
        The state dict with loaded values, and the key sets where `strictness` returns them; they are logged too.

    Raises:
        CheckpointDamagedError: a file cannot be read, on any rank.
        UnsafeCheckpointError: a file holds an object of a class that is not allowed, or leads out of the checkpoint.
        CheckpointMismatchError: keys or shapes do not fit.
    """

    # Each step is local or collective, never both: a rank that cannot read leaves no other waiting for it.
    request = ranks.run(
        "reading the common part of the checkpoint",
        lambda: _prepare(template, directory, ranks, options),
    )

    def typed(action: Callable[[], T]) -> T:
        try:
            return action()
        except (CheckpointingException, CheckpointException) as error:
            raise load_error(error, directory, options.strictness) from error

    validate_access = options.validate_access
    if validate_access and ranks.size == 1:
        doubtful = [item.without_data() for item in left_to_validate(nested_values(request.sharded))]
        ranks.run("comparing what is to be loaded", lambda: typed(lambda: validate_sharding_integrity([doubtful])))
        validate_access = False
    accessed: tuple[Any, Any] = (None, None)
    if validate_access or StrictHandling.requires_global_app_metadata(request.strict):
        with without_collector():
            accessed = ranks.run("exchanging what is to be loaded", lambda: determine_global_metadata(request.sharded))

    def fit() -> tuple[Any, set[str], set[str]]:
        return validate_integrity_and_strict_load(  # type: ignore[no-any-return]
            request.sharded, request.strict, validate_access, *accessed, request.saved
        )

    sharded, missing, unexpected = ranks.run("comparing with the checkpoint", lambda: typed(fit))
    shards = ranks.run("reading the checkpoint", lambda: typed(lambda: request.strategy.load(sharded, str(directory))))
    state_dict = ranks.run("joining what was read", lambda: _join(request, shards))
    if not StrictHandling.requires_returning_mismatch_keys(request.strict):
        return Loaded(state_dict, dropped=may_drop(options.strictness))
    if ranks.is_first:
        logger.warning("in the checkpoint but not requested: %s", _listed(missing))
        logger.warning("requested but not in the checkpoint: %s", _listed(unexpected))
    return Loaded(state_dict, bool(unexpected), frozenset(missing), frozenset(unexpected))


def read_common(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's `common.pt`: everything of the state dict that is not sharded. Local.

    Raises:
        UnsafeCheckpointError: it holds an object of a class that is not allowed.
        CheckpointDamagedError: it is absent or unreadable.
    """
    file = directory / COMMON
    try:
        common = load_torch_file(file, "common part of a checkpoint")
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{file} does not exist") from error
    if not isinstance(common, dict):
        raise CheckpointDamagedError(f"{file} holds a {type(common).__name__} where a dictionary belongs")
    return common


@dataclass(frozen=True)
class _Request:
    """What one rank is going to load, with what it needs no shards for."""

    common: dict[str, Any]
    """The common part, joined with what the template keeps from this process."""
    sharded: Any
    """The shards to read, in the template's structure."""
    factories: Any
    """What rejoins shards that belong to one tensor."""
    strategy: Any
    strict: StrictHandling
    saved: Any | None
    """The keys of the checkpoint, where the strictness compares them."""


def _prepare(template: dict[str, Any], directory: Path, ranks: Ranks, options: LoadOptions) -> _Request:
    strict = parse_strict_flag(options.strictness)
    common = read_common(directory)
    try:
        strategy = load_strategy(directory, options.io_backend, options.shards)
        compares = StrictHandling.requires_explicit_ckpt_mismatch_check(strict)
        saved = strategy.load_sharded_metadata(str(directory)) if compares else None
    except CheckpointError:
        raise
    except Exception as error:  # there is no error that unpickling a garbled file may not raise
        raise unreadable(directory, describe(error)) from error
    force_all_tensors_to_non_fp8(template)
    sharded, kept, factories = load_preprocess(template)
    merge(common, kept)
    strategy = two_stage(strategy, options.parallelization_group, ranks)
    return _Request(common, extract_sharded_base(sharded)[0], factories, strategy, strict, saved)


def _join(request: _Request, shards: Any) -> dict[str, Any]:
    merge(request.common, shards)
    apply_factory_merges(request.common, request.factories)
    return request.common


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) if keys else "nothing"


@dataclass(frozen=True)
class _Planned:
    """One rank's plan, and buckets of host tensors, a file each, where megatron-core's writer has them."""

    plan: Plan
    writer: FileSystemWriterAsync | None
    directory: Path

    def write(self, checksum: str = DEFAULT) -> tuple[list[FileRecord | str], Any]:
        """Write and sync this rank's files; return their records and the write results."""
        if self.writer is None:
            raise CheckpointSaveError("the values were not handed over to megatron-core's writer")
        buckets = self.writer.write_buckets or []
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        written = write_buckets(transforms, buckets, checksum)
        return [record for record, _ in written], [result for _, results in written for result in results]

    def finish(self, results: list[Any]) -> list[str]:
        """Write the global metadata from the places that all ranks report; rank 0 only."""
        return [*self.plan.finish(self.directory, results), _write_config(self.directory)]


def _inherit(directory: Path, bequests: list[bytes]) -> list[str]:
    return [*inherit(directory, bequests), _write_config(directory)]


def _write_config(directory: Path) -> str:
    save_config(CheckpointingConfig(BACKEND, VERSION), str(directory))
    return MCORE_METADATA


FORMAT = Format(
    BACKEND,
    plan_save,
    load,
    read_common,
    files=(MCORE_METADATA, PAYLOAD_METADATA, COMMON),
    is_shard=lambda name: name.endswith(".distcp"),
    inherit=_inherit,
    reads_elsewhere=True,
)
