"""The rules of a keeper's buffers, and of how much memory they may take, without a process around them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.training.checkpointing.tiers.memory import host_memory
from bridge.training.checkpointing.tiers.memory.keeper_process import GRANULE, Buffer, Connection, Refused, Shelf

MIB = 1 << 20
WRITER, OTHER = (Connection(socket.socket(), 0) for _ in range(2))


class TestShelf:
    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        shelf = Shelf(limit=5 * GRANULE)
        yield shelf
        shelf.clear()

    def put(self, shelf: Shelf, iteration: int, size: int = 100, owner: int = 0) -> Buffer:
        buffer = shelf.begin(owner, iteration, size, WRITER)
        shelf.commit(buffer, size, 0)
        return buffer

    def test_the_next_snapshot_takes_the_memory_of_the_one_dropped(self, shelf: Shelf) -> None:
        first = self.put(shelf, 1)
        second = self.put(shelf, 2)
        shelf.drop(lambda iteration: iteration < 2)
        assert self.put(shelf, 3) is first
        shelf.drop(lambda iteration: iteration < 3)
        assert self.put(shelf, 4) is second

    def test_a_snapshot_takes_the_place_of_one_of_the_same_iteration(self, shelf: Shelf) -> None:
        self.put(shelf, 1, owner=0)
        other = self.put(shelf, 1, owner=1)
        again = self.put(shelf, 1, owner=0)
        assert shelf.in_state(Buffer.KEPT) == [other, again]

    def test_each_snapshot_kept_has_one_buffer_in_reserve(self, shelf: Shelf) -> None:
        for iteration in range(4):
            self.put(shelf, iteration)
        shelf.drop(lambda iteration: iteration < 3)
        assert [len(shelf.in_state(state)) for state in (Buffer.KEPT, Buffer.FREE)] == [1, 1]
        shelf.drop(lambda iteration: True)
        assert shelf.buffers == {}

    def test_reserves_give_way_to_what_does_not_fit_them(self, shelf: Shelf) -> None:
        self.put(shelf, 1)
        self.put(shelf, 2)
        shelf.drop(lambda iteration: iteration < 2)
        large = self.put(shelf, 3, size=4 * GRANULE - MIB)
        assert [large.capacity, shelf.bytes_in(*Buffer.STATES)] == [4 * GRANULE, 5 * GRANULE]

    def test_the_limit_counts_what_is_written_kept_and_read(self, shelf: Shelf) -> None:
        kept = self.put(shelf, 1)
        kept.readers.add(WRITER)
        shelf.drop(lambda iteration: True)
        self.put(shelf, 2)
        shelf.begin(0, 3, 100, WRITER)
        with pytest.raises(Refused) as refusal:
            shelf.begin(1, 3, 3 * GRANULE - MIB, WRITER)
        assert refusal.value.reply == {
            "error": "limit",
            "needed": 3 * GRANULE,
            "used": 3 * GRANULE,
            "allowed": 5 * GRANULE,
            "kept": [2],
        }

    def test_beginning_again_gives_up_what_the_same_process_had_begun(self, shelf: Shelf) -> None:
        first = shelf.begin(0, 1, 100, WRITER)
        assert shelf.begin(0, 2, 100, WRITER) is first
        assert shelf.begin(0, 2, 100, OTHER) is not first

    def test_a_writer_that_is_gone_takes_its_buffer_along(self, shelf: Shelf) -> None:
        shelf.begin(0, 1, 100, WRITER)
        mine = shelf.begin(0, 1, 100, OTHER)
        shelf.forget(WRITER)
        assert list(shelf.buffers.values()) == [mine]


@pytest.mark.parametrize(
    ("available", "left", "ranks", "expected"),
    [
        (100, None, 1, 50),
        (100, 60, 1, 30),
        (100, 1000, 4, 12),
        (100, -5, 2, 0),
        (100, None, 0, 50),
    ],
)
def test_a_ranks_share_of_memory(available: int, left: int | None, ranks: int, expected: int) -> None:
    assert host_memory.share(available, left, ranks) == expected


def test_control_groups_limit_the_share(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    inner = root / "jobs" / "mine"
    inner.mkdir(parents=True)
    membership.write_text("0::/jobs/mine\n")
    assert host_memory.cgroup_bytes_left(membership, root) is None
    for directory, limit, usage in ((inner, "max", 10), (inner.parent, "1000", 300), (root, "5000", 600)):
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{usage}\n")
    assert host_memory.cgroup_bytes_left(membership, root) == 700
    first = root / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("900\n")
    (first / "memory.usage_in_bytes").write_text("450\n")
    membership.write_text("4:cpu,memory:/elsewhere\n3:pids:/x\n")
    assert host_memory.cgroup_bytes_left(membership, root) == 450
    assert host_memory.cgroup_bytes_left(tmp_path / "absent", root) is None
    assert host_memory.share_of_this_rank() > 0
