"""In-memory checkpoints of real ranks, which die and are started again."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    KeeperLostError,
    MemoryLimitError,
)
from bridge.training.checkpointing.tiers import snapshot
from bridge.training.checkpointing.tiers.memory.in_memory import (
    InMemoryCheckpointManager,
    make_in_memory_manager,
    read_state,
)
from bridge.training.checkpointing.tiers.memory.keeper_readers import release_session, stored_snapshots
from bridge.training.checkpointing.tiers.record import KEY
from bridge.training.config import CheckpointConfig
from tests.distributed.launch import RankError, init_ranks, run_ranks

MIB = 1 << 20


@pytest.fixture
def session() -> Iterator[str]:
    name = f"test-{secrets.token_hex(6)}"
    yield name
    release_session(name)


def tensors_of(iteration: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    weight = torch.randn(300, 50, generator=generator)
    return {
        "weight": weight,
        "transposed": weight.t(),
        "half": weight.bfloat16(),
        "bytes": (weight * 100).to(torch.uint8),
        "scalar": weight[0, 0].clone(),
        "empty": torch.empty(0, 7),
        "flags": weight[:3] > 0,
    }


def state_of(iteration: int, rank: int = 0, larger: int = 0, save_id: str | None = None) -> MCoreTensorAwareStateDict:
    tensors = tensors_of(iteration, rank) | {"ballast": torch.zeros(larger)}
    sharded: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(f"{rank}.{name}", tensor) for name, tensor in tensors.items()
    }
    sharded["rng"] = ShardedObject(f"{rank}.rng", {"seed": iteration}, (1,), (0,))
    common: dict[str, Any] = {"iteration": iteration, "rank": rank, "betas": (0.9, 0.95)}
    if save_id is not None:
        common[KEY] = {"save_id": save_id}
    return MCoreTensorAwareStateDict(common=common, sharded_state_dict=sharded)


def same(loaded: Any, iteration: int, rank: int = 0) -> bool:
    """Whether a state dict is, bit for bit, the one of an iteration and a rank."""
    expected = state_of(iteration, rank)
    tensors = [(a, b) for a, b in zip(loaded.tensors, expected.tensors, strict=True)]
    return (
        loaded.common == expected.common
        and loaded.sharded_state_dict["rng"].data == {"seed": iteration}
        and [value.key for value in loaded.sharded_state_dict.values()]
        == [value.key for value in expected.sharded_state_dict.values()]
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)
    )


def manager_of(session: str, limit: int | None = 64 * MIB, **settings: Any) -> InMemoryCheckpointManager:
    return InMemoryCheckpointManager(session, limit=limit, idle_seconds=60, **settings)


def kept_by(manager: InMemoryCheckpointManager) -> list[tuple[int, int]]:
    return [(iteration, owner) for iteration, owner, _ in manager._my_ckpt_ids()]


def states_of_buffers(manager: InMemoryCheckpointManager) -> list[str]:
    account = manager.keeper.stats()
    assert account is not None
    return sorted(buffer["state"] for buffer in account["buffers"])


def save(manager: InMemoryCheckpointManager, state: Any, iteration: int) -> None:
    """Save on one rank, as a run does on each."""
    manager._save(state, manager._ckpt_id(iteration))
    manager._cleanup(iteration)


def test_a_snapshot_comes_back_bit_for_bit_and_is_the_loaders_own(session: str) -> None:
    manager = manager_of(session)
    state = state_of(10)
    pointers = [tensor.data_ptr() for tensor in state.tensors]
    save(manager, state, 10)
    assert [tensor.data_ptr() for tensor in state.tensors] == pointers, "the state that was saved stays as it is"
    loaded = manager._load((10, 0, session))
    other = manager._load((10, 0, session))
    del other
    for iteration in (20, 30, 40):
        save(manager, state_of(iteration), iteration)
    assert same(loaded, 10)
    assert kept_by(manager) == [(40, 0)]
    assert same(manager._load((40, 0, session)), 40)
    assert states_of_buffers(manager) == ["free", "kept", "retired"]
    del loaded
    deadline = time.monotonic() + 20  # the keeper learns of it when it next looks at its connections
    while "retired" in states_of_buffers(manager) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert states_of_buffers(manager) == ["free", "kept"], "the memory is the keeper's again with the last tensor"
    with pytest.raises(CheckpointNotFoundError):
        manager._load((10, 0, session))


def test_what_is_done_to_a_loaded_state_is_not_done_to_what_is_kept(session: str) -> None:
    manager = manager_of(session)
    save(manager, state_of(10), 10)
    for tensor in manager._load((10, 0, session)).tensors:
        tensor.zero_()
    assert same(manager._load((10, 0, session)), 10)


def test_another_ranks_snapshot_is_read_where_it_lies(session: str) -> None:
    other = InMemoryCheckpointManager(session, limit=64 * MIB, idle_seconds=60)
    other._rank = 1
    save(other, state_of(10, 1, save_id="this"), 10)
    manager = manager_of(session)
    found = manager.beside(10, 1, "this")
    assert found is not None
    expected = list(state_of(10, 1).tensors)
    for iteration in (20, 30, 40):
        views = snapshot.views(found, [(tensor.dtype, tuple(tensor.shape)) for tensor in expected])
        assert views is not None
        assert all(torch.equal(view, tensor) for view, tensor in zip(views, expected, strict=True))
        save(other, state_of(iteration, 1, save_id="this"), iteration)
    assert snapshot.views(found, [(torch.uint8, (3,))]) is None
    assert manager.beside(10, 1, "this") is None
    assert manager.beside(40, 2, "this") is None
    assert manager.beside(40, 1, "this") is not None
    assert kept_by(manager) == []
    other.release()


def test_what_a_keeper_has_left_of_another_save_is_not_taken_for_this_one(
    session: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a machine where another rank of the run ran before, which has saved the same iteration since, elsewhere."""
    left = InMemoryCheckpointManager(session, limit=64 * MIB, idle_seconds=60)
    left._rank = 1
    save(left, state_of(10, 1, save_id="another"), 10)
    manager = manager_of(session)
    assert manager.beside(10, 1, "this") is None
    assert "the snapshot of rank 1, iteration 10, in memory: it is of another save" in caplog.text
    save(left, state_of(20, 1), 20)
    assert manager.beside(20, 1, "this") is None, "it does not say of which"
    for iteration in (30, 40, 50):
        save(left, state_of(iteration, 1, save_id="another"), iteration)
    assert states_of_buffers(left) == ["free", "kept"], "what was looked at is not held on to"
    left.release()


@pytest.mark.parametrize(("number", "error"), [(errno.ENOMEM, CheckpointError), (errno.EIO, CheckpointDamagedError)])
def test_a_snapshot_that_cannot_be_looked_at_is_not_held_on_to(number: int, error: type[CheckpointError]) -> None:
    """Nor is it damaged where only memory is scarce: an older checkpoint would be no better."""
    closed = []

    class Refusing:
        place = "the snapshot"

        def read_header(self) -> bytes:
            raise OSError(number, os.strerror(number))

        def close(self) -> None:
            closed.append(True)

    with pytest.raises(error) as caught:
        read_state(Refusing())  # type: ignore[arg-type]
    assert (type(caught.value), closed) == (error, [True])


def test_looking_starts_no_keeper(session: str) -> None:
    manager = manager_of(session)
    assert kept_by(manager) == []
    manager.forget_newer(0)
    manager._cleanup_failed_save(1)
    assert manager.keeper.stats() is None
    with pytest.raises(KeeperLostError, match="rank 0 has no keeper of in-memory checkpoints"):
        manager._load((1, 0, session))
    manager.release()


def test_killed_ranks_resume_and_a_clean_end_frees_the_memory(session: str) -> None:
    def train_and_die() -> None:
        init_ranks()
        manager = manager_of(session)
        rank = torch.distributed.get_rank()
        for iteration in (10, 20):
            manager.save(state_of(iteration, rank), iteration)
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    def resume() -> tuple[int, bool, list[tuple[int, int]], bool]:
        init_ranks()
        manager = manager_of(session)
        rank = torch.distributed.get_rank()
        latest = manager.find_latest()
        restored = same(manager.load()[0], 20, rank)
        kept = kept_by(manager)
        manager.save(state_of(30, rank), 30)
        manager.release()
        return latest, restored, kept, manager.keeper.stats() is None

    with pytest.raises(RankError, match="killed by signal 9"):
        run_ranks(train_and_die, 2)
    with stored_snapshots(session) as stored:
        found = [(entry.keeper_rank, entry.kept.owner, entry.kept.iteration) for entry in stored]
        assert found == [(0, 0, 20), (1, 1, 20)]
        assert all(same(read_state(entry), 20, entry.kept.owner) for entry in stored)
    assert run_ranks(resume, 2) == [(20, True, [(20, rank)], True) for rank in (0, 1)]
    with stored_snapshots(session) as stored:
        assert stored == []


def test_what_one_rank_lacks_is_not_the_newest(session: str) -> None:
    def train() -> list[Any]:
        init_ranks()
        ranks = Ranks.current()
        manager = manager_of(session, limit=6 * MIB if ranks.rank else 64 * MIB)
        manager.save(state_of(10, ranks.rank), 10)
        seen: list[Any] = []
        larger = state_of(20, ranks.rank, larger=2 * MIB)
        try:
            ranks.run("the save", lambda: manager._save(larger, manager._ckpt_id(20)))
        except MemoryLimitError as error:
            seen.append(str(error).split("; set")[0])
        seen += [kept_by(manager), manager.find_latest(), same(manager.load()[0], 10, ranks.rank)]
        manager._cleanup_failed_save(20)
        seen += [kept_by(manager), manager.find_latest()]
        manager.save(state_of(30, ranks.rank), 30)
        seen += [kept_by(manager), manager.find_latest(), same(manager.load()[0], 30, ranks.rank)]
        return seen

    message = (
        "the save failed on rank 1: checkpoint.in_memory_limit_gib: an in-memory checkpoint needs 0.010 GiB on this "
        "rank, and of the 0.006 GiB allowed 0.002 GiB are in use (iterations kept: 10)"
    )
    first, second = run_ranks(train, 2)
    assert first == [message, [(10, 0), (20, 0)], 10, True, [(10, 0)], 10, [(30, 0)], 30, True]
    assert second == [message, [(10, 1)], 10, True, [(10, 1)], 10, [(30, 1)], 30, True]


def test_a_run_may_go_back(session: str) -> None:
    manager = manager_of(session)
    save(manager, state_of(20), 20)
    save(manager, state_of(15), 15)
    assert kept_by(manager) == [(15, 0)], "a later one of an abandoned past never wins"
    manager._save(state_of(40), (40, 0, session))
    manager.latest_iteration = 40
    manager.forget_newer(15)
    assert (kept_by(manager), manager.latest_iteration) == ([(15, 0)], -1)
    manager.forget_newer(10)
    assert kept_by(manager) == []
    save(manager, state_of(11), 11)
    manager.forget_newer(-1)
    account = manager.keeper.stats()
    assert account is not None
    assert (kept_by(manager), account["total"]) == ([], 0)


def test_copies_of_a_peer_replace_a_lost_keeper(session: str) -> None:
    def replicated() -> InMemoryCheckpointManager:
        init_ranks()
        cliques = CliqueReplicationStrategy.from_replication_params(replication_jump=1, replication_factor=2)
        return manager_of(session, repl_strategy=cliques)

    def train_and_die() -> None:
        manager = replicated()
        rank = torch.distributed.get_rank()
        for iteration in (10, 20):
            manager.save(state_of(iteration, rank), iteration)
        torch.distributed.barrier()
        if rank == 1:
            account = manager.keeper.stats()
            assert account is not None
            psutil.Process(account["pid"]).kill()
        os.kill(os.getpid(), signal.SIGKILL)

    def resume() -> tuple[list[tuple[int, int]], int, bool, list[tuple[int, int]]]:
        manager = replicated()
        rank = torch.distributed.get_rank()
        kept, latest = kept_by(manager), manager.find_latest()
        restored = same(manager.load()[0], 20, rank)
        manager.save(state_of(30, rank), 30)
        return kept, latest, restored, kept_by(manager)

    with pytest.raises(RankError, match="killed by signal 9"):
        run_ranks(train_and_die, 2)
    both = [(30, 0), (30, 1)]
    assert run_ranks(resume, 2) == [([(20, 0), (20, 1)], 20, True, both), ([], 20, True, both)]


def test_a_keeper_that_dies_costs_one_snapshot_and_no_more(session: str) -> None:
    manager = manager_of(session)
    save(manager, state_of(10), 10)
    account = manager.keeper.stats()
    assert account is not None
    psutil.Process(account["pid"]).kill()
    manager.forget_newer(5)
    assert kept_by(manager) == []
    save(manager, state_of(20), 20)
    assert kept_by(manager) == [(20, 0)]
    assert same(manager._load((20, 0, session)), 20)


def test_the_settings_of_a_run(session: str) -> None:
    cfg = CheckpointConfig(in_memory_limit_gib=0.0625, in_memory_release_minutes=2.0)
    manager = make_in_memory_manager(cfg, session)
    settings = manager.keeper.settings
    assert (settings.limit, settings.idle_seconds, manager.repl_strategy) == (64 * MIB, 120.0, None)
    assert str(manager.snapshot_path(10)) == f"in-memory/{session}/0/iter_0000010"
    save(manager, state_of(10), 10)
    account = manager.keeper.stats()
    assert account is not None
    assert account["limit"] == 64 * MIB
    assert make_in_memory_manager(CheckpointConfig(), session).keeper.settings.limit is None
