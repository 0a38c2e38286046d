"""What a run that goes back leaves behind: a model of starts, and the file that remembers them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.starts import STARTS, Starts, read_starts, write_starts


@pytest.mark.parametrize(
    ("entries", "iteration", "start", "left_behind"),
    [
        ((), 10, 0, False),
        (((1, 0),), 10, 1, False),
        (((1, 0),), 10, 0, True),
        (((1, 0), (2, 4)), 7, 1, True),
        (((1, 0), (2, 4)), 4, 1, False),
        (((1, 0), (2, 7)), 7, 1, False),
        (((1, 0), (2, 4)), 7, 2, False),
        (((1, 0), (2, 4), (3, 9)), 9, 2, False),
        (((1, 0), (2, 4), (3, 9)), 8, 1, True),
    ],
)
def test_what_a_later_start_went_on_before_is_left_behind(
    entries: tuple[tuple[int, int], ...], iteration: int, start: int, left_behind: bool
) -> None:
    assert Starts(entries).have_left_behind(iteration, start) is left_behind


@given(resumed=st.lists(st.integers(0, 12), max_size=12), start=st.integers(0, 13), iteration=st.integers(0, 14))
def test_what_is_kept_of_the_starts_tells_as_much_as_all_of_them(
    resumed: list[int], start: int, iteration: int
) -> None:
    starts = Starts()
    numbered = []
    for at in resumed:
        numbered.append((starts.next, at))
        starts = starts.followed_by(starts.next, at)
    assert [number for number, _ in numbered] == list(range(1, len(resumed) + 1))
    assert starts.have_left_behind(iteration, start) is any(n > start and at < iteration for n, at in numbered)
    assert list(starts.entries) == sorted(starts.entries)
    assert len({at for _, at in starts.entries}) == len(starts.entries)


def test_a_directory_remembers_the_starts(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == Starts()
    starts = Starts().followed_by(1, 0).followed_by(2, 40)
    write_starts(tmp_path, starts)
    assert read_starts(tmp_path) == starts
    assert [entry.name for entry in tmp_path.iterdir()] == [STARTS]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"[[1]]", b'[["a", 2]]', b"\xff", b"[[1, Infinity]]", b"[" * 10**5]
)
def test_starts_that_cannot_be_read_are_none_and_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STARTS).write_bytes(content)
    assert read_starts(tmp_path) == Starts()
    assert f"{tmp_path / STARTS} cannot be read" in caplog.text
