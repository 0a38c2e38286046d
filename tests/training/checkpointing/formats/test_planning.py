"""Plans of our own: equal to megatron-core's on what it trains, read by it, and taken up again after a load."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint import FileSystemReader

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.collecting import LiveObjects, collect
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.formats.options import LoadOptions, SaveOptions
from bridge.training.checkpointing.formats.planning import Places, SavePlanning, make_plan
from bridge.training.checkpointing.formats.prepared import prepare, share_out
from bridge.training.checkpointing.formats.structure import Structure, Vote, decide
from bridge.training.checkpointing.formats.torch_dist import load, plan_save
from bridge.training.checkpointing.formats.zarr import plan_save as plan_zarr
from bridge.training.checkpointing.io.compact import read_compact
from bridge.training.checkpointing.io.stored import StoredByTable
from bridge.training.checkpointing.io.table import StoredTable
from bridge.training.checkpointing.safety.payload_metadata import payload_metadata, read_payload_bytes
from bridge.training.setup import setup
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.test_constant_structure import differences, planned_by_megatron
from tests.training.tiny import LAYOUTS, tiny_config

RESHARDABLE = {"dist_ckpt_optim_fully_reshardable": True}
RUNS: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    "one rank, two files": ("one rank", {}, False, 2),
    "data parallel, shared": ("DP2", RESHARDABLE, True, 1),
    "data parallel, flat buffers": ("DP2", {}, True, 2),
    "experts": ("EP2", RESHARDABLE, True, 1),
    "tensor and pipeline parallel": ("TP2 x PP2", RESHARDABLE, True, 1),
}
"""The layout, checkpoint settings, whether replicas share the writing, and files of each rank."""

FIELDS = ("state_dict_metadata", "planner_data", "all_local_plans")


def save(
    state: dict[str, Any],
    directory: Path,
    planning: SavePlanning | None,
    group: Any,
    writers: int = 1,
    zarr: bool = False,
    **more: Any,
) -> SavePlanning:
    ranks = Ranks.current()
    ranks.first("making the directory", lambda: directory.mkdir(parents=True))
    options = SaveOptions(planning, writers, group, assume_constant_structure=True, **more)
    payload, planning = (plan_zarr if zarr else plan_save)(state, directory, {}, ranks, options)
    _, result = ranks.run("writing", lambda: payload.write("xxh3"))
    results = ranks.gather_first("collecting", result)
    ranks.first("finishing", lambda: payload.finish(results or []))
    for sidecar in payload.sidecars:
        write_file(directory / sidecar.name, sidecar.data)
    ranks.all_true("waiting", True)
    return planning


def plan_like_megatron(root: Path, name: str) -> dict[str, Any]:
    """Save the state of a run by both backends; what differs from megatron-core's plan, and between the two."""
    layout, checkpoint, sharing, writers = RUNS[name]
    run = setup(tiny_config(train_iters=2, model=LAYOUTS[layout][1], checkpoint=checkpoint))
    ranks = Ranks.current()
    live = LiveObjects(
        run.state, run.model, run.optimizer, run.scheduler, 0, run.train_data_iterator, run.pg_collection, None
    )
    group = run.pg_collection.dp_cp if sharing else None

    def state() -> dict[str, Any]:
        return collect(live, None, ranks).state_dict

    for backend in ("direct", "stock"):
        save(state(), root / backend, None, group, writers, io_backend=backend)
    theirs = planned_by_megatron(state(), root, group, writers)
    read_by_stock = dist_checkpointing.load_plain_tensors(str(root / "direct"))
    seen: dict[str, Any] = {"stock reads": sum(torch.is_tensor(value) for value in read_by_stock.values())}
    if ranks.is_first:
        ours = {name: pickle.loads((root / name / ".metadata").read_bytes()) for name in ("direct", "stock")}
        seen["unlike"] = [
            (name, field) for name in ours for field in FIELDS if getattr(ours[name], field) != getattr(theirs, field)
        ]
        seen["items"] = sum(len(plan.items) for plan in theirs.all_local_plans)
        seen["places"] = len(ours["direct"].storage_data)
        seen["tensors"] = sum(hasattr(entry, "chunks") for entry in theirs.state_dict_metadata.values())
        read = FileSystemReader(root / "direct").read_metadata()
        compact = StoredByTable(read_compact(root / "direct")).metadata()  # type: ignore[arg-type]
        parsed = payload_metadata(read_payload_bytes(root / "direct"), "it")
        for found in (compact, parsed):
            assert found.state_dict_metadata == read.state_dict_metadata
            assert found.storage_data == read.storage_data
    return seen


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_planned_as_megatron_core_plans_it(tmp_path: Path, name: str) -> None:
    seen = run_ranks(plan_like_megatron, LAYOUTS[RUNS[name][0]][0], tmp_path, name)[0]
    assert seen["unlike"] == []
    assert seen["items"] == seen["places"] > 20
    assert seen["stock reads"] == seen["tensors"] > 10


# After a load.


def state_of(step: int, *, more: bool = False) -> dict[str, Any]:
    rank = dist.get_rank()
    state: dict[str, Any] = {
        "own": ShardedTensor.from_rank_offsets("own", torch.full((4, 6), 10.0 * step + rank), (0, rank, 2)),
        "thing": ShardedObject("thing", [step, rank], (2,), (rank,)),
        "step": step,
    }
    for number in range(6):
        value = torch.full((5 + number,), float(step))
        state[f"copied{number}"] = ShardedTensor.from_rank_offsets(f"copied{number}", value, replica_id=rank)
    if more and rank == 1:
        state["late"] = ShardedTensor.from_rank_offsets("late", torch.ones(3))
    return state


def save_first(root: Path) -> None:
    init_ranks()
    save(state_of(0), root / "first", None, dist.group.WORLD, writers=2)


class Told(logging.Handler):
    """Notes what the planner says."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logger = logging.getLogger("bridge.training.checkpointing.formats.planning")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def save_after_a_load(root: Path) -> dict[str, Any]:
    """As a run that was started again does it, with checkpoints that fit and others that do not."""
    init_ranks()
    told, group, ranks = Told(), dist.group.WORLD, Ranks.current()
    seen: dict[str, Any] = {}
    loaded = {
        "as it was": (root / "first", {}),
        "changed": (root / "first", {"more": True}),
        "of a lying plan": (root / "lying", {}),
        "of a damaged plan": (root / "damaged", {}),
        "of another type": (root / "int32", {}),
        "of another shape": (root / "turned", {}),
        "without a key": (root / "less", {}),
        "without a plan": (root / "none", {}),
    }
    for number, (name, (path, change)) in enumerate(loaded.items()):
        told.messages.clear()
        planning = save(state_of(number, **change), root / name, SavePlanning(path), group, writers=2)
        seen[name] = list(told.messages)
        save(state_of(number, **change), root / f"{name}, anew", None, group, writers=2)
        assert differences(root / name, root / f"{name}, anew") == []
        told.messages.clear()
        save(state_of(9, **change), root / f"{name}, again", planning, group, writers=2)
        assert told.messages == []
        template = state_of(0, **change)
        found = load(
            template, root / name, ranks, LoadOptions(strictness="assume_ok_unexpected", validate_access=False)
        ).state_dict
        assert torch.equal(found["own"], state_of(number)["own"].data)
        assert found["thing"] == [number, dist.get_rank()] and found["step"] == number
    return seen


def test_the_first_save_after_a_load_takes_up_the_plan_of_the_checkpoint_if_it_fits(tmp_path: Path) -> None:
    run_ranks(save_first, 2, tmp_path)
    metadata = (tmp_path / "first" / ".metadata").read_bytes()
    good = (tmp_path / "first" / ".metadata.bridge").read_bytes()
    table = read_compact(tmp_path / "first")
    assert table is not None
    table.place[:] = (table.place + 1) % 7  # other shards than those that it names
    lying = table.to_bytes(metadata)
    edited = {"lying": lying, "damaged": good[:-20] + b"\0" * 20, "none": None}
    table = StoredTable.from_bytes(good, metadata)
    specs = [spec if spec.is_object else spec._replace(dtype="torch.int32") for spec in table.specs]
    edited["int32"] = replace(table, specs=specs).to_bytes(metadata)
    specs = [spec._replace(whole=(6, 8), part=(6, 4)) if len(spec.whole) == 2 else spec for spec in table.specs]
    assert specs != table.specs
    edited["turned"] = replace(table, specs=specs).to_bytes(metadata)
    number = table.keys.index("copied3")
    kept = table.key != number
    columns = ("key", "spec", "offset", "file", "place", "at", "length")
    less: dict[str, Any] = {column: getattr(table, column)[kept] for column in columns}
    less["key"] = less["key"] - (less["key"] > number)
    less["keys"] = [key for key in table.keys if key != "copied3"]
    edited["less"] = replace(table, **less).to_bytes(metadata)
    for name, data in edited.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(metadata)
        if data is not None:
            (tmp_path / name / ".metadata.bridge").write_bytes(data)
    first, second = run_ranks(save_after_a_load, 2, tmp_path)
    assert first == {
        "as it was": ["the plan of the checkpoint that was loaded is used again"],
        "changed": [],
        "of a lying plan": [],
        "of a damaged plan": [],
        "of another type": [],
        "of another shape": [],
        "without a key": [],
        "without a plan": [],
    }
    assert not any(second.values())


# What fails in between.


def keys_in(directory: Path) -> set[str]:
    if (directory / ".metadata").exists():
        return set(FileSystemReader(directory).read_metadata().state_dict_metadata)
    return {path.name for path in directory.iterdir() if path.is_dir()}


def save_with_a_failure_in_between(root: Path) -> dict[str, list[set[str]]]:
    init_ranks()
    rank = dist.get_rank()

    def state(*keys: str) -> dict[str, Any]:
        return {key: ShardedTensor.from_rank_offsets(key, torch.ones(4)) for key in keys}

    def fail(common: dict[str, Any]) -> dict[str, Any]:
        if rank == 1:
            raise OSError("for a moment")
        return common

    seen: dict[str, list[set[str]]] = {}
    for form in ("torch_dist", "zarr"):
        planning, found = SavePlanning(), []
        for number, (first, second) in enumerate(
            [(["a"], ["z"]), (["a", "new"], ["z"]), (["a"], ["z", "z2"]), (["a", "new"], ["z", "z2"])]
        ):
            more: dict[str, Any] = {"preprocess_common": fail} if number == 1 else {}
            own = state(*(second if rank else first))
            directory = root / f"{form}{number}"
            if more:
                with pytest.raises(CheckpointError, match="for a moment"):
                    save(own, directory, planning, None, zarr=form == "zarr", **more)
                continue
            planning = save(own, directory, planning, None, zarr=form == "zarr")
            found.append(keys_in(directory))
        seen[form] = found
    for name, count in (("on both ranks", 1), ("twice on one", 2 - 2 * rank)):
        own = {f"w{n}": ShardedTensor.from_rank_offsets("w", torch.full((4,), float(n))) for n in range(count)}
        with pytest.raises(CheckpointSaveError, match="both say that they have the main replica"):
            save(own, root / name, None, dist.group.WORLD)
    return seen


def test_a_save_that_fails_leaves_nothing_that_a_later_one_goes_by(tmp_path: Path) -> None:
    kept = [{"a", "z"}, {"a", "z", "z2"}, {"a", "new", "z", "z2"}]
    assert run_ranks(save_with_a_failure_in_between, 2, tmp_path)[0] == {"torch_dist": kept, "zarr": kept}


def test_what_was_refused_is_refused_again() -> None:
    ranks, planning = Ranks(None, 0, 1), SavePlanning()

    def save_parts(of: int) -> None:
        state = {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(4), (0, 0, of))}
        prepared = prepare(state, {}, ranks, planning, SaveOptions())
        share_out(prepared, None, ranks)
        planning.note(prepared.structure, prepared.verdict, None)

    for _ in range(2):
        save_parts(1)
        with pytest.raises(CheckpointSaveError, match="4 of 8 elements"):
            save_parts(2)


def test_a_plan_is_finished_with_every_record_or_not_at_all() -> None:
    ranks = Ranks(None, 0, 1)
    state = [ShardedTensor.from_rank_offsets(key, torch.zeros(4)) for key in ("a", "b")]
    structure = Structure.of(state)
    verdict = decide([Vote(structure.fingerprint)])
    plan = make_plan(state, ranks, SavePlanning(), verdict, writers=1, group=None)
    with pytest.raises(CheckpointSaveError, match="0 records were written where 2 were planned"):
        plan.places([])
    with pytest.raises(CheckpointSaveError, match="1 records were written where 2 were planned"):
        plan.finish(Path("nowhere"), [Places.of(np.array([0]), np.array([16]))])
