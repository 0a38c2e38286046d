"""Loading from rank-bound snapshots: all of them are read and checked, on all ranks, before anything is applied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import (
    _sharded_object_id,
    _sharded_tensor_shard_id,
    extract_sharded_base,
    force_all_tensors_to_non_fp8,
)
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    parse_strict_flag,
    validate_integrity_and_strict_load,
)

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.dataloader import DataloaderState
from bridge.training.checkpointing.contents.rerun import RERUN
from bridge.training.checkpointing.contents.run_config import parse_run_config, value_at
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
)
from bridge.training.checkpointing.formats import Loaded, may_drop
from bridge.training.checkpointing.formats.failures import load_error
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.formats.read_choice import process_group
from bridge.training.checkpointing.layout import RUN_CONFIG
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.adapters import saved_adapters
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.plans.resharding import saved_form
from bridge.training.checkpointing.resolve import NAMES, Source
from bridge.training.checkpointing.tiers.availability import RankLocalStore, clique_of, form_cliques, givers
from bridge.training.checkpointing.tiers.record import CONTENT_METADATA, KEY, SnapshotRecord, dataloader_state
from bridge.training.checkpointing.tiers.sharing import fetch

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RankLocalCheckpoint:
    """The snapshots of one save, read: this rank's own, and what every rank needs of the others'."""

    source: Source
    state: Any
    """This rank's tensor-aware state dict, on the CPU."""
    record: SnapshotRecord
    dataloader_files: Mapping[str, bytes]
    """Of all ranks."""
    group: Any | None
    """The ranks that share replicas: the data- and context-parallel group; None for all ranks."""
    store: RankLocalStore | None = None
    """Of this rank; None where nothing is to be looked for in it."""
    is_own: bool = True
    """Whether this rank's snapshot was in its own store, and is no copy that another rank had."""

    def common(self) -> dict[str, Any]:
        """What is not sharded of this rank's state dict. Local."""
        return dict_list_map_outplace(  # type: ignore[no-any-return]
            lambda value: value, {k: v for k, v in self.state.common.items() if k != KEY}
        )

    def describe(self, ranks: Ranks) -> Saved:
        """What rank 0's snapshot says of the save. Collective."""
        return ranks.first("examining the snapshots", self._describe)

    def close(self) -> None:
        """The snapshots are this process's own."""

    def _describe(self) -> Saved:
        common, sidecars = self.state.common, self.record.sidecars
        content = common.get(CONTENT_METADATA)
        config = None
        if RUN_CONFIG in sidecars:
            config = parse_run_config(sidecars[RUN_CONFIG], f"{RUN_CONFIG} in {self.source.path}")
        return Saved(
            iteration=self.record.iteration,
            release=False,
            layout=Layout.from_sizes(self.record.parallel_sizes),
            layout_is_known=True,
            content_metadata=content,
            has_optimizer=bool(value_at(config, "checkpoint", "save_optim", "optimizer" in common)),
            has_rng=bool(value_at(config, "checkpoint", "save_rng", False)),
            has_train_state=True,
            has_rerun_state=bool(common.get(RERUN)),
            data_iterator_ranks=len(self.dataloader_files),
            data_parallel_random_init=bool(value_at(config, "rng", "data_parallel_random_init", False)),
            optimizer_form=saved_form(common.get("optimizer")),
            precision=value_at(config, "model", "precision", None),
            adapters=saved_adapters(content, None),
            start=self.record.start,
        )

    def load(self, template: dict[str, Any], ranks: Ranks, options: LoadOptions) -> Loaded:
        """Give the parts that `template` asks for; its tensors receive the values. Collective.

        Args:
            template: sharded state dict of this rank.
            ranks: all ranks.
            options: how. Its group is used where `group` is None: who holds what was decided by the save.

        Raises:
            CheckpointMismatchError: keys or shapes do not fit.
        """
        request = ranks.run("preparing the load", lambda: _prepare(template, self.common(), options.strictness))
        accessed: tuple[Any, Any] = (None, None)
        if options.validate_access or StrictHandling.requires_global_app_metadata(request.strict):
            accessed = ranks.run("exchanging what is to be loaded", lambda: determine_global_metadata(request.sharded))
        saved = None
        if StrictHandling.requires_explicit_ckpt_mismatch_check(request.strict):
            keys = ranks.gather_all("comparing the keys", {v.key for v in nested_values(self.state.sharded_state_dict)})
            saved = {key: _Key(key) for key in set().union(*keys)}

        def fit() -> tuple[Any, set[str], set[str]]:
            return validate_integrity_and_strict_load(  # type: ignore[no-any-return]
                request.sharded, request.strict, options.validate_access, *accessed, saved
            )

        sharded, missing, unexpected = ranks.run(
            "comparing with the snapshots", lambda: self._typed(fit, options.strictness)
        )
        group = self.group if self.group is not None else process_group(options.parallelization_group)
        wanted = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
        store, iteration, save_id = self.store, self.record.iteration, self.record.save_id
        tensors = fetch(
            wanted,
            self.state.sharded_state_dict,
            group,
            ranks,
            beside=lambda rank: None if store is None else store.beside(iteration, rank, save_id),
            is_in_place=self.is_own,
        )
        place = f"the {NAMES[self.source.kind]}"
        state_dict = ranks.run("joining what was read", lambda: _join(request, sharded, tensors, self.state, place))
        if not StrictHandling.requires_returning_mismatch_keys(request.strict):
            return Loaded(state_dict, dropped=may_drop(options.strictness))
        if ranks.is_first:
            logger.warning("in the snapshots but not requested: %s", ", ".join(sorted(missing)) or "nothing")
            logger.warning("requested but not in the snapshots: %s", ", ".join(sorted(unexpected)) or "nothing")
        return Loaded(state_dict, bool(unexpected), frozenset(missing), frozenset(unexpected))

    def train_state(self) -> Mapping[str, Any]:
        """The counters, from this rank's record."""
        return self.record.train_state_metadata

    def data_iterator_state(self, data_parallel_rank: int, data_parallel_size: int) -> DataloaderState:
        """From what all ranks' snapshots hold."""
        return dataloader_state(self.dataloader_files, data_parallel_rank, data_parallel_size, str(self.source.path))

    def _typed(self, action: Callable[[], T], strictness: str) -> T:
        try:
            return action()
        except CheckpointingException as error:
            raise load_error(error, self.source.path, strictness) from error


def open_rank_local(
    source: Source,
    iteration: int,
    store: RankLocalStore,
    ranks: Ranks,
    *,
    layout: Layout | None = None,
    group: Any | None = None,
) -> RankLocalCheckpoint:
    """Read and check the snapshots of one iteration on all ranks. Collective.

    A rank whose snapshot is lost or damaged gets a copy from a rank that has one.

    Args:
        source: what was chosen; its path is for messages.
        iteration: a complete one.
        store: of this rank.
        ranks: all ranks.
        layout: of this run; None leaves the check to the load.
        group: the ranks that share replicas: the data- and context-parallel group; None for all ranks.

    Raises:
        CheckpointDamagedError: a rank's snapshot cannot be read and there is no copy, or the snapshots belong to
            different saves. Every rank raises.
        UnsafeCheckpointError: a snapshot holds an object that loading does not allow. Every rank raises.
        CheckpointMismatchError: the snapshots are bound to another number of ranks or other parallel sizes.
    """
    state, is_own = _read(iteration, store, ranks)
    # The same words on every rank, so that what is wrong with all of them is told once.
    place = f"the {NAMES[source.kind]} of iteration {iteration}"

    def examine() -> tuple[str, dict[str, bytes]]:
        record = SnapshotRecord.of(state.common, place)
        record.require_for(iteration, ranks.rank, ranks.size, layout, place)
        return record.save_id, record.dataloader_files()

    told = ranks.collect("examining the snapshots", examine)
    if len({save_id for save_id, _ in told}) > 1:
        by_save: dict[str, list[int]] = {}
        for rank, (save_id, _) in enumerate(told):
            by_save.setdefault(save_id, []).append(rank)
        groups = "; ".join(f"ranks {', '.join(map(str, members))}" for members in by_save.values())
        raise CheckpointDamagedError(f"{place} is of {len(by_save)} different saves ({groups})")
    files = {name: data for _, own in told for name, data in own.items()}
    return RankLocalCheckpoint(source, state, SnapshotRecord.of(state.common, place), files, group, store, is_own)


def _read(iteration: int, store: RankLocalStore, ranks: Ranks) -> tuple[Any, bool]:
    """This rank's snapshot, and whether it is from its own store or a copy from another rank's. Collective."""
    if store.repl_strategy is None:
        return ranks.run("reading the snapshots", lambda: store._load(store._ckpt_id(iteration))), True
    cliques = form_cliques(store, ranks)
    held = ranks.run("looking for snapshots", lambda: {i[1]: i for i in store._my_ckpt_ids() if i[0] == iteration})
    loaded: dict[int, Any] = {}
    problem = ""
    while True:
        told = ranks.gather_all("comparing the snapshots", (set(held), problem))
        owners = [found for found, _ in told]
        giver = givers(owners, cliques, {rank: text for rank, (_, text) in enumerate(told) if text})
        needed = [owner for owner, rank in giver.items() if rank == store.rank]
        for owner in (owner for owner in needed if owner not in loaded):
            try:
                loaded[owner] = store._load(held[owner])
            except Exception as error:
                problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                logger.warning("looking for another copy: %s", problem)
                del held[owner]
                break
        # One more round for every snapshot that turned out to be damaged, until those that remain are sound.
        if ranks.all_true("reading the snapshots", all(owner in loaded for owner in needed)):
            break
    return _deliver(giver, loaded, iteration, store, ranks), giver[store.rank] == store.rank


def _deliver(
    giver: Mapping[int, int], loaded: dict[int, Any], iteration: int, store: RankLocalStore, ranks: Ranks
) -> Any:
    """Pass on the copies that were read for other ranks; return this rank's snapshot."""
    from nvidia_resiliency_ext.checkpointing.local.replication.group_utils import ExchangePlan

    if all(owner == rank for owner, rank in giver.items()):
        return loaded[store.rank]
    if ranks.is_first:
        lost = sorted(owner for owner, rank in giver.items() if owner != rank)
        logger.warning("restoring the snapshots of rank %s from copies", ", ".join(map(str, lost)))
    clique = clique_of(store)
    plan = ExchangePlan(group=clique)
    for owner in clique.ranks:
        plan.plan(sender=giver[owner], receiver=owner, id_=owner)
    received = ranks.run("fetching copies of snapshots", lambda: clique.execute_plan(plan, loaded))
    return received[store.rank]


@dataclass(frozen=True)
class _Key:
    """What the comparison of keys needs to know of a saved shard."""

    key: str


@dataclass(frozen=True)
class _Request:
    """What this rank asks for."""

    common: dict[str, Any]
    """The common part, joined with what the template keeps from this process."""
    sharded: Any
    factories: Any
    strict: StrictHandling


def _prepare(template: dict[str, Any], common: dict[str, Any], strictness: str) -> _Request:
    force_all_tensors_to_non_fp8(template)
    sharded, kept, factories = load_preprocess(template)
    merge(common, kept)
    return _Request(common, extract_sharded_base(sharded)[0], factories, parse_strict_flag(strictness))


def _join(
    request: _Request, sharded: Any, tensors: Mapping[Any, torch.Tensor], state: Any, place: str
) -> dict[str, Any]:
    objects = {
        _sharded_object_id(value): value
        for value in nested_values(state.sharded_state_dict)
        if isinstance(value, ShardedObject)
    }

    def loaded(value: Any) -> Any:
        if isinstance(value, ShardedTensor):
            return _received(value, tensors[_sharded_tensor_shard_id(value)])
        identity = _sharded_object_id(value)
        if identity not in objects:
            raise CheckpointMismatchError(f"{place} has no {value.key}, which this run asks for")
        return objects[identity].data

    shapes = [
        f"{v.key} has the shape {tuple(tensors[_sharded_tensor_shard_id(v)].shape)} and should have {v.local_shape}"
        for v in nested_values(sharded)
        if isinstance(v, ShardedTensor) and tuple(tensors[_sharded_tensor_shard_id(v)].shape) != tuple(v.local_shape)
    ]
    if shapes:
        raise CheckpointMismatchError(f"{place} does not fit this run: {'; '.join(shapes[:3])}")
    with torch.no_grad():
        merge(request.common, dict_list_map_outplace(loaded, sharded))
    apply_factory_merges(request.common, request.factories)
    return request.common


def _received(value: ShardedTensor, tensor: torch.Tensor) -> torch.Tensor:
    """The value in the template's own tensor, as a load from a directory leaves it, or in one of its own."""
    if value.data is None:
        return tensor.clone()
    value.data.detach().copy_(tensor)
    return value.data  # type: ignore[no-any-return]
