"""Which checkpoints are uploaded, in which order, and when the trackers move. Tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.objects.backlog import Sides, to_upload, tracker_target, unneeded, wait_after
from bridge.training.checkpointing.objects.transfer import MIB, TransferOptions, may_pass, parts_of
from bridge.training.checkpointing.retention.policies import MostRecent
from bridge.training.object_url import ObjectUrl, is_url


def manifests(created: dict[int, float], start: int = 0) -> dict[int, Manifest]:
    return {n: Manifest(n, "torch_dist", 1, {}, {}, (), created=at, start=start) for n, at in created.items()}


@pytest.mark.parametrize(
    ("local", "remote", "tracked", "keep", "expected"),
    [
        ({}, {}, None, None, []),
        ({10: 1, 20: 2, 30: 3}, {}, 30, None, [30, 20, 10]),
        ({10: 1, 20: 2, 30: 3}, {10: 1, 20: 2}, 30, None, [30]),
        ({10: 1, 20: 2}, {10: 1, 20: 2}, 20, None, []),
        # What the bucket has of an iteration is not replaced by what an earlier start left, if that may be older.
        ({10: 1, 20: 2}, {20: 3}, 20, None, [10]),
        # Gone back from 30 to 10: the new 20 is the most urgent, and another one than that in the bucket.
        ({10: 1, 20: 4, 30: 3}, {10: 1, 20: 2}, 20, None, [20, 30]),
        # What the bucket would let go at once is not sent.
        ({10: 1, 20: 2, 30: 3}, {}, 30, 1, [30]),
        ({10: 1, 20: 2}, {30: 3}, 20, 1, [20]),
    ],
)
def test_the_backlog(
    local: dict[int, float], remote: dict[int, float], tracked: int | None, keep: int | None, expected: list[int]
) -> None:
    policies = [] if keep is None else [MostRecent(keep)]
    assert to_upload(Sides(manifests(local), tracked, (), manifests(remote)), policies) == expected


@pytest.mark.parametrize(
    ("local", "tracked", "published", "remote", "remote_tracked", "has_tracker", "expected"),
    [
        ({10: 1.0}, 10, (), {}, None, False, 10),
        # A tracker that names what is no checkpoint of ours stays, until this start has saved one.
        ({10: 1.0}, 10, (), {}, None, True, None),
        ({10: 1.0}, 10, (10,), {}, None, True, 10),
        # Left by an earlier start: only if it is later.
        ({30: 1.0}, 30, (), {50: 2.0}, 50, True, None),
        ({60: 1.0}, 60, (), {50: 2.0}, 50, True, None),
        ({60: 3.0}, 60, (), {50: 2.0}, 50, True, 60),
        # A rollback, saved by this start, and a clock that was set back.
        ({20: 1.0}, 20, (20,), {50: 2.0}, 50, True, 20),
        # Never to what the directory's tracker does not name.
        ({20: 9.0, 30: 1.0}, 30, (20, 30), {20: 9.0}, 20, True, 30),
        ({20: 9.0}, 30, (20,), {10: 1.0}, 10, True, None),
    ],
)
def test_where_the_trackers_go(
    local: dict[int, float],
    tracked: int,
    published: tuple[int, ...],
    remote: dict[int, float],
    remote_tracked: int | None,
    has_tracker: bool,
    expected: int | None,
) -> None:
    sides = Sides(manifests(local), tracked, published, manifests(remote), remote_tracked, has_tracker)
    assert tracker_target(sides) == expected


def test_a_later_start_is_not_replaced_by_an_earlier_one_whatever_the_clock_says() -> None:
    sides = Sides(manifests({20: 9.0}, start=1), 20, (), manifests({20: 2.0}, start=2), 20, True)
    assert to_upload(sides, []) == []
    assert to_upload(replace(sides, published=(20,)), []) == [20]


def test_what_the_bucket_would_delete_at_once_is_not_needed_there() -> None:
    sides = Sides(manifests({10: 1.0, 20: 2.0}), 20, (10, 20))
    assert unneeded(sides, [MostRecent(1)]) == {10}
    assert unneeded(sides, []) == set()


def test_waits_grow_to_ten_minutes() -> None:
    assert [wait_after(n) for n in (1, 2, 3, 7, 100)] == [10.0, 20.0, 40.0, 600.0, 600.0]
    options = TransferOptions(tries=3, first_wait=1.0, longest_wait=1.5)
    assert [options.wait_before(n, 1.0) for n in (1, 2, 3)] == [1.0, 1.5, None]


def test_parts_of_a_file() -> None:
    assert parts_of(0, 4) == []
    assert parts_of(10, 4) == [(0, 4), (4, 4), (8, 2)]
    options = TransferOptions()
    assert options.part_size(1) == 32 * MIB
    assert len(parts_of(5 << 40, options.part_size(5 << 40))) <= 10_000


def test_what_may_pass() -> None:
    assert [may_pass(status, "") for status in (0, 408, 429, 500, 503)] == [True] * 5
    assert [may_pass(status, "") for status in (301, 400, 403, 404, 412)] == [False] * 5
    assert may_pass(400, "RequestTimeout")


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [("s3://abc", "abc", ""), ("s3://abc/", "abc", ""), ("s3://abc/x/y/", "abc", "x/y")],
)
def test_urls(text: str, bucket: str, prefix: str) -> None:
    url = ObjectUrl.parse(text)
    assert url == ObjectUrl(bucket, prefix)
    assert ObjectUrl.parse(str(url)) == url
    assert url.key("a", "b") == (f"{prefix}/a/b" if prefix else "a/b")
    assert url / "a" == ObjectUrl(bucket, f"{prefix}/a" if prefix else "a")


@pytest.mark.parametrize("text", ["s3://", "s3:///x", "s3://A/x", "s3://abc//x", "s3://abc/../x", "s3://abc/x?y", "x"])
def test_what_is_no_url_of_a_bucket(text: str) -> None:
    with pytest.raises(ValueError, match=r"has |does not begin"):
        ObjectUrl.parse(text)


def test_directories_are_no_urls() -> None:
    assert [is_url(text) for text in (None, "/a/b", "a:b", "s3:/a", "gs://a", "s3://a")] == [False] * 4 + [True] * 2
