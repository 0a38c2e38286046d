"""Tensors are read into place, whatever their target looks like, and only the bytes that are needed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError, UnsafeCheckpointError
from bridge.training.checkpointing.io import DirectReader, ReadOptions
from bridge.training.checkpointing.io.files import opened, read_each
from bridge.training.checkpointing.io.plan import Want
from bridge.training.checkpointing.io.reading import ReadStats, _Reading, read_wants

SMALL_BUFFERS = ReadOptions(memory=3 * 4096, threads=2)
"""So small that nearly everything is read in parts."""


class File:
    """A file of records, as torch DCP writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: list[tuple[int, int]] = []
        path.write_bytes(b"")

    def add(self, tensor: Any, write: Callable[[Any, Any], None] = torch.save) -> int:
        with self.path.open("ab") as file:
            begin = file.tell()
            write(tensor, file)
            self.places.append((begin, file.tell() - begin))
        return len(self.places) - 1

    def want(self, number: int, stored: torch.Tensor, target: torch.Tensor, box: Any = None) -> Want:
        at, length = self.places[number]
        return Want(f"tensor {number}", "a", at, length, stored.dtype, tuple(stored.shape), target, box)

    def read(self, *wants: Want, options: ReadOptions | None = None) -> ReadStats:
        return read_wants(wants, {"a": self.path}, options)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "a")


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """A stored tensor, a target, and the box that goes there."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 40, 130]), max_size=3)))
    first = tuple(draw(st.integers(0, max(0, n - 1))) for n in shape)
    lengths = tuple(draw(st.integers(0, n - start)) for n, start in zip(shape, first, strict=True))
    whole = draw(st.booleans())
    size = shape if whole else lengths
    stored = torch.randint(0, 2, shape).to(dtype) if dtype is torch.bool else torch.randn(shape).mul(50).to(dtype)
    other = draw(st.sampled_from([dtype, dtype, torch.float32, torch.float64]))
    target = torch.zeros(size, dtype=other)
    if draw(st.booleans()) and len(size) >= 2:
        target = torch.zeros(size[::-1], dtype=other).permute(*reversed(range(len(size))))
    elif draw(st.booleans()) and len(size) >= 1:
        target = torch.zeros((*size[:-1], size[-1] * 2 + 1), dtype=other)[..., 1::2]
    return stored, target, None if whole else (first, lengths)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cases(), min_size=1, max_size=6), st.sampled_from([None, SMALL_BUFFERS]))
def test_targets_of_every_kind_receive_what_was_stored(
    tmp_path: Path, given_cases: list[tuple[torch.Tensor, torch.Tensor, Any]], options: ReadOptions | None
) -> None:
    file = File(tmp_path / "a")
    wants = [file.want(file.add(stored), stored, target, box) for stored, target, box in given_cases]
    stats = file.read(*reversed(wants), options=options)
    assert stats.by_torch == 0
    for stored, target, box in given_cases:
        part = stored if box is None else stored[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))]
        assert torch.equal(target, part.to(target.dtype))


LARGE = [
    pytest.param((600, 1000), None, id="whole"),
    pytest.param((600, 1000), ((0, 500), (600, 500)), id="half of every row"),
    pytest.param((100, 16384), ((0, 2048), (100, 2048)), id="an eighth of every row"),
    pytest.param((600, 1000), ((75, 0), (75, 1000)), id="an eighth of the rows"),
    pytest.param((40, 20, 1500), ((3, 5, 100), (30, 10, 1200)), id="three dimensions"),
    pytest.param((300_000, 2), ((0, 1), (300_000, 1)), id="a narrow column"),
]


@pytest.mark.parametrize("options", [None, SMALL_BUFFERS, ReadOptions(threads=1)], ids=["default", "small", "1 thread"])
@pytest.mark.parametrize(("shape", "box"), LARGE)
@pytest.mark.parametrize("kind", ["plain", "transposed", "double"])
def test_large_tensors_are_read_in_parts(
    file: File, shape: tuple[int, ...], box: Any, kind: str, options: ReadOptions | None
) -> None:
    stored = torch.rand(shape)
    size = shape if box is None else box[1]
    target = torch.zeros(size, dtype=torch.float64 if kind == "double" else torch.float32)
    if kind == "transposed":
        target = torch.zeros(size[::-1]).permute(*reversed(range(len(size))))
    stats = file.read(file.want(file.add(stored), stored, target, box), options=options)
    part = stored if box is None else stored[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))]
    assert torch.equal(target, part.to(target.dtype))
    assert (stats.tensors, stats.by_torch, stats.needed) == (1, 0, part.numel() * 4)


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        pytest.param((4096, 1024), ((512, 0), (512, 1024)), id="rows"),
        pytest.param((512, 16384), ((0, 2048), (512, 2048)), id="columns"),
        pytest.param((64, 64, 4096), ((0, 8, 0), (64, 8, 4096)), id="the middle dimension"),
    ],
)
def test_a_slice_costs_its_own_bytes(file: File, shape: tuple[int, ...], box: Any) -> None:
    """An eighth of a tensor: torch's reader would read eight times as much."""
    stored = torch.empty(shape).uniform_()
    stats = file.read(file.want(file.add(stored), stored, torch.empty(box[1]), box))
    assert stats.needed * 8 == stored.numel() * 4
    assert stats.read + stats.framing <= 1.05 * stats.needed


def test_small_tensors_are_read_with_what_stands_between_them(file: File) -> None:
    tensors = [torch.full((64,), float(number)) for number in range(500)]
    targets = [torch.zeros(64) for _ in tensors]
    wants = [file.want(file.add(tensor), tensor, target) for tensor, target in zip(tensors, targets, strict=True)]
    stats = file.read(*wants)
    assert all(map(torch.equal, targets, tensors))
    assert stats.read + stats.framing == file.path.stat().st_size


def test_reading_raises_the_version_of_what_it_changes(file: File) -> None:
    stored, target = torch.rand(10), torch.zeros(10, requires_grad=True)
    square = target.square().sum()
    file.read(file.want(file.add(stored), stored, target))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda t, f: torch.save(t.t().contiguous().t(), f), id="not contiguous"),
        pytest.param(lambda t, f: torch.save(t, f, _use_new_zipfile_serialization=False), id="the form before zip"),
        pytest.param(lambda t, f: torch.save(torch.nn.Parameter(t), f), id="a parameter"),
    ],
)
@pytest.mark.parametrize("shape", [(8, 6), (500, 300)], ids=["small", "large"])
def test_what_is_not_recognised_is_read_by_torch(file: File, write: Any, shape: tuple[int, int]) -> None:
    stored = torch.rand(shape)
    other = torch.rand(8)
    numbers = file.add(other), file.add(stored, write), file.add(other)
    targets = torch.zeros(8), torch.zeros(3, 2), torch.zeros(8)
    box = ((2, 1), (3, 2))
    stats = file.read(
        file.want(numbers[0], other, targets[0]),
        file.want(numbers[1], stored, targets[1], box),
        file.want(numbers[2], other, targets[2]),
    )
    assert stats.by_torch == 1
    assert torch.equal(targets[1], stored[2:5, 1:3])
    assert torch.equal(targets[0], other) and torch.equal(targets[2], other)


@pytest.mark.parametrize("shape", [(16,), (400, 400)], ids=["small", "large"])
class TestDamage:
    def test_a_file_that_ends_early(self, file: File, shape: tuple[int, ...]) -> None:
        stored = torch.rand(shape)
        number = file.add(stored)
        os.truncate(file.path, file.path.stat().st_size // 2)
        with pytest.raises(CheckpointDamagedError, match=re.escape(f"{file.path} ends at byte")):
            file.read(file.want(number, stored, torch.zeros(shape)))

    def test_a_file_that_is_absent(self, file: File, shape: tuple[int, ...]) -> None:
        stored = torch.rand(shape)
        number = file.add(stored)
        file.path.unlink()
        with pytest.raises(CheckpointDamagedError, match=re.escape(f"{file.path} cannot be read: No such file")):
            file.read(file.want(number, stored, torch.zeros(shape)))

    def test_a_directory_in_its_place(self, file: File, shape: tuple[int, ...]) -> None:
        """The one error of storage that can be had without broken hardware: EISDIR, from the read itself."""
        stored = torch.rand(shape)
        number = file.add(stored)
        file.path.unlink()
        file.path.mkdir()
        with pytest.raises(CheckpointDamagedError, match=re.escape(f"{file.path} cannot be read: Is a directory")):
            file.read(file.want(number, stored, torch.zeros(shape)))

    def test_zeros_in_place_of_a_record(self, file: File, shape: tuple[int, ...]) -> None:
        stored = torch.rand(shape)
        number = file.add(stored)
        file.path.write_bytes(bytes(file.path.stat().st_size))
        with pytest.raises(CheckpointDamagedError, match=re.escape(f"{file.path} (tensor 0) is not a readable tensor")):
            file.read(file.want(number, stored, torch.zeros(shape)))

    def test_another_tensor(self, file: File, shape: tuple[int, ...]) -> None:
        number = file.add(torch.rand(7, 7, 1000 if len(shape) > 1 else 1))
        with pytest.raises(CheckpointDamagedError, match=re.escape("(tensor 0) holds [7, 7, ")):
            file.read(file.want(number, torch.rand(shape), torch.zeros(shape)))

    def test_something_that_runs_code(self, file: File, shape: tuple[int, ...]) -> None:
        class Harm:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(file.path) + ".ran",)

        number = file.add([Harm(), torch.rand(shape)])
        with pytest.raises(UnsafeCheckpointError, match="tries to run code"):
            file.read(file.want(number, torch.rand(shape), torch.zeros(shape)))
        assert not Path(f"{file.path}.ran").exists()


class Elsewhere:
    """Something that is read as a file is, and is none."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, into: memoryview, at: int) -> None:
        into[:] = self.data[at : at + len(into)]


@pytest.mark.parametrize("kind", ["file", "elsewhere"])
def test_short_runs_are_read_one_by_one(tmp_path: Path, kind: str) -> None:
    data = bytes(range(200))
    (tmp_path / "a").write_bytes(data)
    into = bytearray(12)
    with opened({"a": tmp_path / "a" if kind == "file" else Elsewhere(data)}) as files:
        read_each(files["a"], memoryview(into), 4, [190, 3, 100])
    assert bytes(into) == data[190:194] + data[3:7] + data[100:104]


def test_threads_take_turns_for_short_reads_until_storage_is_slow(tmp_path: Path) -> None:
    reading = _Reading(ReadOptions(), [torch.device("cpu")])
    (tmp_path / "a").write_bytes(b"a")
    with opened({"a": tmp_path / "a"}) as files:
        file = files["a"]

        def holds_turn(*some: Any) -> bool:
            with reading._turn_for(*some):
                return reading._turn.locked()

        assert holds_turn(file, 1000, 100)
        assert not reading._turn.locked()
        others = [(file, 10, 100), (file, 1000, 1 << 20), (Elsewhere(b""), 1000, 100)]
        assert [holds_turn(*some) for some in others] == [False, False, False]
        with pytest.raises(ValueError, match="lost"), reading._turn_for(file, 1000, 100):
            raise ValueError("lost")
        assert not reading._turn.locked()
        with reading._turn_for(file, 1000, 100):
            assert holds_turn(file, 1000, 100), "the other one's; this one goes on without it"
        assert not holds_turn(file, 1000, 100), "nobody waits for turns any more"


def test_a_run_beyond_the_end_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(20))
    with opened({"a": path}) as files, pytest.raises(CheckpointDamagedError, match=f"^{re.escape(str(path))} ends at"):
        read_each(files["a"], memoryview(bytearray(8)), 4, [0, 18])
    path.unlink()
    path.mkdir()
    with opened({"a": path}) as files, pytest.raises(CheckpointDamagedError, match="cannot be read: Is a directory"):
        read_each(files["a"], memoryview(bytearray(8)), 4, [0, 18])


def test_a_record_of_no_length_is_damage(file: File) -> None:
    """An empty tensor needs no bytes, so nothing but the record itself can tell."""
    file.add(torch.zeros(0))
    file.places.append((0, 0))
    with pytest.raises(CheckpointDamagedError, match="is not a readable tensor"):
        file.read(file.want(1, torch.zeros(0), torch.zeros(0)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_garbled_files_raise_typed_errors_or_are_read(tmp_path: Path, data: st.DataObject) -> None:
    file, stored = File(tmp_path / "a"), torch.arange(40, dtype=torch.int32).view(5, 8)
    numbers = [file.add(stored) for _ in range(3)]
    content = bytearray(file.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    guard = torch.full((9, 8), 7, dtype=torch.int32)
    with contextlib.suppress(CheckpointError):
        file.read(*(file.want(number, stored, guard[2:7]) for number in numbers))
    assert torch.all(guard[:2] == 7) and torch.all(guard[7:] == 7), "nothing beside the target is written"


def state() -> dict[str, Any]:
    storage = torch.rand(4000)
    return {
        "large": torch.rand(700, 300),
        "nested": {"bf16": torch.rand(33, 5).bfloat16(), "list": [torch.tensor(3), torch.rand(0, 2)]},
        "view": storage[100:200],
        "transposed": torch.rand(20, 30).t(),
        "bool": torch.rand(9) > 0.5,
        "fp8": torch.rand(16, 16).to(torch.float8_e5m2),
        "step": 17,
        "note": "text",
    }


def empty_like(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: empty_like(each) for key, each in value.items()}
    if isinstance(value, list):
        return [empty_like(each) for each in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("files", [1, 3])
def test_torch_dcp_reads_through_it(tmp_path: Path, files: int) -> None:
    saved = state()
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=files == 1, thread_count=files)
    dcp.save(saved, storage_writer=writer, no_dist=True)
    expected, found = empty_like(saved), empty_like(saved)
    dcp.load(expected, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    reader = DirectReader(tmp_path)
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert same(found, expected)
    assert same(found, saved)
    assert (reader.stats.tensors, reader.stats.by_torch) == (7, 1)  # nothing is read for the empty one


def test_torch_dcp_loads_a_part_through_it(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path, no_dist=True)
    found = {"view": torch.zeros(100), "absent": torch.zeros(2)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(found, storage_reader=DirectReader(tmp_path), planner=planner, no_dist=True)
    assert found["view"].all()
    assert not found["absent"].any()


def test_metadata_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    dcp.save({"a": torch.rand(4)}, checkpoint_id=directory, no_dist=True)
    (directory / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (directory / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"a": torch.zeros(4)}, storage_reader=DirectReader(directory), no_dist=True)
    assert isinstance(caught.value.failures[0][0], UnsafeCheckpointError)


class Exploit:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_torch_dcp_runs_nothing_through_it(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    dcp.save({"object": Exploit(trap)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(CheckpointException, match="tries to run code when it is loaded"):
        dcp.load({"object": None}, storage_reader=DirectReader(tmp_path / "saved"), no_dist=True)
    assert not trap.exists()
