"""Checkpoints in another format: equal to the last bit, whatever is done to the conversion on its way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.checkpointing import convert as conversion
from bridge.training.checkpointing.conversion.comparing import same
from bridge.training.checkpointing.conversion.plan import (
    PlanError,
    Shares,
    Tensor,
    batches_of,
    chunk_of,
    divide,
    pieces_of,
    shares_of,
)
from bridge.training.checkpointing.conversion.work import Memory
from bridge.training.checkpointing.convert import Converted
from bridge.training.checkpointing.detection import get_checkpoint_format
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    DirectoryInUseError,
    NotACheckpointError,
    UnsafeCheckpointError,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest, read_manifest, write_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRACKER
from bridge.training.checkpointing.marks import mark
from bridge.training.checkpointing.recovery import recover
from bridge.training.checkpointing.safety.safe_globals import load_torch_file
from bridge.training.checkpointing.source import require_whole
from bridge.training.progress import progress_line
from bridge.training.state import TrainState
from tests.cli.test_rescue import bridge_ckpt, claimed
from tests.distributed.launch import RankError, init_ranks, run_ranks
from tests.faults.killing import run_until
from tests.training import fsdp
from tests.training.checkpointing.formats import zarr_states as states
from tests.training.checkpointing.test_interop import STOCK_DCP, STOCK_MCORE, run_stock
from tests.training.tiny import run_to_end, tiny_config

pytest.importorskip("tensorstore")

STOCK_BY_NAME = """
import sys
import torch
import torch.distributed.checkpoint as dcp
directory, out = sys.argv[1:]
entries = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
tensors = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in sorted(entries.items()) if hasattr(e, "size")}
dcp.load(tensors, checkpoint_id=directory, no_dist=True)
torch.save(tensors, out)
assert not any(name == "bridge" or name.startswith("bridge.") for name in sys.modules)
"""

ITERATION = 3
NAME = "iter_0000003"
SIDECARS = {"tokenizer/vocab.txt": b"a\nb\n", "run_config.yaml": b"checkpoint: {ckpt_format: torch_dist}\n"}


class StoppedError(Exception):
    """Ends a conversion where nothing expects it."""


def convert(*arguments: Any, **options: Any) -> Converted:
    """Convert in a process of its own: one in which TensorStore has been at work cannot start ranks any more."""

    def attempt() -> Any:
        try:
            return conversion.convert(*arguments, **options)
        except (CheckpointError, StoppedError) as error:
            return error

    (outcome,) = run_ranks(attempt, 1)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def complete(checkpoint: Path, name: str) -> None:
    """Make what a format has written a checkpoint of ours."""
    state = TrainState()
    state.step = ITERATION
    torch.save(state.state_dict(), checkpoint / "train_state.pt")
    for sidecar, data in SIDECARS.items():
        (checkpoint / sidecar).parent.mkdir(exist_ok=True)
        (checkpoint / sidecar).write_bytes(data)
    records = tuple(FileRecord.of(checkpoint, file) for file in states.files_in(checkpoint))
    sizes = {"tensor": 2, "data": 1}
    manifest = Manifest(
        ITERATION, name, 2, sizes, {"bridge": "0"}, records, created=1.0, start=3, metrics={"loss": 2.5}
    )
    write_manifest(checkpoint, manifest)


def save_states(root: Path) -> None:
    init_ranks()
    n, rank = states.world()
    for name in ("torch_dist", "zarr"):
        states.save(states.shards(n, rank), root / f"foreign_{name}" / NAME, name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks in `torch_dist` and in `zarr`, with shards of every kind, and one of large tensors."""
    root = tmp_path_factory.mktemp("convert")
    run_ranks(save_states, 2, root)
    run_ranks(save_large, 1, root)
    for name in ("torch_dist", "zarr"):
        shutil.copytree(root / f"foreign_{name}", root / name)
        complete(root / name / NAME, name)
    return root


def save_large(root: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    init_ranks()
    generator = torch.Generator()
    # Rows of the second one are larger than what a process with 1 MiB holds at once.
    for name in ("torch_dist", "zarr"):
        generator.manual_seed(3)
        tensors = {
            "rows": torch.randn(1024, 700, generator=generator),
            "wide": torch.randn(2, 300_000, generator=generator),
        }
        state: dict[str, Any] = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in tensors.items()}
        directory = root / f"large_{name}" / NAME
        states.save({**state, "iteration": ITERATION}, directory, name)
        complete(directory, name)


def load_states(directory: Path) -> None:
    init_ranks()
    n, rank = states.world()
    template = states.template(n, rank)
    if n != 2:
        del template["objects"]["each"]
    loaded = states.load(template, directory, strictness="raise_unexpected").state_dict
    assert loaded["iteration"] == ITERATION
    if n == 2:
        states.require_equal(loaded, n, rank)
    else:
        assert torch.equal(loaded["rows"], states.values()["rows"])


def records_of(checkpoint: Path) -> dict[str, tuple[int, str]]:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    return {record.name: (record.size, record.checksum) for record in manifest.files}


def test_there_and_back_every_tensor_object_and_file_is_the_same(root: Path, tmp_path: Path) -> None:
    source = root / "torch_dist" / NAME
    before = {name: (source / name).read_bytes() for name in states.files_in(source)}
    there = convert(root / "torch_dist" / NAME, tmp_path / "zarr", "zarr", processes=1)
    back = convert(tmp_path / "zarr", tmp_path / "back", "torch_dist", processes=1)

    assert {name: (source / name).read_bytes() for name in states.files_in(source)} == before
    assert (there.path, there.verified, there.parts_reused) == (tmp_path / "zarr" / NAME, True, 0)
    assert (there.tensors, there.objects) == (len(states.values()), 3)
    for converted, name in ((there, "zarr"), (back, "torch_dist")):
        require_whole(converted.path, "full")
        assert get_checkpoint_format(converted.path) == name
        manifest, original = read_manifest(converted.path), read_manifest(source)
        assert manifest is not None
        assert original is not None
        for field in ("iteration", "world_size", "parallel_sizes", "created", "start", "metrics"):
            assert getattr(manifest, field) == getattr(original, field)
        assert manifest.total_bytes == converted.total_bytes
        for sidecar in ("common.pt", "train_state.pt", *SIDECARS):
            assert (converted.path / sidecar).read_bytes() == before[sidecar]
        save_dir = converted.path.parent
        assert {path.name for path in save_dir.iterdir()} == {NAME, TRACKER, LEGACY_TRACKER, ".bridge-events.jsonl"}
        assert (save_dir / TRACKER).read_bytes() == before["train_state.pt"]
        assert (save_dir / LEGACY_TRACKER).read_text() == "3"
        for size in (1, 2):
            run_ranks(load_states, size, converted.path)
    stock = [run_stock(STOCK_DCP, path, tmp_path / "stock.pt") for path in (source, back.path)]
    assert same(stock[0], {key: stock[1][key] for key in stock[0]})
    assert stock[0].keys() == stock[1].keys()


def train(save: Path, size: int, **model: Any) -> list[dict[str, Any]]:
    cfg = tiny_config(train_iters=4, model=model, checkpoint={"save": str(save), "save_interval": 2})
    return run_ranks(run_to_end, size, cfg)


def test_a_run_goes_on_from_a_converted_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    straight = train(tmp_path / "run", 2, tensor_model_parallel_size=2)
    source = tmp_path / "run"
    assert convert(source, tmp_path / "zarr", "zarr", step=2, processes=1).iteration == 2
    assert convert(tmp_path / "zarr", tmp_path / "back", "torch_dist", processes=1).iteration == 2

    for name in ("zarr", "back"):
        cfg = tiny_config(
            train_iters=4,
            model={"tensor_model_parallel_size": 2},
            checkpoint={"load": str(tmp_path / name), "save": str(tmp_path / f"{name}-run"), "save_interval": 4},
        )
        resumed = run_ranks(run_to_end, 2, cfg)
        assert [each["started at"] for each in resumed] == [2, 2]
        assert [each["digests"] for each in resumed] == [each["digests"] for each in straight]
    stock = [
        run_stock(STOCK_MCORE, path / "iter_0000002", tmp_path / "stock.pt") for path in (source, tmp_path / "back")
    ]
    assert same(*(dict(sorted(each.pop("tensors").items())) for each in [dict(each) for each in stock]))
    assert len(stock[0]["tensors"]) > 10
    assert same(*({key: each[key] for key in ("common", "content")} for each in stock))

    with pytest.raises(CheckpointMismatchError, match="cannot become 'fsdp_dtensor': only what was converted from"):
        convert(tmp_path / "run", tmp_path / "fsdp", "fsdp_dtensor", processes=1)
    assert not list((tmp_path / "fsdp").glob("iter_*"))
    assert [path.name for path in (tmp_path / "fsdp").iterdir()] == [".bridge-writer"]


@pytest.mark.parametrize("name", ["torch_dist", pytest.param("zarr", marks=pytest.mark.slow)])
def test_megatron_fsdp_goes_on_after_its_checkpoint_was_in_another_format(tmp_path: Path, name: str) -> None:
    pytest.importorskip("einops")
    config = {"train_iters": 4, "save_interval": 2}
    straight = run_ranks(fsdp.run_to_end, 2, fsdp.fsdp_config(**config, save=str(tmp_path / "run")))
    source = tmp_path / "run" / "iter_0000002"
    there = convert(source, tmp_path / name, name, processes=1)
    back = convert(there.path, tmp_path / "back", "fsdp_dtensor", processes=1)
    assert (back.tensors, back.objects) == (there.tensors, there.objects)

    paths = (source, there.path, back.path) if name == "torch_dist" else (source, back.path)
    stock = [run_stock(STOCK_BY_NAME, path, tmp_path / "stock.pt") for path in paths]
    assert all(same(stock[0], each) for each in stock)
    assert sum(key.startswith("model.") for key in stock[0]) > 10

    load = str(there.path)
    for cfg in (fsdp.fsdp_config(load=load), tiny_config(checkpoint={"load": load})):
        with pytest.raises(RankError, match=r"CheckpointMismatchError: .* was converted from the format fsdp_dtensor"):
            run_ranks(run_to_end, 1, cfg)
    cfg = fsdp.fsdp_config(**config, load=str(tmp_path / "back"), save=str(tmp_path / "resumed"))
    resumed = run_ranks(fsdp.run_to_end, 2, cfg)
    assert [each["started at"] for each in resumed] == [2, 2]
    assert [each["digests"] for each in resumed] == [each["digests"] for each in straight]


@pytest.mark.parametrize(("source", "target"), [("torch_dist", "zarr"), ("zarr", "torch_dist")])
def test_tensors_larger_than_the_budget_are_split(root: Path, tmp_path: Path, source: str, target: str) -> None:
    if source == "zarr":  # its own chunks, of a save, are larger than the budget
        first = convert(root / "large_torch_dist", tmp_path / "first", "zarr", memory=1 << 20, processes=1)
        path = first.path
        with pytest.raises(CheckpointSaveError, match=r"^--memory-gib: rows has chunks of 2867200 bytes, and "):
            convert(root / "large_zarr", tmp_path / "none", "torch_dist", memory=1 << 20, processes=1)
    else:
        path = root / "large_torch_dist" / NAME
    converted = convert(path, tmp_path / target, target, memory=1 << 20, processes=1)
    assert converted.total_bytes > 5 << 20
    assert 1 << 19 < converted.peak_bytes <= 1 << 20
    assert converted.parts > 4
    again = convert(root / f"large_{source}", tmp_path / "large", target, processes=1)
    assert again.parts < converted.parts
    if target == "torch_dist":
        stock = [run_stock(STOCK_DCP, each.path, tmp_path / "stock.pt") for each in (converted, again)]
        assert same(*stock)
        assert {key: tuple(value.shape) for key, value in stock[0].items()} == {
            "rows": (1024, 700),
            "wide": (2, 300_000),
        }


def test_several_processes_share_the_budget_and_the_work(root: Path, tmp_path: Path) -> None:
    status, out, err = bridge_ckpt(
        *("convert", root / "large_torch_dist", tmp_path / "zarr", "--format", "zarr", "--processes", 2),
        *("--memory-gib", 4 / 1024, "--json", "--quiet"),
    )
    assert (status, err) == (0, "")
    summary = json.loads(out)
    assert summary["path"] == str(tmp_path / "zarr" / NAME)
    assert summary["processes"] == 2
    assert 0 < summary["peak_bytes"] <= 4 << 20
    alone = convert(root / "large_torch_dist", tmp_path / "alone", "zarr", memory=2 << 20, processes=1)
    assert records_of(alone.path) == records_of(tmp_path / "zarr" / NAME)


def test_an_error_of_one_process_ends_the_conversion(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "large_torch_dist", tmp_path / "damaged")
    shard = next((tmp_path / "damaged" / NAME).glob("*.distcp"))
    with shard.open("r+b") as stream:
        stream.seek(shard.stat().st_size // 2)
        stream.write(b"damage")
    for processes in (1, 2):
        status, out, err = bridge_ckpt(
            "convert", tmp_path / "damaged", tmp_path / "zarr", "--format", "zarr", "--processes", processes, "--quiet"
        )
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {tmp_path}/damaged/{NAME} is damaged: {shard.name} has xxh3 ")
        assert not (tmp_path / "zarr" / NAME).exists()
        assert not (tmp_path / "zarr" / TRACKER).exists()
    # Nobody sees this damage who does not look.
    assert convert(tmp_path / "damaged", tmp_path / "unseen", "zarr", processes=1, verify=False).verified is False


def test_what_was_written_wrongly_is_found_and_thrown_away(root: Path, tmp_path: Path) -> None:
    def spoil(step: str, done: int, total: int) -> None:
        if step == "comparing" and done == 0:
            (staging,) = (tmp_path / "zarr").glob(".saving-*")
            with (staging / "wide" / "c" / "0" / "0").open("r+b") as stream:
                stream.write(b"\xff")

    with pytest.raises(CheckpointSaveError, match=r"^wide at \[0, 0\] is not what it is in .* Nothing was published$"):
        convert(root / "large_torch_dist", tmp_path / "zarr", "zarr", processes=1, report=spoil)
    assert [path.name for path in (tmp_path / "zarr").iterdir()] == [".bridge-writer"]


def test_killed_anywhere_it_continues_and_ends_with_the_same(root: Path, tmp_path: Path) -> None:
    source = root / "large_torch_dist"
    first = convert(source, tmp_path / "undisturbed", "zarr", memory=1 << 20, processes=1)
    undisturbed, parts = records_of(first.path), first.parts

    def once(target: Path) -> None:
        conversion.convert(source, target, "zarr", memory=1 << 20, processes=1)

    killed, operations = run_until(None, tmp_path / "zarr", once, 1, tmp_path / "zarr")
    assert not killed
    reused = []
    last = range(operations - 12, operations + 1)
    for operation in [3, operations // 4, operations // 2, *last]:
        target = tmp_path / f"killed{operation}"
        killed, _ = run_until(operation, target, once, 1, target)
        assert killed
        if (target / NAME).exists():
            require_whole(target / NAME, "full")
        own = {".bridge-events.jsonl"}
        try:
            reused.append(convert(source, target, "zarr", memory=1 << 20, processes=1).parts_reused)
        except CheckpointSaveError as error:
            own.add(".bridge-writer")  # stays after every failure
            # All that was left to do was to forget the progress.
            assert f"has a checkpoint of iteration {ITERATION}" in str(error)
        assert records_of(target / NAME) == undisturbed
        found = {path.name for path in target.iterdir() if not path.name.startswith(".trash-")}
        assert found == {NAME, TRACKER, LEGACY_TRACKER, *own}
        assert (target / TRACKER).read_bytes() == (source / NAME / "train_state.pt").read_bytes()
    assert reused[:3] == sorted(reused[:3])
    assert (reused[0], max(reused)) == (0, parts)


def test_a_killed_command_takes_its_processes_with_it_and_can_be_repeated(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "zarr"
    arguments = ["convert", str(root / "large_torch_dist"), str(target), "--format", "zarr", "--processes", "2"]
    command = [sys.executable, "-m", "bridge.cli", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while running.poll() is None and not list(target.glob(".saving-*/.conversion/part-*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        running.kill()
        running.wait()
        while members(running.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    if not (target / NAME).exists():
        converted = convert(root / "large_torch_dist", target, "zarr", processes=2)
        assert converted.parts_reused > 0
    require_whole(target / NAME, "full")


def members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
    return found


def interrupt(source: Path, target: Path, name: str, parts: int, **options: Any) -> None:
    """Begin a conversion, and end it after some parts as if it had been killed."""

    def after(step: str, done: int, total: int) -> None:
        if step == "converting" and len(list(target.glob(".saving-*/.conversion/part-*.json"))) >= parts:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, target, name, processes=1, report=after, **options)


def test_what_is_left_is_trusted_only_if_it_is_whole_and_of_the_same_conversion(root: Path, tmp_path: Path) -> None:
    source, target = root / "large_torch_dist", tmp_path / "zarr"
    interrupt(source, target, "zarr", 3, memory=2 << 20)
    (left,) = target.glob(".saving-*")
    chunk = next(path for path in sorted(left.glob("*/c/**/*")) if path.is_file())
    chunk.write_bytes(b"spoilt")
    assert convert(source, target, "zarr", memory=2 << 20, processes=1).parts_reused == 2
    require_whole(target / NAME, "full")

    # Of another checkpoint that lies in the same place, and for another budget that the parts do not fit into.
    shutil.copytree(source, tmp_path / "other")
    interrupt(tmp_path / "other", tmp_path / "two", "zarr", 3, memory=2 << 20)
    interrupt(source, tmp_path / "two", "zarr", 2, memory=2 << 20)
    assert len(list((tmp_path / "two").glob(".saving-*"))) == 2
    smaller = convert(source, tmp_path / "two", "zarr", memory=1 << 20, processes=1)
    assert (smaller.parts_reused, smaller.peak_bytes <= 1 << 20) == (0, True)
    assert len(list((tmp_path / "two").glob(".saving-*"))) == 1
    larger = convert(tmp_path / "other", tmp_path / "two", "zarr", memory=8 << 20, processes=1, force=True)
    assert larger.parts_reused == 3
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        [".bridge-events.jsonl", NAME, TRACKER, LEGACY_TRACKER]
    )

    # A run that starts in the directory sweeps what is left of it.
    interrupt(source, tmp_path / "swept", "zarr", 1, memory=2 << 20)
    recover(tmp_path / "swept")
    assert not list((tmp_path / "swept").glob(".saving-*"))
    assert convert(source, tmp_path / "swept", "zarr", processes=1).parts_reused == 0


def test_trackers_move_only_forward(root: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", 1)
    newer = shutil.copytree(tmp_path / "run", tmp_path / "newer")
    tracker = (newer / TRACKER).read_bytes()
    status, out, _ = bridge_ckpt("convert", root / "zarr", newer, "--format", "torch_dist", "--processes", 1)
    assert status == 0
    assert out.splitlines()[1] == "the trackers were left: the directory has the newer iteration 4"
    assert ((newer / TRACKER).read_bytes(), (newer / LEGACY_TRACKER).read_text()) == (tracker, "4")
    assert require_whole(newer / NAME) is not None

    again = ("convert", root / "zarr", newer, "--format", "torch_dist", "--processes", 1)
    assert bridge_ckpt(*again) == (
        1,
        "",
        f"error: DST: {newer} has a checkpoint of iteration 3; give --force to replace it, or name another directory\n",
    )
    marker = newer / NAME / "of before"
    marker.write_bytes(b"")
    assert bridge_ckpt(*again, "--force")[0] == 0
    assert not marker.exists()

    older = tmp_path / "older"
    assert convert(tmp_path / "run", older, "zarr", step=2, processes=1).trackers == "the trackers name iteration 2"
    assert convert(root / "torch_dist", older, "zarr", processes=1).trackers_moved is True
    assert load_torch_file(older / TRACKER, "tracker")["step"].item() == 3


@pytest.mark.parametrize(("name", "target"), [("torch_dist", "zarr"), ("zarr", "torch_dist")])
def test_a_checkpoint_of_another_program_stays_one(root: Path, tmp_path: Path, name: str, target: str) -> None:
    converted = convert(root / f"foreign_{name}" / NAME, tmp_path / target, target, processes=1)
    assert read_manifest(converted.path) is None
    assert get_checkpoint_format(converted.path) == target
    assert converted.trackers == f"{LEGACY_TRACKER} names iteration 3"
    assert {path.name for path in converted.path.parent.iterdir()} == {NAME, LEGACY_TRACKER, ".bridge-events.jsonl"}
    run_ranks(load_states, 2, converted.path)


def test_what_cannot_be_converted_is_refused_and_nothing_is_made(root: Path, tmp_path: Path) -> None:
    source = root / "torch_dist"
    (tmp_path / "file").write_text("")
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copytree(source, tmp_path / "marked")
    mark(tmp_path / "marked" / NAME, "a bad disk")
    shutil.copytree(source, tmp_path / "short")
    shard = next((tmp_path / "short" / NAME).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    shutil.copytree(root / "foreign_torch_dist", tmp_path / "unsafe")
    torch.save({"iteration": 3, "x": Unsafe()}, tmp_path / "unsafe" / NAME / "common.pt")
    shutil.copytree(root / "foreign_zarr" / NAME, tmp_path / "release" / "release")
    cases: list[tuple[Path, Path, str, dict[str, Any], type[CheckpointError], str]] = [
        (tmp_path / "absent", tmp_path / "d", "zarr", {}, CheckpointNotFoundError, "SRC: .*absent does not exist"),
        (tmp_path / "empty", tmp_path / "d", "zarr", {}, CheckpointNotFoundError, "SRC: there is no checkpoint in"),
        (tmp_path / "something", tmp_path / "d", "zarr", {}, NotACheckpointError, "SRC: .*notes.txt"),
        (source, tmp_path / "d", "zarr", {"step": 9}, CheckpointNotFoundError, "9 is not in"),
        (source / NAME, tmp_path / "d", "zarr", {"step": 3}, CheckpointMismatchError, "--step: .* is one checkpoint"),
        (source, tmp_path / "d", "torch_dist", {}, CheckpointMismatchError, "the format 'torch_dist' already"),
        (source, tmp_path / "d", "hdf5", {}, CheckpointMismatchError, "--format: there is no format 'hdf5'"),
        (source, tmp_path / "d", "zarr", {"memory": 1000}, CheckpointSaveError, "--memory-gib: a process needs 1 MiB"),
        (source, tmp_path / "d", "zarr", {"processes": 0}, CheckpointSaveError, "--processes is 0"),
        (source, source, "zarr", {"force": True}, CheckpointMismatchError, "DST: .* is never replaced"),
        (source, source / NAME / "in", "zarr", {}, NotACheckpointError, "DST: .* lies in the checkpoint"),
        (source, root / "zarr" / NAME, "zarr", {}, NotACheckpointError, "DST: .* is one checkpoint"),
        (source, tmp_path / "file", "zarr", {}, NotACheckpointError, "DST: .* is not a directory"),
        (source, tmp_path / "something", "zarr", {}, NotACheckpointError, r"DST: .*\(notes.txt\)"),
        (tmp_path / "marked", tmp_path / "d", "zarr", {"step": 3}, CheckpointDamagedError, "as damaged: a bad disk"),
        (tmp_path / "short" / NAME, tmp_path / "d", "zarr", {}, CheckpointDamagedError, "bytes instead of"),
        (tmp_path / "unsafe", tmp_path / "d", "zarr", {"step": 3}, UnsafeCheckpointError, "Unsafe"),
        (tmp_path / "release", tmp_path / "d", "torch_dist", {}, CheckpointMismatchError, "is a release checkpoint"),
    ]
    for path, target, name, options, error, message in cases:
        before = sorted(target.rglob("*")) if target.is_dir() else []
        with pytest.raises(error, match=message):
            convert(path, target, name, **options)
        assert (sorted(target.rglob("*")) if target.is_dir() else []) == before, message
    assert not (tmp_path / "d").exists()
    (tmp_path / "used").mkdir()
    with claimed(tmp_path / "used"), pytest.raises(DirectoryInUseError, match=r"^DST: .* is in use by another run"):
        convert(source, tmp_path / "used", "zarr", processes=1)


class Unsafe:
    """Of no class that a checkpoint may hold."""


def tensor(shape: tuple[int, ...], chunk: tuple[int, ...] | None = None, dtype: str = "float32") -> Tensor:
    return Tensor("t", shape, dtype, chunk or (1,) * len(shape))


@pytest.mark.parametrize(
    ("whole", "limit", "shapes"),
    [
        (tensor((4, 4)), 64, [(4, 4)]),
        (tensor((5, 4)), 64, [(4, 4), (1, 4)]),
        (tensor((3, 4)), 16, [(1, 4)] * 3),
        (tensor((1, 6)), 16, [(1, 4), (1, 2)]),
        (tensor((2, 3)), 8, [(1, 2), (1, 1)] * 2),
        (tensor((6, 4), (2, 4)), 80, [(4, 4), (2, 4)]),
        (tensor((4, 6), (2, 2)), 32, [(2, 4), (2, 2)] * 2),
        (tensor((3, 3), (2, 2)), 32, [(2, 3), (1, 3)]),
        (tensor(()), 4, [()]),
        (tensor((0, 9)), 4, [(0, 9)]),
        (tensor((8,), dtype="bfloat16"), 8, [(4,), (4,)]),
    ],
)
def test_pieces_are_whole_chunks_within_the_limit(whole: Tensor, limit: int, shapes: list[tuple[int, ...]]) -> None:
    pieces = list(pieces_of(whole, limit))
    assert [piece.shape for piece in pieces] == shapes
    assert sum(piece.nbytes for piece in pieces) == whole.nbytes
    assert len({piece.offset for piece in pieces}) == len(pieces)
    assert all(start % unit == 0 for piece in pieces for start, unit in zip(piece.offset, whole.chunk, strict=True))


def test_a_chunk_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(PlanError, match="t has chunks of 64 bytes, and 32 is the most"):
        list(pieces_of(tensor((8, 8), (4, 4)), 32))


def test_parts_and_batches_hold_everything_once() -> None:
    parts = divide([tensor((9, 4)), Tensor("s", (2, 2), "int64", (1, 1))], [("b", 3), ("a", 2)], 48)
    assert [part.number for part in parts] == [0]
    assert parts[0].objects == (("a", 2), ("b", 3))
    assert parts[0].nbytes == 9 * 16 + 32 + 5
    batches = list(batches_of(parts[0], 48))
    assert [[piece.nbytes for piece in batch] for batch in batches] == [[32], [48], [48], [48]]


@pytest.mark.parametrize(
    ("shape", "limit", "chunk"),
    [((10, 4), 96, (5, 4)), ((10, 4), 1000, (10, 4)), ((2, 10), 16, (1, 4)), ((), 4, ()), ((0, 3), 8, (1, 2))],
)
def test_chunks_are_of_about_equal_sizes(shape: tuple[int, ...], limit: int, chunk: tuple[int, ...]) -> None:
    assert chunk_of(shape, 4, limit) == chunk


def test_what_is_held_at_once_is_bounded() -> None:
    assert shares_of(4 << 30, 4) == Shares(1 << 30, 64 << 20, ((1 << 30) - (64 << 20)) // 3)
    memory = Memory(10)
    with memory.hold(6, "a"), memory.hold(4, "b"):
        pass
    with memory.hold(8, "c"), pytest.raises(CheckpointSaveError, match="d takes 3 bytes"), memory.hold(3, "d"):
        pass
    assert (memory.peak, memory.held) == (10, 0)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ({"a": [1, (2.0, None)]}, {"a": [1, (2.0, None)]}, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        (float("nan"), float("nan"), True),
        (0.0, -0.0, False),
        (1, True, False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.zeros(1), -torch.zeros(1), False),
        (torch.zeros(2), torch.zeros(2, 1), False),
        (torch.zeros(1), torch.zeros(1, dtype=torch.int32), False),
        (io.BytesIO(b"a"), io.BytesIO(b"b"), False),
        (io.BytesIO(b"a"), io.BytesIO(b"a"), True),
    ],
)
def test_values_are_the_same_to_the_last_bit_or_not(first: Any, second: Any, equal: bool) -> None:
    assert same(first, second) is equal


def test_progress_says_how_fast_and_how_long() -> None:
    assert progress_line("converting", 0, 4 << 30, 0.0) == "converting 0.00 of 4.00 GiB"
    assert progress_line("comparing", 1 << 30, 4 << 30, 30.0) == "comparing 1.00 of 4.00 GiB, 34 MiB/s, 1:30 left"
