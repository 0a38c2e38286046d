"""Local checkpoints: one snapshot a rank in a directory of its node, with and without copies on other nodes."""

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.collecting import LiveObjects, collect
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.adapters import Adapters
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.queue import SaveQueue
from bridge.training.checkpointing.resolve import Offer, Source
from bridge.training.checkpointing.restoring import LiveState, restore
from bridge.training.checkpointing.sidecar import Sidecar, torch_bytes
from bridge.training.checkpointing.tiers.availability import complete_among, givers, unavailable
from bridge.training.checkpointing.tiers.local import SafeLocalCheckpointManager, make_local_manager
from bridge.training.checkpointing.tiers.rank_local import RankLocalSave, RankLocalTier, plan_rank_local_save
from bridge.training.checkpointing.tiers.rank_local_load import RankLocalCheckpoint
from bridge.training.checkpointing.tiers.record import SnapshotRecord
from bridge.training.checkpointing.tiers.sharing import structure_of
from bridge.training.checkpointing.transaction import Committed, Contents, SaveTarget
from bridge.training.config import LoRAConfig
from bridge.training.config.errors import ConfigError
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.tiny import LAYOUTS, digests, run_to_end, tiny_config

ALGORITHMS = ("fully_parallel", "atomic")


# A small state of its own: one tensor divided among the ranks, one that all ranks have, objects, counters.


class Job:
    """A rank that saves and loads a small state."""

    def __init__(self, root: Path, session: str = "session", *, jump: int | None = None) -> None:
        self.ranks = Ranks.current()
        cfg = SimpleNamespace(
            non_persistent_local_ckpt_dir=str(root),
            replication=jump is not None,
            replication_jump=jump,
            replication_factor=2,
        )
        self.manager = make_local_manager(cfg, session)
        self.layout = Layout(data=self.ranks.size)
        self.announced: list[Committed] = []

    @property
    def tier(self) -> RankLocalTier:
        return RankLocalTier(self.manager, "local", self.layout)

    def plan(self, iteration: int, algo: str = "fully_parallel", state: dict[str, Any] | None = None) -> RankLocalSave:
        sidecars = [Sidecar(f"dataloader_state/train_dataloader_dprank{self.ranks.rank:03d}.pt", self.position())]
        if self.ranks.is_first:
            sidecars.append(Sidecar("train_state.pt", torch_bytes({"step": torch.tensor(iteration)})))
        return plan_rank_local_save(
            Contents(state or self.state(iteration), {"kept": iteration}, tuple(sidecars)),
            SaveTarget(Path("unused"), iteration, "local"),
            self.manager,
            self.ranks,
            algo=algo,
            group=None,
            layout=self.layout,
            announce=self.announced.append,
            started=time.monotonic(),
        )

    def save(self, iteration: int, algo: str = "fully_parallel") -> RankLocalSave:
        task = self.plan(iteration, algo)
        try:
            task.accept(self.ranks.run("writing", task.write))
            task.publish()
        except BaseException:
            task.abandon()
            raise
        return task

    def open(self) -> RankLocalCheckpoint:
        (offer, *_) = self.tier.offers(self.ranks)
        return self.tier.open(Source(offer.path, False, "the test says so", offer.kind), self.ranks)

    def load(self, template: dict[str, Any] | None = None, strictness: str = "assume_ok_unexpected") -> Any:
        return self.open().load(
            template or self.state(-1),
            self.ranks,
            LoadOptions(strictness=strictness, parallelization_group=None, validate_access=True),
        )

    def loaded(self) -> tuple[Any, ...]:
        state = self.load().state_dict
        return state["iteration"], float(state["w"][0, 0]), float(state["r"][3]), state["o"]

    def expected(self, iteration: int) -> tuple[Any, ...]:
        return iteration, float(iteration + self.ranks.rank), float(iteration + 3), {"rank": self.ranks.rank}

    def iterations(self) -> list[int]:
        return [offer.iteration for offer in self.tier.offers(self.ranks)]

    def state(self, iteration: int) -> dict[str, Any]:
        rank, size = self.ranks.rank, self.ranks.size
        divided, everywhere = torch.full((4, 6), float(iteration + rank)), torch.arange(40.0) + iteration
        return {
            "w": ShardedTensor.from_rank_offsets("w", divided, (0, rank, size)),
            "r": ShardedTensor.from_rank_offsets("r", everywhere, replica_id=rank),
            "o": ShardedObject("o", {"rank": rank}, (size,), (rank,)),
            "iteration": iteration,
        }

    def position(self) -> bytes:
        return torch_bytes({"dataloader_state_dict": {"seen": 100 + self.ranks.rank}})

    def files(self) -> list[str]:
        return sorted(path.name for path in self.manager.local_ckpt_dir.iterdir())

    def meet(self) -> None:
        self.ranks.gather_all("meeting", None)

    def error(self, action: Callable[[], Any]) -> tuple[str, str]:
        try:
            action()
        except CheckpointError as error:
            return type(error).__name__, str(error).replace(str(self.manager.root_local_ckpt_dir), "ROOT")
        raise AssertionError("nothing was raised")


def small_life(root: Path) -> dict[str, Any]:
    """Everything that two ranks can go through without a model."""
    init_ranks()
    facts: dict[str, Any] = {}
    for case in CASES:
        facts[case.__name__] = case(root / case.__name__)
        Ranks.current().gather_all("next case", None)
    return facts


def nothing_saved(root: Path) -> Any:
    return Job(root).iterations()


def what_is_said(root: Path) -> Any:
    job = Job(root)
    job.save(7)
    stored = job.open()
    saved = stored.describe(job.ranks)
    (committed,) = job.announced
    return {
        "as expected": job.loaded() == job.expected(7),
        "saved": saved,
        "counters": stored.train_state(),
        "same size": stored.data_iterator_state(1, 2).states,
        "other size": stored.data_iterator_state(0, 1).states,
        "committed": (committed.path.relative_to(root), committed.iteration, committed.kind, committed.total_bytes),
        "cleaned": "rank_local" not in job.load().state_dict,
    }


def sharing_the_work(root: Path) -> Any:
    sizes = {}
    for algo in ALGORITHMS:
        job = Job(root, algo)
        task = job.plan(5, algo)
        sizes[algo] = task.total_bytes
        task.write()
        job.meet()
        task.publish()
        assert job.loaded() == job.expected(5)
    return sizes


def only_some_of_it(root: Path) -> Any:
    """A load may ask for less than was saved, and then for other shares of it."""
    job = Job(root)
    job.save(3)
    part = {key: value for key, value in job.state(-1).items() if key in ("r", "iteration")}
    loaded = job.load(part).state_dict
    return sorted(loaded), bool((loaded["r"] == torch.arange(40.0) + 3).all()), loaded["r"] is part["r"].data


def too_much_of_it(root: Path) -> Any:
    job = Job(root)
    job.save(3)
    template = {
        **job.state(-1),
        "new": ShardedTensor.from_rank_offsets("new", torch.ones(2), replica_id=job.ranks.rank),
    }
    reshaped = {**job.state(-1), "r": ShardedTensor.from_rank_offsets("r", torch.ones(41), replica_id=job.ranks.rank)}
    returned = job.load(dict(template), "return_all")
    return {
        "default": job.error(lambda: job.load(dict(template))),
        "raise_all": job.error(lambda: job.load(dict(template), "raise_all"))[0],
        "ignore_all": "new" in job.load(dict(template), "ignore_all").state_dict,
        "return_all": (returned.missing, returned.unexpected, returned.dropped),
        "other shape": job.error(lambda: job.load(reshaped)),
    }


def two_sessions(root: Path) -> Any:
    one, other = Job(root, "one"), Job(root, "other")
    one.save(10)
    other.save(5)
    return one.iterations(), other.iterations(), one.loaded() == one.expected(10), other.loaded() == other.expected(5)


def only_the_newest_is_kept(root: Path) -> Any:
    job = Job(root)
    seen = []
    for iteration in (1, 2, 12_345_678):
        job.save(iteration)
        seen.append((job.iterations(), job.files()))
    return seen


def older_ones_stay_until_all_have_the_new_one(root: Path) -> Any:
    job = Job(root)
    job.save(1)
    task = job.plan(2)
    if job.ranks.is_first:
        task.write()
    job.meet()
    early = job.iterations()
    error = job.error(task.publish)
    task.abandon()
    job.meet()
    return early, error, job.iterations(), job.files()


def going_back(root: Path) -> Any:
    job = Job(root)
    job.save(20)
    stale = job.iterations(), job.manager.find_latest()
    job.tier.forget_newer(12, job.ranks)
    after = job.iterations(), job.manager.find_latest()
    job.save(15)
    return stale, after, job.iterations(), job.manager.find_latest(), job.loaded() == job.expected(15)


def stale_newer_on_one_rank(root: Path) -> Any:
    """A rank that could not be asked in time still holds a file from before the rollback."""
    job = Job(root)
    job.save(20)
    if job.ranks.rank == 1:
        job.manager.forget_newer(12)
    job.meet()
    job.save(15)
    return job.iterations(), job.loaded() == job.expected(15), job.files()


def the_same_iteration_again(root: Path) -> Any:
    job = Job(root)
    job.save(4)
    own = job.manager.snapshot_path(4)
    shutil.copy(own, root / f"earlier{job.ranks.rank}")
    job.save(4)
    again = job.loaded() == job.expected(4)
    job.meet()
    if job.ranks.rank == 1:
        shutil.copy(root / "earlier1", own)
    job.meet()
    return again, job.error(job.open)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(root: Path) -> Any:
    ways: dict[str, Callable[[Path], Any]] = {
        "flipped bit": flip_a_bit,
        "cut short": lambda path: os.truncate(path, path.stat().st_size - 9),
        "empty": lambda path: os.truncate(path, 0),
        "text": lambda path: path.write_text("hello, hello, hello, hello, hello"),
        "gone": lambda path: path.unlink(),
    }
    facts = {}
    for name, way in ways.items():
        job = Job(root, name)
        job.save(8)
        source = Source(job.manager.snapshot_path(8), False, "", "local")
        if job.ranks.rank == 1:
            way(job.manager.snapshot_path(8))
        job.meet()
        kind, message = job.error(lambda job=job, source=source: job.tier.open(source, job.ranks))
        facts[name] = kind, re.sub(r"\b[0-9a-f]{8}\b", "CRC", message)
    return facts


def another_name(root: Path) -> Any:
    job = Job(root)
    job.save(8)
    shutil.copy(job.manager.snapshot_path(8), job.manager.snapshot_path(9))
    job.meet()
    return job.error(job.open)


def a_file_of_stock_nvrx(root: Path) -> Any:
    job = Job(root)
    job.save(8)
    stock = LocalCheckpointManager(root, session_id="session")
    state = job.plan(9).states[9, job.ranks.rank, "session"]
    stock._save(state, (9, job.ranks.rank, "session"))
    job.meet()
    return job.iterations(), job.error(job.open)


class Dies(SafeLocalCheckpointManager):
    """Its writer is killed half-way through the file."""

    def _save(self, state_dict: Any, ckpt_id: Any) -> None:
        self._ensure_dir()
        with self._local_ckpt_path_from_id(ckpt_id, is_dirty=True).open("wb") as stream:
            stream.write(b"half of it")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def killed_half_way(root: Path) -> Any:
    """In the background, on one rank of two; and without the time to clean up, as when the trainer dies too."""
    job, queue = Job(root), SaveQueue()
    job.save(1)
    task = job.plan(2)
    if job.ranks.rank == 1:
        task.store = Dies(root, "session")
    queue.schedule(AsyncRequest(task.write, (), [task.publish]), "the local save", receive=task.accept)
    kind, message = job.error(lambda: queue.finalize(blocking=True))
    left = job.files()
    restarted = Job(root)
    before = restarted.iterations(), restarted.loaded() == restarted.expected(1)
    retry = restarted.plan(2)
    queue.schedule(AsyncRequest(retry.write, (), [retry.publish]), "the local save", retry.accept, retry.abandon)
    assert queue.finalize(blocking=True) == 1
    return kind, message, left, before, job.files(), restarted.loaded() == restarted.expected(2)


def a_directory_that_is_a_file(root: Path) -> Any:
    job, queue = Job(root), SaveQueue()
    job.save(1)
    task = job.plan(2)
    if job.ranks.rank == 1:
        job.manager.local_ckpt_dir.rename(root / "aside")
        job.manager.local_ckpt_dir.write_text("in the way")
    job.meet()
    queue.schedule(AsyncRequest(task.write, (), [task.publish]), "the local save", task.accept, task.abandon)
    error = job.error(lambda: queue.finalize(blocking=True))
    if job.ranks.rank == 1:
        job.manager.local_ckpt_dir.unlink()
        (root / "aside").rename(job.manager.local_ckpt_dir)
    job.meet()
    kept = job.iterations(), job.loaded() == job.expected(1)
    task = job.plan(2)
    queue.schedule(AsyncRequest(task.write, (), [task.publish]), "the local save", task.accept, task.abandon)
    return error, kept, queue.finalize(blocking=True), job.files()


def no_space(root: Path) -> Any:
    """The system refuses the rest of a file on one rank."""
    job = Job(root)
    job.save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if job.ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        error = job.error(lambda: job.save(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    job.meet()
    return error, job.files(), job.loaded() == job.expected(1)


def deleted_under_the_manager(root: Path) -> Any:
    job = Job(root)
    job.save(1)
    shutil.rmtree(job.manager.local_ckpt_dir)
    job.meet()
    gone = job.iterations(), job.manager.find_latest()
    job.save(2)
    return gone, job.iterations(), job.manager.find_latest()


def with_other_sizes(root: Path) -> Any:
    job = Job(root)
    job.save(1)
    job.layout = Layout(tensor=2)
    return job.error(job.open)


def what_could_not_be_loaded(root: Path) -> Any:
    job = Job(root)
    job.save(1)
    error = job.error(lambda: job.plan(2, state={**job.state(2), "strange": random.Random(1)}))
    return error[0], "could not be loaded again" in error[1], job.files()


def shards_that_overlap(root: Path) -> Any:
    job = Job(root)
    twice = ShardedTensor.from_rank_offsets("r", torch.ones(3), replica_id=0)
    return job.error(lambda: job.plan(2, state={**job.state(2), "r": twice}))[0]


def known_structure(root: Path) -> Any:
    job = Job(root)
    first = job.save(1)
    task = job.plan(2)
    again = plan_rank_local_save(
        Contents(job.state(3), {}, (Sidecar("train_state.pt", torch_bytes({"step": torch.tensor(3)})),)),
        SaveTarget(Path("unused"), 3, "local"),
        job.manager,
        job.ranks,
        algo="fully_parallel",
        group=None,
        layout=job.layout,
        announce=job.announced.append,
        started=time.monotonic(),
        structure=first.structure,
    )
    atomic = structure_of(job.state(3) | {"iteration": {}}, first.structure, "atomic", None, job.ranks)
    return task.structure is first.structure, again.structure is first.structure, atomic is first.structure


def nvrx_interface(root: Path) -> Any:
    """The documented manager: what a program that calls it itself gets."""
    job = Job(root)
    task = job.plan(3)
    ((identity, state),) = task.states.items()
    job.manager.save(state, identity[0])
    loaded, found = job.manager.load() if job.manager.find_latest() == 3 else (None, None)
    return found, loaded.common["iteration"], float(loaded.sharded_state_dict["w"].data[0, 0])


CASES: list[Callable[[Path], Any]] = [
    nothing_saved,
    what_is_said,
    sharing_the_work,
    only_some_of_it,
    too_much_of_it,
    two_sessions,
    only_the_newest_is_kept,
    older_ones_stay_until_all_have_the_new_one,
    going_back,
    stale_newer_on_one_rank,
    the_same_iteration_again,
    damage,
    another_name,
    a_file_of_stock_nvrx,
    killed_half_way,
    a_directory_that_is_a_file,
    no_space,
    deleted_under_the_manager,
    with_other_sizes,
    what_could_not_be_loaded,
    shards_that_overlap,
    known_structure,
    nvrx_interface,
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank and case, what `small_life` found."""
    return run_ranks(small_life, 2, tmp_path_factory.mktemp("local"))


def of(facts: list[dict[str, Any]], case: Callable[[Path], Any]) -> list[Any]:
    """What each rank found in one case."""
    return [found[case.__name__] for found in facts]


def test_an_empty_directory_offers_nothing(facts: Any) -> None:
    assert of(facts, nothing_saved) == [[], []]


def test_a_snapshot_says_what_it_is_and_gives_back_what_was_saved(facts: Any) -> None:
    for rank, found in enumerate(of(facts, what_is_said)):
        assert found == {
            "as expected": True,
            "saved": Saved(
                iteration=7,
                release=False,
                layout=Layout(data=2),
                layout_is_known=True,
                content_metadata={"kept": 7},
                has_optimizer=False,
                has_rng=False,
                has_train_state=True,
                data_iterator_ranks=2,
            ),
            "counters": {"step": 7},
            "same size": ({"seen": 101},),
            "other size": ({"seen": 100}, {"seen": 101}),
            "committed": (Path(f"session/{rank}/iter_0000007_{rank}_local.pt"), 7, "local", 2 * 96 + 160),
            "cleaned": True,
        }


def test_fully_parallel_keeps_each_replicated_tensor_once(facts: Any) -> None:
    assert of(facts, sharing_the_work) == [
        {"fully_parallel": 96 + 160, "atomic": 96 + 160},
        {"fully_parallel": 96, "atomic": 96 + 160},
    ]


def test_a_part_of_the_state_can_be_loaded(facts: Any) -> None:
    assert of(facts, only_some_of_it) == [(["content_metadata", "iteration", "r"], True, True)] * 2


def test_what_the_snapshots_lack_is_treated_as_the_strictness_says(facts: Any) -> None:
    lacking = "the snapshots lack what this run asks for: new; the model or the optimizer is not the one that was saved"
    other = "the local checkpoint does not fit this run: r has the shape (40,) and should have (41,)"
    expected = {
        "default": ("CheckpointMismatchError", lacking),
        "raise_all": "CheckpointMismatchError",
        "ignore_all": False,
        "return_all": (frozenset(), frozenset({"new"}), True),
        "other shape": ("CheckpointMismatchError", other),
    }
    assert of(facts, too_much_of_it) == [expected] * 2


def test_two_runs_in_one_directory_do_not_mix(facts: Any) -> None:
    assert of(facts, two_sessions) == [([10], [5], True, True)] * 2


def test_only_the_newest_is_kept(facts: Any) -> None:
    for rank, found in enumerate(of(facts, only_the_newest_is_kept)):
        names = (f"iter_{number}_{rank}_local.pt" for number in ("0000001", "0000002", "12345678"))
        assert found == [([i], [name]) for i, name in zip((1, 2, 12_345_678), names, strict=True)]


def test_older_ones_stay_until_all_ranks_have_the_new_one(facts: Any) -> None:
    message = "the snapshots of iteration 2 were written, and now they are not all there; older ones are untouched"
    for rank, found in enumerate(of(facts, older_ones_stay_until_all_have_the_new_one)):
        assert found == ([1], ("CheckpointSaveError", message), [1], [f"iter_0000001_{rank}_local.pt"])


def test_what_is_newer_than_a_rollback_never_wins(facts: Any) -> None:
    assert of(facts, going_back) == [(([20], 20), ([], -1), [15], 15, True)] * 2
    for rank, found in enumerate(of(facts, stale_newer_on_one_rank)):
        assert found == ([15], True, [f"iter_0000015_{rank}_local.pt"])


def test_saves_of_the_same_iteration_do_not_mix(facts: Any) -> None:
    message = "the local checkpoint of iteration 4 is of 2 different saves (ranks 0; ranks 1)"
    assert of(facts, the_same_iteration_again) == [(True, ("CheckpointDamagedError", message))] * 2


def test_damage_on_one_rank_is_the_same_error_on_all(facts: Any) -> None:
    problems = {
        "flipped bit": "has CRC-32 CRC instead of CRC: it was changed after it was written",
        "cut short": r"has \d+ bytes instead of \d+",
        "empty": r"is not a snapshot: it does not begin as one \(0 bytes\)",
        "text": r"is not a snapshot: it does not begin as one \(33 bytes\)",
        "gone": "does not exist",
    }
    first, second = of(facts, damage)
    assert first == second
    assert first.keys() == problems.keys()
    for name, problem in problems.items():
        kind, message = first[name]
        file = f"ROOT/{name}/1/iter_0000008_1_local.pt"
        assert kind == "CheckpointDamagedError"
        assert re.fullmatch(f"reading the snapshots failed on rank 1: {re.escape(file)} {problem}", message)


def test_a_file_under_another_name_is_damage(facts: Any) -> None:
    for kind, message in of(facts, another_name):
        assert kind == "CheckpointDamagedError"
        assert "of iteration 9 should be of rank 0, and is of iteration 8 and rank 0" in message


def test_a_pickle_of_stock_nvrx_is_refused_with_the_reason(facts: Any) -> None:
    for iterations, (kind, message) in of(facts, a_file_of_stock_nvrx):
        assert (iterations, kind) == ([9, 8], "UnsafeCheckpointError")
        assert "iter_0000009_1_local.pt is not a snapshot of this program but a file of torch.save" in message


def test_a_writer_killed_half_way_costs_nothing_but_its_save(facts: Any) -> None:
    expected_message = (
        "writing the local save failed on rank 1: the process of the background writer of the local save was killed "
        "by SIGKILL"
    )
    left = [["iter_0000001_0_local.pt", "iter_0000002_0_local.pt"]]
    left += [["iter_0000001_1_local.pt", "iter_0000002_1_local.dirty.pt"]]
    for rank, (kind, message, found, before, after, loaded) in enumerate(of(facts, killed_half_way)):
        assert (kind, message) == ("CheckpointSaveError", expected_message)
        assert found == left[rank]
        assert before == ([1], True)
        assert (after, loaded) == ([f"iter_0000002_{rank}_local.pt"], True)


def test_a_rank_that_cannot_write_fails_the_save_on_all(facts: Any) -> None:
    for rank, (error, kept, finalized, files) in enumerate(of(facts, a_directory_that_is_a_file)):
        assert error == (
            "CheckpointSaveError",
            "writing the local save failed on rank 1: the process of the background writer of the local save failed: "
            "FileExistsError: [Errno 17] File exists: 'ROOT/session/1'",
        )
        assert kept == ([1], True)
        assert (finalized, files) == (1, [f"iter_0000002_{rank}_local.pt"])
    for rank, (error, files, loaded) in enumerate(of(facts, no_space)):
        assert error == ("CheckpointError", "writing failed on rank 1: OSError: [Errno 27] File too large")
        assert (files, loaded) == ([f"iter_0000001_{rank}_local.pt"], True)


def test_a_deleted_directory_is_made_again(facts: Any) -> None:
    assert of(facts, deleted_under_the_manager) == [(([], -1), [2], 2)] * 2


def test_other_parallel_sizes_are_refused(facts: Any) -> None:
    message = (
        "examining the snapshots failed: the local checkpoint of iteration 1 was saved under TP1 PP1 VPP1 CP1 EP1 ETP1 "
        "DP2 and this run has TP2 PP1 VPP1 CP1 EP1 ETP1 DP1; what is kept rank by rank cannot be divided anew: start "
        "with as many ranks and the same parallel sizes, or from a persistent checkpoint"
    )
    for kind, found in of(facts, with_other_sizes):
        assert (kind, found) == ("CheckpointMismatchError", message.removeprefix("examining the snapshots failed: "))


def fewer_ranks(root: Path) -> Any:
    init_ranks()
    job = Job(root)
    if job.ranks.size == 2:
        return job.save(3).published
    return job.iterations(), job.error(job.open)


def test_fewer_ranks_are_refused(tmp_path: Path) -> None:
    assert run_ranks(fewer_ranks, 2, tmp_path) == [True, True]
    ((iterations, (kind, message)),) = run_ranks(fewer_ranks, 1, tmp_path)
    assert (iterations, kind) == ([3], "CheckpointMismatchError")
    assert "was saved by 2 ranks and this run has 1" in message


def test_what_could_not_be_loaded_is_not_saved(facts: Any) -> None:
    for rank, found in enumerate(of(facts, what_could_not_be_loaded)):
        assert found == ("CheckpointSaveError", True, [f"iter_0000001_{rank}_local.pt"])
    assert of(facts, shards_that_overlap) == ["CheckpointSaveError"] * 2


def test_a_known_structure_is_checked_before_it_is_used_again(facts: Any) -> None:
    assert of(facts, known_structure) == [(False, True, False)] * 2


def test_the_manager_keeps_nvrxs_interface(facts: Any) -> None:
    assert of(facts, nvrx_interface) == [((3, rank, "session"), 3, 3.0 + rank) for rank in range(2)]


# Copies on other nodes. A node is a directory here, with two of the four ranks.


def replicated_life(root: Path) -> dict[str, Any]:
    init_ranks()
    ranks = Ranks.current()

    def job(name: str, replicates: bool = True) -> Job:
        return Job(root / name / f"node{ranks.rank // 2}", jump=2 if replicates else None)

    def saved(name: str, replicates: bool = True) -> Job:
        made = job(name, replicates)
        made.save(6)
        made.meet()
        return made

    def lose(*victims: str) -> None:
        if ranks.is_first:
            for victim in victims:
                shutil.rmtree(root / victim)
        ranks.gather_all("losing", None)

    facts: dict[str, Any] = {}
    facts["files"] = saved("all well").files()
    facts["all well"] = job("all well").loaded() == saved("all well").expected(6)

    saved("node lost")
    lose("node lost/node1")
    again = job("node lost")
    facts["node lost"] = again.iterations(), again.loaded() == again.expected(6)
    again.save(7)
    facts["saved after the loss"] = again.iterations(), again.files(), again.loaded() == again.expected(7)

    # Each rank keeps its own copy of what it saved, whatever is done to the other rank's tensors.
    one = saved("rank lost")
    lose("rank lost/node0/session/0", "rank lost/node1/session/3")
    facts["ranks of two cliques lost"] = job("rank lost").loaded() == one.expected(6)

    saved("clique lost")
    lose("clique lost/node0/session/0", "clique lost/node1/session/2")
    facts["clique lost"] = job("clique lost").iterations()

    saved("alone", replicates=False)
    lose("alone/node1/session/3")
    facts["lost without copies"] = job("alone", replicates=False).iterations()

    for name, owners in (("damaged", (1,)), ("copies damaged", (1, 3))):
        one = saved(name)
        source = Source(one.manager.snapshot_path(6), False, "", "local")
        if ranks.rank in owners:
            flip_a_bit(one.manager.local_ckpt_dir / "iter_0000006_1_local.pt")
        one.meet()
        if name == "damaged":
            facts[name] = job(name).loaded() == one.expected(6)
        else:
            facts[name] = one.error(lambda one=one, source=source: one.tier.open(source, ranks))

    one, queue = job("background"), SaveQueue()
    task = one.plan(6)
    queue.schedule(AsyncRequest(task.write, (), [task.publish]), "save", task.accept, task.abandon)
    queue.finalize(blocking=True)
    lose("background/node0")
    facts["background"] = job("background").loaded() == one.expected(6)
    return facts


def test_copies_replace_what_a_node_takes_with_it(tmp_path: Path) -> None:
    facts = run_ranks(replicated_life, 4, tmp_path)
    for rank, found in enumerate(facts):
        clique = sorted([rank, (rank + 2) % 4])
        assert found.pop("files") == [f"iter_0000006_{owner}_local.pt" for owner in clique]
        kind, message = found.pop("copies damaged")
        assert kind == "CheckpointDamagedError"
        assert message.startswith("there is no readable snapshot of rank 1, nor a copy that could replace it (rank 1: ")
        assert found == {
            "all well": True,
            "node lost": ([6], True),
            "saved after the loss": ([7], [f"iter_0000007_{owner}_local.pt" for owner in clique], True),
            "ranks of two cliques lost": True,
            "clique lost": [],
            "lost without copies": [],
            "damaged": True,
            "background": True,
        }


CLIQUES = [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("owners", "cliques", "missing", "chosen"),
    [
        ([{0}, {1}], [[0], [1]], [], {0: 0, 1: 1}),
        ([{0, 1}, set()], [[0], [1]], [1], None),  # a copy that nobody gives away
        ([{0, 2}, {1, 3}, {0, 2}, {1, 3}], CLIQUES, [], {0: 0, 1: 1, 2: 2, 3: 3}),
        ([set(), {1, 3}, {0, 2}, {1, 3}], CLIQUES, [], {0: 2, 1: 1, 2: 2, 3: 3}),
        ([{0, 2}, {1}, {0, 2}, {1}], CLIQUES, [3], None),
        ([{1, 3}, {1, 3}, {1, 3}, {1, 3}], CLIQUES, [0, 2], None),
        ([{0, 1, 2}, {0, 1, 2}, set()], [[0, 1, 2]], [], {0: 0, 1: 1, 2: 0}),
    ],
)
def test_who_reads_whose_snapshot(owners: Any, cliques: Any, missing: list[int], chosen: Any) -> None:
    assert unavailable(owners, cliques) == missing
    if missing:
        with pytest.raises(CheckpointDamagedError, match=f"no readable snapshot of rank {missing[0]}"):
            givers(owners, cliques, {})
    else:
        assert givers(owners, cliques, {}) == chosen


@pytest.mark.parametrize(
    ("held", "complete"),
    [
        ([[], []], []),
        ([[(5, 0)], [(5, 1)]], [5]),
        ([[(5, 0), (9, 0)], [(5, 1)]], [5]),
        ([[(5, 0), (9, 0)], [(9, 1), (5, 1)]], [9, 5]),
        ([[(5, 0), (5, 1)], []], []),
    ],
)
def test_an_iteration_is_complete_when_every_rank_can_have_its_snapshot(held: Any, complete: list[int]) -> None:
    assert complete_among(held, [[0], [1]]) == complete


# A whole run: model, optimizer, random states.


def perturb(run: Run) -> None:
    """What training would change, and more."""
    with torch.no_grad():
        for chunk in run.model:
            for parameter in chunk.parameters():
                parameter.add_(1)
        for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
            for group in optimizer.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1)
                    for value in optimizer.optimizer.state.get(parameter, {}).values():
                        if torch.is_tensor(value):
                            value.add_(1)
    torch.rand(3), random.random(), np.random.rand()
    run.scheduler.num_steps = 0
    run.state.train_state = replace(run.state.train_state, step=99)


def whole_run(root: Path, model: dict[str, Any]) -> list[list[str]]:
    """Save, change everything, load; the names of what was changed, and of what is different afterwards."""
    run = setup(tiny_config(train_iters=2, model=model))
    train(run)
    ranks, groups, before = Ranks.current(), run.pg_collection, digests(run)
    facts: list[list[str]] = []
    for algo in ALGORITHMS:
        for background in (False, True):
            manager = SafeLocalCheckpointManager(root, f"{algo}{background}")
            layout = Layout.of(groups, len(run.model))
            flops = run.state.train_state.floating_point_operations_so_far
            live = LiveObjects(
                run.state, run.model, run.optimizer, run.scheduler, flops, run.train_data_iterator, groups, None
            )
            save = plan_rank_local_save(
                collect(live, None, ranks),
                SaveTarget(root, 2, "local"),
                manager,
                ranks,
                algo=algo,
                group=groups.dp_cp,
                layout=layout,
                announce=lambda committed: None,
                started=time.monotonic(),
            )
            if background:
                queue = SaveQueue()
                queue.schedule(AsyncRequest(save.write, (), [save.publish]), "save", save.accept, save.abandon)
            else:
                save.write()
                ranks.gather_all("written", None)
                save.publish()
            perturb(run)
            if background:
                queue.finalize(blocking=True)
            between = digests(run)
            tier = RankLocalTier(manager, "local", layout, groups.dp_cp)
            (offer,) = tier.offers(ranks)
            assert isinstance(offer, Offer)
            stored = tier.open(Source(offer.path, False, "", "local"), ranks)
            into = LiveState(run.state, run.model, run.optimizer, run.scheduler, groups, None)
            restore(stored, stored.describe(ranks), into, ranks)
            after = digests(run)
            facts.append([name for name in before if before[name] != after[name]])
            assert sum(before[name] != between[name] for name in before) > 0.9 * len(before)
    return facts


RUNS = {
    "DP2": LAYOUTS["DP2"],
    "PP2 with VPP2": LAYOUTS["PP2 with VPP2"],
    "TP2 x DP2": (4, {"tensor_model_parallel_size": 2}),
    "EP2 x DP2": (4, LAYOUTS["EP2"][1]),
}


@pytest.mark.parametrize("layout", RUNS)
def test_everything_is_restored_bit_for_bit(tmp_path: Path, layout: str) -> None:
    world_size, model = RUNS[layout]
    assert run_ranks(whole_run, world_size, tmp_path, model) == [[[], [], [], []]] * world_size


# Settings.


def refused_replication(root: Path) -> list[str]:
    init_ranks()
    found = []
    for jump in (1, 2):
        try:
            Job(root, jump=jump)
        except ConfigError as error:
            found.append(str(error))
    return found


def test_ranks_that_cannot_replicate_are_refused_before_the_start(tmp_path: Path) -> None:
    broken = (
        "checkpoint.replication_jump: 2 times replication_factor 2 does not divide the 2 ranks; change one of them, or "
        "set checkpoint.replication to false"
    )
    checkpoint = {
        "save": str(tmp_path / "save"),
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": str(tmp_path / "local"),
        "replication": True,
        "replication_jump": 2,
    }
    cfg = tiny_config(checkpoint=checkpoint)
    cfg.validate(4)
    with pytest.raises(ConfigError, match=re.escape(broken)):
        cfg.validate(2)
    for (found,) in run_ranks(refused_replication, 2, tmp_path):
        assert broken in found


def test_adapters_are_told_by_their_mark() -> None:
    record = SnapshotRecord(4, 0, 1, {}, "id", {"step": 4}, {}, {})
    content = {"adapters": {"settings": {"dim": 8}, "base": "/base"}}
    state = SimpleNamespace(common={"content_metadata": content})
    stored = RankLocalCheckpoint(Source(Path("x"), False, "", "local"), state, record, {}, None)
    assert stored.describe(Ranks(None, 0, 1)).adapters == Adapters({"dim": 8}, "/base")


# Adapters.


def adapter_run(root: Path, crash_after: int | None) -> tuple[str | None, int, str | None, dict[str, str]]:
    """A run with LoRA whose only checkpoints so far are local ones."""

    class Lost(Exception):
        pass

    checkpoint = {
        "pretrained_checkpoint": str(root / "base"),
        "save": str(root / "run"),
        "load": str(root / "run"),
        "save_interval": 100,
        "non_persistent_save_interval": 1,
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": str(root / "local"),
    }
    cfg = tiny_config(train_iters=6, checkpoint=checkpoint)
    cfg.peft = LoRAConfig(dim=4)
    run = setup(cfg)
    started = run.state.loaded_kind, run.state.train_state.step, run.state.base_checkpoint, digests(run)
    if crash_after is None:
        return started

    save, seen = run.manager.save, {}

    def save_and_note(*arguments: Any) -> None:
        save(*arguments)
        seen[run.state.train_state.step] = digests(run)
        if run.state.train_state.step == crash_after:
            raise Lost

    run.manager.save = save_and_note  # type: ignore[method-assign]
    with pytest.raises(Lost):
        train(run)
    return None, crash_after, run.state.base_checkpoint, seen[crash_after]


def test_adapters_resume_from_local_checkpoints_and_never_take_them_for_the_base(tmp_path: Path) -> None:
    """W20 and W21: no persistent checkpoint of the adapters exists yet, and the local one is newer than the base."""
    base = {"save": str(tmp_path / "base"), "save_interval": 1}
    run_ranks(run_to_end, 2, tiny_config(train_iters=2, checkpoint=base))
    lost = run_ranks(adapter_run, 2, tmp_path, 3)
    resumed = run_ranks(adapter_run, 2, tmp_path, None)
    for (_, step, found_base, expected), (kind, found_step, again_base, found) in zip(lost, resumed, strict=True):
        assert (kind, found_step) == ("local", step)
        assert found_base == again_base == str(tmp_path / "base" / "iter_0000002")
        assert found == expected
