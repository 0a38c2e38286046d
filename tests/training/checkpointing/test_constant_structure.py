"""Saves that reuse a plan: they write what a save that plans anew writes, and a changed structure is noticed."""

from __future__ import annotations

import dataclasses
import gc
import logging
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.utils import unwrap_model

from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.checkpointing import CheckpointError, save_checkpoint
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.formats.planning import SavePlanning
from bridge.training.checkpointing.formats.structure import Structure, Vote, decide
from bridge.training.checkpointing.formats.torch_dist import plan_save
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.test_interop import assert_parameters_equal
from tests.training.tiny import tiny_config

# Structures and votes: pure decisions.


def tensor(key: str = "w", **changes: Any) -> ShardedTensor:
    made = ShardedTensor.from_rank_offsets(key, torch.zeros(4, 6), (0, 0, 2), replica_id=(0, 0, 0))
    return dataclasses.replace(made, **changes)


def thing(key: str = "rng", **changes: Any) -> ShardedObject:
    return dataclasses.replace(ShardedObject(key, [1], (2,), (0,), replica_id=0), **changes)


BASE = [tensor(), thing()]
CHANGED: dict[str, tuple[Structure, str]] = {
    "a key more": (Structure.of([*BASE, tensor("v")]), "added v"),
    "a key less": (Structure.of([thing()]), "removed w"),
    "another key": (Structure.of([tensor("v"), thing()]), "added v, removed w"),
    "a shard more of a key": (Structure.of([*BASE, tensor(global_offset=(4, 0))]), "changed w"),
    "another order": (Structure.of([thing(), tensor()]), "another order of keys"),
    "type": (Structure.of([tensor(data=torch.zeros(4, 6).half(), dtype=torch.half), thing()]), "changed w"),
    "local shape": (
        Structure.of([tensor(data=torch.zeros(2, 6), local_shape=(2, 6), axis_fragmentations=None), thing()]),
        "changed w",
    ),
    "global shape": (Structure.of([tensor(global_shape=(16, 6), axis_fragmentations=(4, 1)), thing()]), "changed w"),
    "offset": (Structure.of([tensor(global_offset=(4, 0)), thing()]), "changed w"),
    "grid": (Structure.of([tensor(axis_fragmentations=None), thing()]), "changed w"),
    "replica": (Structure.of([tensor(replica_id=(0, 0, 1)), thing()]), "changed w"),
    "an object's offset": (Structure.of([tensor(), thing(global_offset=(1,))]), "changed rng"),
    "an object's replica": (Structure.of([tensor(), thing(replica_id=1)]), "changed rng"),
    "an object in a tensor's place": (Structure.of([tensor(), tensor("rng")]), "changed rng"),
    "writers": (Structure.of(BASE, writers_per_rank=2), "2 writers instead of 1"),
    "sharing": (Structure.of(BASE, sharing=[0, 1]), "other ranks to share the writing with"),
    "many keys": (Structure.of([*BASE, *(tensor(f"v{n}") for n in range(5))]), "added v0, v1, v2 and 2 more"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_everything_that_a_plan_depends_on_is_in_the_fingerprint(case: str) -> None:
    changed, words = CHANGED[case]
    base = Structure.of(BASE)
    assert changed.fingerprint != base.fingerprint
    assert changed.change_from(base) == words


def test_values_are_not_in_the_fingerprint() -> None:
    other = Structure.of([tensor(data=torch.ones(4, 6)), thing(data="a much longer value than before")])
    assert other == Structure.of(BASE)
    assert other.fingerprint == Structure.of(BASE).fingerprint
    assert other.change_from(Structure.of(BASE)) == ""


def test_a_plan_is_reused_only_if_every_rank_keeps_one_for_this_very_structure() -> None:
    job = decide([Vote("a"), Vote("b")]).job
    same = [Vote("a", job, job), Vote("b", job, job)]
    assert (decide(same).valid, decide(same).planned) == (True, True)
    table = {
        "first save": ([Vote("a"), Vote("b")], (False, False)),
        "no plan kept": ([Vote("a", job), Vote("b", job)], (True, False)),
        "one rank keeps none": ([Vote("a", job, job), Vote("b", job)], (True, False)),
        "one rank changed": ([Vote("a", job, job), Vote("c", job, job)], (False, False)),
        "ranks changed places": ([Vote("b", job, job), Vote("a", job, job)], (False, False)),
        "a rank's plan is of another structure": ([Vote("a", job, job), Vote("b", job, "other")], (True, False)),
        "a rank has validated another structure": ([Vote("a", job, job), Vote("b", "other", job)], (False, True)),
    }
    for case, (votes, expected) in table.items():
        verdict = decide(votes)
        assert (verdict.valid, verdict.planned) == expected, case


def test_changes_are_told_by_rank() -> None:
    verdict = decide([Vote("a"), Vote("b", change="added x"), Vote("c", change="removed y")])
    assert verdict.changes == ("rank 1: added x", "rank 2: removed y")


# The format: what is in the files.


def state_at(step: int, changed: str = "") -> dict[str, Any]:
    """This rank's state: every kind of shard that megatron-core knows, with values of this step."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(10 * step + rank)
    shared = torch.Generator().manual_seed(1000 + step)
    own = torch.randn(4, 6, generator=generator)
    if changed == "type":
        own = own.bfloat16()
    state: dict[str, Any] = {
        "sharded": ShardedTensor.from_rank_offsets("sharded", own, (0, rank, 2)),
        "transposed": ShardedTensor.from_rank_offsets(
            "transposed", torch.randn(6, 4, generator=generator).t()[:2], (0, rank, 2)
        ),
        "stacked": ShardedTensor.from_rank_offsets(
            "stacked", torch.randn(3, generator=generator), (0, rank, 2), prepend_axis_num=1
        ),
        "uneven": [
            ShardedTensor("uneven", part, part.dtype, part.shape, (10,), (offset,), None)
            for part, offset in _uneven_parts(rank, generator)
        ],
        "random": ShardedObject("random", {"draws": list(range(7 * step + rank))}, (2,), (rank,)),
        "counter": ShardedObject("counter", "x" * step, (1,), (0,), replica_id=rank),
        "iteration": step,
    }
    for index in range(5):
        value = torch.randn(5 + index, generator=shared)
        state[f"copied{index}"] = ShardedTensor.from_rank_offsets(f"copied{index}", value, replica_id=rank)
    if changed == "key" and rank == 1:
        state["late"] = ShardedTensor.from_rank_offsets("late", torch.full((3,), float(step)))
    if changed == "copy" and rank == 1:
        copied = state["copied0"]
        state["copied0"] = ShardedTensor.from_rank_offsets("copied0", copied.data.double(), replica_id=1)
    return state


def _uneven_parts(rank: int, generator: torch.Generator) -> list[tuple[torch.Tensor, int]]:
    lengths = [(0, 1), (1, 3)] if rank == 0 else [(4, 4), (8, 2)]
    return [(torch.randn(length, generator=generator), offset) for offset, length in lengths]


def save(
    state: dict[str, Any], directory: Path, planning: SavePlanning | None, *, group: Any, writers: int = 1
) -> SavePlanning:
    """Plan and write one checkpoint, as save_checkpoint does, without its sidecars and its commit."""
    ranks = Ranks.current()
    ranks.first("making the directory", lambda: directory.mkdir(parents=True))
    options = SaveOptions(planning, writers, group, assume_constant_structure=True)
    payload, planning = plan_save(state, directory, {}, ranks, options)
    _, results = ranks.run("writing", payload.write)
    all_results = ranks.gather_first("collecting", results)
    ranks.first("finishing", lambda: payload.finish(all_results or []))
    for sidecar in payload.sidecars:
        write_file(directory / sidecar.name, sidecar.data)
    dist.barrier()
    return planning


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two checkpoints, beside the name of the save that every `.metadata` has."""
    names = {entry.name for entry in one.iterdir()}
    found = [] if names == {entry.name for entry in other.iterdir()} else ["names"]
    for name in sorted(names - {".metadata", ".metadata.bridge"}):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    metadata = [pickle.loads((path / ".metadata").read_bytes()) for path in (one, other)]
    for field in ("state_dict_metadata", "planner_data", "storage_data", "all_local_plans"):
        if getattr(metadata[0], field) != getattr(metadata[1], field):
            found.append(field)
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}").items()}
    if isinstance(value, list):
        return {k: v for key, item in enumerate(value) for k, v in flat(item, f"{prefix}.{key}").items()}
    return {prefix: value}


def differs_from_live(directory: Path, step: int, changed: str) -> list[str]:
    """Load with megatron-core's own `load` and compare with what was saved."""
    template = state_at(step, changed)
    expected = {name: item.data if hasattr(item, "data") else item for name, item in flat(template).items()}
    expected = {k: v for name, item in expected.items() for k, v in flat(item, name).items()}
    for item in flat(template).values():
        if isinstance(item, ShardedTensor):
            item.data = torch.full_like(item.data, 7777)
        elif isinstance(item, ShardedObject):
            item.data = None
    loaded = flat(dist_checkpointing.load(template, str(directory), validate_access_integrity=False))
    return [name for name, value in expected.items() if not _equal(loaded.get(name), value)]


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return bool(found == expected)


class Peer(TorchDistSaveShardedStrategy):
    """megatron-core's own planning."""

    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.metadata = save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def differs_from_megatron(directory: Path, group: Any) -> list[str]:
    """What our metadata, which holds all ranks' plans, has other than megatron-core's for the same state."""
    metadata = planned_by_megatron(state_at(0), directory, group)
    if metadata is None:
        return []
    ours = pickle.loads((directory / ".metadata").read_bytes())
    fields = ("state_dict_metadata", "planner_data", "all_local_plans")
    return [field for field in fields if getattr(ours, field) != getattr(metadata, field)]


def planned_by_megatron(state: dict[str, Any], directory: Path, group: Any, writers: int = 1) -> Any:
    """The metadata that megatron-core makes for a state, on rank 0; None elsewhere."""
    filesystem_async._results_queue = object()  # or it starts a server process, which a plan has no use for
    peer = Peer("torch_dist", 1, thread_count=writers)
    strategy = peer if group is None else FullyParallelSaveStrategyWrapper(peer, group)
    strategy.async_save(save_preprocess(state)[0], directory)
    dist.barrier()
    return peer.metadata


class Logged(logging.Handler):
    """Notes the messages of the planner."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logger = logging.getLogger("bridge.training.checkpointing.formats.prepared")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.getMessage()}")


STEPS = ["", "", "", "key", "key", "type", "type", "", ""]
"""How the structure of each save differs from that of the first."""


def save_again_and_again(root: Path, sharing: bool, writers: int) -> dict[str, Any]:
    """Save with and without reuse of plans while values change all the time and the structure sometimes."""
    init_ranks()
    logged = Logged()
    group = dist.group.WORLD if sharing else None
    reusing: SavePlanning | None = None
    seen: dict[str, Any] = {"differences": [], "wrong": [], "reused": []}
    for step, changed in enumerate(STEPS):
        one, other = root / f"anew{step}", root / f"reused{step}"
        save(state_at(step, changed), one, None, group=group, writers=writers)
        logged.messages.clear()
        before = reusing.plan if reusing is not None else None
        reusing = save(state_at(step, changed), other, reusing, group=group, writers=writers)
        seen["reused"].append(before is not None and reusing.plan is before)
        seen["differences"] += differences(one, other)
        seen["wrong"] += differs_from_live(other, step, changed)
        seen.setdefault("logged", {})[step] = list(logged.messages)
    seen["unlike megatron-core"] = differs_from_megatron(root / "anew0", group)
    return seen


@pytest.mark.parametrize(("sharing", "writers"), [(False, 1), (True, 2)])
def test_a_reused_plan_writes_what_a_new_plan_writes(tmp_path: Path, sharing: bool, writers: int) -> None:
    first, second = run_ranks(save_again_and_again, 2, tmp_path, sharing, writers)
    for seen in (first, second):
        assert seen["differences"] == []
        assert seen["wrong"] == []
        assert seen["unlike megatron-core"] == []
        assert seen["reused"] == [False, True, True, False, True, False, True, False, True]
    said = "WARNING the structure of what is saved has changed since the save before; planning anew"
    assert first["logged"] == {
        **{step: [] for step in (0, 1, 2, 4, 6, 8)},
        3: [f"{said} (rank 1: added late)"],
        5: [f"{said} (rank 0: changed sharded; rank 1: removed late, changed sharded)"],
        7: [f"{said} (rank 0: changed sharded; rank 1: changed sharded)"],
    }
    assert all(messages == [] for messages in second["logged"].values())


def reachable(root: object) -> list[object]:
    """Every object that `root` keeps alive, apart from code."""
    found: dict[int, object] = {}
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in found or isinstance(item, type | types.ModuleType | types.FunctionType):
            continue
        found[id(item)] = item
        waiting += gc.get_referents(item)
    return list(found.values())


def settings_change(root: Path) -> dict[str, Any]:
    """One planning through changes of settings, and what it keeps."""
    init_ranks()
    world = dist.group.WORLD
    seen: dict[str, Any] = {"differences": [], "reused": []}
    planning: SavePlanning | None = None
    settings = [
        {"group": world},
        {"group": None},
        {"group": None, "writers": 2},
        {"group": world},
        {"group": world},
    ]
    for step, setting in enumerate(settings):
        one, other = root / f"anew{step}", root / f"reused{step}"
        save(state_at(step), one, None, **setting)  # type: ignore[arg-type]
        before = planning.plan if planning is not None else None
        planning = save(state_at(step), other, planning, **setting)  # type: ignore[arg-type]
        seen["reused"].append(before is not None and planning.plan is before)
        seen["differences"] += differences(one, other)
    kept = reachable(planning)
    seen["tensors"] = sum(isinstance(item, torch.Tensor) for item in kept)
    seen["places"] = [str(item) for item in kept if isinstance(item, str | Path) and str(root) in str(item)]
    seen["plan"] = planning is not None and planning.plan is not None
    return seen


def test_settings_belong_to_the_structure_and_nothing_of_a_save_is_kept(tmp_path: Path) -> None:
    for seen in run_ranks(settings_change, 2, tmp_path):
        assert seen == {
            "differences": [],
            "reused": [False, False, False, False, True],
            "tensors": 0,
            "places": [],
            "plan": True,
        }


def outcome_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def break_the_structure(root: Path, sharing: bool) -> list[str]:
    """After a good save: a change that makes no whole tensors, a value that no rank can write; then a good save."""
    init_ranks()
    group = dist.group.WORLD if sharing else None
    kept = save(state_at(0), root / "0", None, group=group)

    def attempt(step: int, changed: str = "", broken: Any = None) -> str:
        state = state_at(step, changed)
        if broken is not None and dist.get_rank() == 1:
            state["random"].data = broken
        return outcome_of(lambda: save(state, root / str(step), kept, group=group))

    seen = [attempt(1, "copy"), attempt(2, broken=lambda: 0), attempt(3)]
    return [*seen, *differs_from_live(root / "3", 3, "")]


@pytest.mark.parametrize("sharing", [False, True])
def test_a_structure_that_goes_wrong_later_is_refused_on_all_ranks(tmp_path: Path, sharing: bool) -> None:
    first, second = run_ranks(break_the_structure, 2, tmp_path, sharing, timeout=60)
    assert first == second
    dtypes, unpicklable, last = first
    assert dtypes == (
        "CheckpointSaveError: the shards of the ranks do not make up whole tensors: 'copied0': its type is "
        "torch.float32 on rank 0 and torch.float64 on rank 1"
    )
    assert unpicklable.startswith("CheckpointError: ")
    assert " what this rank writes failed on rank 1: AttributeError: Can't pickle" in unpicklable
    assert last == "saved"


# Training: what save_checkpoint publishes.

MODES = {
    f"{'async' if in_background else 'sync'}, {'shared' if sharing else 'alone'}": (in_background, sharing)
    for in_background in (False, True)
    for sharing in (False, True)
}


def train_and_save(root: Path) -> dict[str, Any]:
    """After each of three steps, save in every mode, with and without reuse."""
    callbacks = CallbackManager()
    run = setup(tiny_config(train_iters=3), callbacks)
    contexts: dict[str, dict[str, Any]] = {}
    seen: dict[str, Any] = {"plans": {}}

    def save_all(_: CallbackContext) -> None:
        settings = run.cfg.checkpoint
        for mode, (settings.async_save, settings.fully_parallel_save) in MODES.items():
            for settings.ckpt_assume_constant_structure in (False, True):
                name = f"{mode}, {'reused' if settings.ckpt_assume_constant_structure else 'anew'}"
                settings.save = str(root / name)
                context = contexts.setdefault(name, {})
                if not settings.ckpt_assume_constant_structure:
                    context.pop("save_strategy", None)
                save_checkpoint(
                    run.state,
                    run.model,
                    run.optimizer,
                    run.scheduler,
                    0,
                    context,
                    train_data_iterator=run.train_data_iterator,
                    pg_collection=run.pg_collection,
                )
                seen["plans"].setdefault(name, []).append(context["save_strategy"].plan)
        settings.save = None

    callbacks.register("on_train_step_end", save_all)
    train(run)
    run.manager.finalize_async_saves(run.state, blocking=True)
    seen["plans"] = {name: [plan is plans[0] for plan in plans[1:]] for name, plans in seen["plans"].items()}
    (model,) = unwrap_model(run.model)
    live = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for mode in MODES:
        stored = dist_checkpointing.load_plain_tensors(str(root / f"{mode}, reused" / "iter_0000003"))
        assert_parameters_equal(stored, live)
    return seen


def test_training_saves_the_same_with_and_without_reuse(tmp_path: Path) -> None:
    for seen in run_ranks(train_and_save, 2, tmp_path, timeout=240):
        for name, facts in seen["plans"].items():
            assert facts == [name.endswith("reused")] * 2, name
    for mode in MODES:
        for iteration in (1, 2, 3):
            one, other = (tmp_path / f"{mode}, {how}" / f"iter_000000{iteration}" for how in ("anew", "reused"))
            payload = [entry.name for entry in one.glob("*.distcp")]
            assert len(payload) == 2
            for name in [*payload, "common.pt"]:
                assert (one / name).read_bytes() == (other / name).read_bytes(), (mode, iteration, name)
            metadata = [pickle.loads((path / ".metadata").read_bytes()) for path in (one, other)]
            for field in ("state_dict_metadata", "storage_data", "all_local_plans"):
                assert getattr(metadata[0], field) == getattr(metadata[1], field), (mode, iteration, field)
