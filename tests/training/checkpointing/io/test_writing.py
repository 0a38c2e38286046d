"""Files that are written straight from tensors' memory: at once, or from a copy by the writer process."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.training.checkpointing import checksums, liveness
from bridge.training.checkpointing.background import ForkedCall
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats.direct import DirectWrite
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io import background_writer
from bridge.training.checkpointing.io.background_writer import BackgroundWriter, Files, Patience, Writing
from bridge.training.checkpointing.io.framing import Frames
from bridge.training.checkpointing.io.host_image import HostImage
from bridge.training.checkpointing.io.image import FileContents, FileImage, is_usual, lay_out, results_of
from bridge.training.checkpointing.io.output import BLOCK
from bridge.training.checkpointing.io.writer_process import ROW, rows_of
from bridge.training.checkpointing.io.writing import write_images
from bridge.training.checkpointing.tiers.memory.host_memory import available_bytes
from tests.training.checkpointing.io.test_record import DTYPES, values

FRAMES = Frames()


class Odd(torch.Tensor):
    """A kind of tensor that is left to torch."""


def some_tensors() -> dict[str, torch.Tensor]:
    """Tensors of all kinds."""
    whole = torch.arange(240, dtype=torch.float32).view(4, 6, 10)
    tensors = {str(dtype): values(dtype, (3, 5)) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "view": whole[1:3],
        "columns": whole[:, 2, ::3],
        "transposed": whole.transpose(0, 2),
        "expanded": torch.tensor([1.0]).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "odd": torch.ones(2, 2).as_subclass(Odd),
        "large": torch.arange(BLOCK // 2, dtype=torch.int32),
        "large columns": torch.arange(BLOCK, dtype=torch.int32).view(2, -1).t(),
    }


def image_of(tensors: dict[str, torch.Tensor], name: str = "file", objects: tuple[bytes, ...] = ()) -> FileImage:
    numbered = [(f"object.{number}", data) for number, data in enumerate(objects)]
    return lay_out(FileContents(name, list(tensors.items()), numbered), FRAMES)


def assert_holds(directory: Path, image: FileImage, tensors: dict[str, torch.Tensor]) -> None:
    """torch loads every record of a file."""
    data = (directory / image.name).read_bytes()
    places = {result.index: result.storage_data for result in image.results()}
    assert places.keys() >= tensors.keys()
    for key, tensor in tensors.items():
        place = places[key]
        assert place.relative_path == image.name
        (directory / "record").write_bytes(data[place.offset : place.offset + place.length])
        loaded = torch.load(directory / "record", weights_only=key != "odd")
        assert loaded.dtype == tensor.dtype, key
        assert loaded.shape == tensor.shape, key
        assert loaded.dequantize().equal(tensor.dequantize()) if tensor.is_quantized else same(loaded, tensor), key


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether bits are equal: not-a-number is not equal to itself."""
    raw = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for tensor in (first, second)]
    return not first.numel() or torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in raw))


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    made = BackgroundWriter()
    yield made
    made.close()


def begin(writer: BackgroundWriter, directory: Path, images: list[FileImage], **patience: Any) -> Writing[Any]:
    small = [("notes", b"small"), ("below/notes", b"likewise")]
    files = Files(images, small, directory, "xxh3")
    writing = writer.write(files, "the writer", Patience(**patience), lambda records, seconds: records)
    assert writing is not None
    return writing


@pytest.mark.parametrize("kind", checksums.KINDS)
def test_every_kind_of_tensor_is_what_torch_loads(tmp_path: Path, kind: str) -> None:
    tensors = some_tensors()
    image = image_of(tensors, objects=(b"an object", b""))
    (record,) = write_images([image], tmp_path, kind)
    assert record == FileRecord.of(tmp_path, "file", kind)
    assert_holds(tmp_path, image, tensors)


def test_the_writer_process_writes_the_same_file(tmp_path: Path, writer: BackgroundWriter) -> None:
    tensors = some_tensors()
    image = image_of(tensors, objects=(b"an object",))
    expected = write_images([image], tmp_path, "xxh3")
    directory = tmp_path / "background"
    directory.mkdir()
    records = begin(writer, directory, [image]).result()
    small = [FileRecord.of(directory, name) for name in ("notes", "below/notes")]
    assert records == [*expected, *small]
    assert (directory / "file").read_bytes() == (tmp_path / "file").read_bytes()
    assert (directory / "below" / "notes").read_bytes() == b"likewise"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_states_are_what_torch_loads(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    directory = tmp_path_factory.mktemp("random")
    tensors = {}
    for number in range(data.draw(st.integers(0, 12))):
        dtype, shape = data.draw(st.sampled_from(DTYPES)), data.draw(st.lists(st.integers(0, 40), max_size=3))
        tensor = values(dtype, tuple(shape))
        if shape and data.draw(st.booleans()):
            tensor = tensor.transpose(0, len(shape) - 1)[: data.draw(st.integers(0, shape[-1]))]
        tensors[f"tensor.{number}"] = tensor
    image = image_of(tensors, objects=tuple(data.draw(st.lists(st.binary(max_size=300), max_size=3))))
    write_images([image], directory, "crc32")
    assert_holds(directory, image, tensors)


def test_several_files_are_written_at_once(tmp_path: Path, writer: BackgroundWriter) -> None:
    images = [image_of({"a": torch.rand(BLOCK // 4 + n)}, f"file.{n}") for n in range(6)]
    records = write_images(images, tmp_path, "xxh3")
    assert [record.name for record in records] == [f"file.{n}" for n in range(6)]
    assert len(results_of(images)) == 6
    (tmp_path / "background").mkdir()
    assert begin(writer, tmp_path / "background", images).result()[:6] == records


def test_a_snapshot_holds_what_there_was(tmp_path: Path, writer: BackgroundWriter) -> None:
    tensors = {"small": torch.ones(5), "large": torch.ones(BLOCK), "columns": torch.ones(8, 8)[:, 1]}
    image = image_of(tensors)
    writing = begin(writer, tmp_path, [image])
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.fill_(7.0)
    writing.result()
    assert_holds(tmp_path, image, before)


def test_memory_and_process_serve_again(tmp_path: Path, writer: BackgroundWriter) -> None:
    tensors = {"a": torch.zeros(1 << 20), "b": torch.zeros(100)}
    seen = set()
    for number in range(12):
        for tensor in tensors.values():
            tensor.fill_(number)
        # Objects grow and shrink, and the tensors stay where they are.
        image = image_of(tensors, objects=(b"x" * (number * 50),))
        begin(writer, tmp_path, [image]).result()
        seen.add((writer.pid, writer.memory, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
        assert_holds(tmp_path, image, tensors)
    assert len({pid for pid, *_ in seen}) == 1
    assert {memory for _, memory, _ in seen} == {6 << 20}


def test_another_structure_takes_the_place_of_the_one_before(tmp_path: Path, writer: BackgroundWriter) -> None:
    for tensors in ({"a": torch.ones(1000)}, {"a": torch.ones(10, 3), "b": torch.ones(1 << 20)}, {"c": torch.ones(7)}):
        image = image_of(tensors)
        directory = tmp_path / "-".join(tensors)
        directory.mkdir()
        begin(writer, directory, [image]).result()
        assert_holds(directory, image, tensors)
        expected = write_images([image], tmp_path, "xxh3")[0]
        assert FileRecord.of(directory, "file") == expected


def test_a_file_that_cannot_be_made_is_an_error(tmp_path: Path, writer: BackgroundWriter) -> None:
    image = image_of({"a": torch.ones(3)})
    (tmp_path / "file").mkdir()
    message = f"writing {tmp_path}/file failed: IsADirectoryError: [Errno 21] Is a directory"
    with pytest.raises(CheckpointSaveError) as caught:
        write_images([image], tmp_path, "xxh3")
    assert str(caught.value).startswith(message)
    writing = begin(writer, tmp_path, [image])
    with pytest.raises(CheckpointSaveError) as caught:
        writing.result()
    assert str(caught.value).startswith(f"the process of the writer failed: CheckpointSaveError: {message}")
    assert isinstance(caught.value.__cause__.__cause__, OSError)  # type: ignore[union-attr]
    (tmp_path / "file").rmdir()
    begin(writer, tmp_path, [image]).result()


LIMIT = (resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
"""No file may be larger than 8 MiB."""


def test_storage_that_takes_no_more_is_an_error(tmp_path: Path) -> None:
    image = image_of({"a": torch.ones(4 << 20)})

    def write() -> None:
        resource.setrlimit(*LIMIT)
        write_images([image], tmp_path, "xxh3")

    with pytest.raises(CheckpointSaveError, match=rf"writing {tmp_path}/file failed: OSError: \[Errno 27\] File too l"):
        ForkedCall(write, "what runs out of room").result()


def test_storage_that_takes_no_more_is_an_error_of_the_writer_process(tmp_path: Path, writer: BackgroundWriter) -> None:
    writer.warm(17 << 20, wait=True)
    assert writer.pid is not None
    resource.prlimit(writer.pid, *LIMIT)
    with pytest.raises(CheckpointSaveError, match=rf"writing {tmp_path}/file failed: OSError: \[Errno 27\] File too l"):
        begin(writer, tmp_path, [image_of({"a": torch.ones(4 << 20)})]).result()


def test_storage_that_fails_is_tried_again(tmp_path: Path, writer: BackgroundWriter) -> None:
    (tmp_path / "file").mkdir()
    image = image_of({"a": torch.ones(3)})
    writing = begin(writer, tmp_path, [image], waits=(0.0, 0.3))
    while writing._tries < 3:
        writing.poll(0.05)
    (tmp_path / "file").rmdir()
    assert writing.result()[0] == FileRecord.of(tmp_path, "file")

    (tmp_path / "below" / "notes").unlink()
    (tmp_path / "below" / "notes").mkdir()
    with pytest.raises(CheckpointSaveError, match=r"Is a directory.*, in each of 2 tries$"):
        begin(writer, tmp_path, [image], waits=(0.0,)).result()


def held(writer: BackgroundWriter, directory: Path, **patience: Any) -> Writing[Any]:
    """A writing whose process is stopped before it has begun."""
    begin(writer, directory, [image_of({"a": torch.ones(3)})]).result()
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGSTOP)
    return begin(writer, directory, [image_of({"a": torch.ones(3)})], **patience)


def test_a_killed_process_is_noticed_and_replaced(tmp_path: Path, writer: BackgroundWriter) -> None:
    writing = held(writer, tmp_path)
    assert not writing.poll()
    os.kill(writing.pid, signal.SIGKILL)
    with pytest.raises(CheckpointSaveError, match=r"^the process of the writer was killed by SIGKILL$"):
        writing.result()
    begin(writer, tmp_path, [image_of({"a": torch.ones(4)})]).result()
    assert writer.pid != writing.pid


def test_a_stopped_process_is_ended_and_replaced(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.1)
    writing = held(writer, tmp_path, stall_seconds=0.5)
    with pytest.raises(CheckpointSaveError, match=r"is held by a signal and has done nothing for 0\.5 s, so it was"):
        writing.result()
    assert not psutil.pid_exists(writing.pid)
    begin(writer, tmp_path, [image_of({"a": torch.ones(4)})]).result()


def test_kill_ends_it_at_once(tmp_path: Path, writer: BackgroundWriter) -> None:
    writing = held(writer, tmp_path)
    writing.kill()
    assert writing.poll()
    assert not psutil.pid_exists(writing.pid)


def test_there_is_no_second_snapshot_while_one_is_written(tmp_path: Path, writer: BackgroundWriter) -> None:
    writing = held(writer, tmp_path)
    files = Files([image_of({"a": torch.ones(3)})], [], tmp_path, "xxh3")
    assert writer.write(files, "another", Patience(), lambda records, seconds: records) is None
    os.kill(writing.pid, signal.SIGCONT)
    writing.result()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_process_ends_with_its_trainer(tmp_path: Path, is_stopped: bool) -> None:
    image = image_of({"a": torch.arange(1 << 20)})
    directory = tmp_path / "background"
    directory.mkdir()

    def train() -> int:
        writing = held(BackgroundWriter(), directory) if is_stopped else None
        if writing is None:
            writing = begin(BackgroundWriter(), directory, [image])
        return writing.pid

    pid = ForkedCall(train, "trainer").result()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_signals_for_the_job_are_left_to_the_trainer(tmp_path: Path, writer: BackgroundWriter) -> None:
    writing = held(writer, tmp_path)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(writing.pid, number)
    os.kill(writing.pid, signal.SIGCONT)
    assert writing.result()[0] == FileRecord.of(tmp_path, "file")


def test_the_process_has_no_torch(tmp_path: Path, writer: BackgroundWriter) -> None:
    writing = begin(writer, tmp_path, [image_of({"a": torch.ones(3)})])
    maps = Path(f"/proc/{writing.pid}/maps").read_text()
    writing.result()
    assert "torch" not in maps


@pytest.mark.parametrize("count", [40, 400])
def test_objects_that_grow_and_shrink_spoil_no_tensor(tmp_path: Path, writer: BackgroundWriter, count: int) -> None:
    for number, size in enumerate((1000, 1000, 5100, 9000, 90_000, 1000, 0)):
        tensors = {str(place): torch.full((100,), float(number + place)) for place in range(count)}
        image = image_of(tensors, objects=(b"o" * size,))
        directory = tmp_path / f"background {number}"
        directory.mkdir()
        (record, *_) = begin(writer, directory, [image]).result()
        assert record == write_images([image], tmp_path, "xxh3")[0]
        data = (directory / "file").read_bytes()
        assert data == (tmp_path / "file").read_bytes()
        for part in image.tensors:
            with zipfile.ZipFile(io.BytesIO(data[part.at : part.at + part.frame.length])) as archive:
                assert archive.testzip() is None
    assert writer.memory == 2 << 20


def a_row(payload: int, size: int) -> bytes:
    return ROW.pack(payload, size, 0, 0, 16, 200, 100, 130, 240)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((a_row(64, 400), a_row(800, 400)), None),
        ((a_row(64, 400), a_row(700, 400)), r"row 1 of 2, 700\.\.1344, does not fit between 708 and 1500"),
        ((a_row(0, 0), a_row(0, 0)), None),
        ((a_row(64, 400), a_row(800, 460)), r"row 1 of 2, 800\.\.1504, does not fit between 708 and 1500"),
        ((a_row(64, 400), a_row(1 << 63, 0)), "row 1 of 2"),
        ((a_row(64, 400),), "2 rows do not lie in the memory as a whole"),
    ],
)
def test_rows_that_describe_no_file_are_refused(rows: tuple[bytes, ...], message: str | None) -> None:
    memory = memoryview(b"".join(rows))
    if message is None:
        assert len(rows_of(memory, 2, 1500)) == 2
        return
    with pytest.raises(ValueError, match=message):
        rows_of(memory, 2, 1500)


def memories() -> int:
    """Pieces of memory for snapshots that this process has."""
    links = [descriptor for descriptor in Path("/proc/self/fd").iterdir() if descriptor.is_symlink()]
    return sum("memfd:checkpoint" in str(link.readlink()) for link in links if link.is_symlink())


def test_a_writer_that_nobody_has_gives_everything_back(tmp_path: Path) -> None:
    before, pids = memories(), []
    for number in range(3):
        writer = BackgroundWriter()
        writing = begin(writer, tmp_path, [image_of({"a": torch.full((3,), float(number))})])
        writing.result()
        pids.append(writing.pid)
        del writer, writing
        gc.collect()
    assert memories() == before
    assert not any(is_running(pid) for pid in pids)


def test_closing_lets_what_is_written_end(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    writing = held(writer, tmp_path)
    writer.close()
    second = begin(writer, tmp_path / "below", [image_of({"a": torch.ones(4)})])
    assert second.pid != writing.pid
    os.kill(writing.pid, signal.SIGCONT)
    assert writing.result()[0] == FileRecord.of(tmp_path, "file")
    second.result()
    assert writer.pid == second.pid
    writer.close()
    assert not is_running(writing.pid)


def test_memory_that_grows_stays_the_same_memory(tmp_path: Path, writer: BackgroundWriter) -> None:
    begin(writer, tmp_path, [image_of({"a": torch.ones(3)})]).result()
    first = os.fstat(writer._image.descriptor).st_ino
    image = image_of({"a": torch.ones(3 << 20)})
    begin(writer, tmp_path, [image]).result()
    assert os.fstat(writer._image.descriptor).st_ino == first
    assert_holds(tmp_path, image, {"a": torch.ones(3 << 20)})
    maps = Path(f"/proc/{writer.pid}/maps").read_text()
    assert maps.count("memfd:checkpoint") == 1


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    half = available_bytes() // 2
    assert HostImage().has_room(half)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert not HostImage().has_room(half)


def test_a_process_that_cannot_come_up_leaves_the_save_to_others(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files([image_of({"a": torch.ones(3)})], [], tmp_path, "xxh3")
    with monkeypatch.context() as patch:
        patch.setattr(background_writer, "_ROOT", tmp_path)  # where there is no such package
        for _ in range(3):
            assert writer.write(files, "the writer", Patience(), lambda records, seconds: records) is None
    assert writer.pid is None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", None)
        assert BackgroundWriter().write(files, "the writer", Patience(), lambda records, seconds: records) is None


def test_entries_of_the_search_path_that_are_no_text_are_left_out(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [Path("/nowhere"), *sys.path])
    begin(writer, tmp_path, [image_of({"a": torch.ones(3)})]).result()


def test_what_others_still_write_to_a_file_does_not_get_into_its_successor(tmp_path: Path) -> None:
    image = image_of({"a": torch.ones(3)})
    with (tmp_path / "file").open("wb") as stream:
        (record,) = write_images([image], tmp_path, "xxh3")
        stream.write(b"late")
    assert FileRecord.of(tmp_path, "file") == record


def test_tensors_on_a_device_are_not_left_to_a_fork(tmp_path: Path) -> None:
    image = image_of({"a": torch.ones(3)})
    assert DirectWrite(lambda: [image], tmp_path, list).is_on_host
    elsewhere = replace(image.tensors[0], tensor=torch.ones(3, device="meta"))
    assert not DirectWrite(lambda: [image, FileImage("other", 1, [elsewhere])], tmp_path, list).is_on_host


def test_a_zero_tensor_without_memory_is_left_to_torch() -> None:
    assert is_usual(torch.zeros(4))
    assert not is_usual(torch._efficientzerotensor((4,)))
