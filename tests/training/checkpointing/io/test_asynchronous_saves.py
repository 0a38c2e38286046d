"""Asynchronous saves of a run: by the writer process, by a fork of the trainer, and while the one before is written."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.checkpointing import CheckpointSaveContext
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.formats import PayloadWrite
from bridge.training.checkpointing.formats.direct import DirectWrite
from bridge.training.checkpointing.integrity import FileRecord, find_damage, read_manifest
from bridge.training.checkpointing.io.background_writer import BACKGROUND_WRITER, Patience
from bridge.training.checkpointing.io.framing import Frames
from bridge.training.checkpointing.io.image import FileImage, TensorPart
from bridge.training.checkpointing.queue import queue_of
from bridge.training.checkpointing.transaction import Save, SaveTarget
from bridge.training.save_decisions import Decision
from bridge.training.setup import Run, setup
from bridge.training.train import _carry_out
from tests.distributed.launch import run_ranks
from tests.training.checkpointing.test_exchanges import counted
from tests.training.tiny import tiny_config


def save(run: Run, step: int, non_persistent: bool = False) -> None:
    run.state.train_state.step = step
    context = CheckpointSaveContext(
        run.state, run.model, run.optimizer, run.scheduler, 0, non_persistent_ckpt=non_persistent
    )
    run.manager.save(context, run.callback_manager)


def finish(run: Run, blocking: bool = True) -> None:
    run.manager.finalize_async_saves(run.state, blocking=blocking)


def writers() -> list[psutil.Process]:
    """This rank's writer processes."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("writer_process" in argument for argument in process.cmdline()):
                found.append(process)
    return found


def train_on_after_capture(cfg: Any) -> tuple[int, list[Any]]:
    """Save three times, and spoil every parameter as soon as each save has returned."""
    run = setup(cfg)
    expected: list[Any] = []
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in run.model[0].parameters():
                parameter.fill_(float(step))
        save(run, step)
        with torch.no_grad():
            for parameter in run.model[0].parameters():
                parameter.fill_(7777.0)
        finish(run)
        expected.append({process.pid for process in writers()})
    return len(set().union(*expected)), expected


def loaded_values(cfg: Any) -> set[float]:
    run = setup(cfg)
    return {float(value) for parameter in run.model[0].parameters() for value in parameter.detach().unique()}


@pytest.mark.parametrize(("io_backend", "files", "processes"), [("direct", 1, 1), ("direct", 3, 1), ("stock", 2, 0)])
def test_no_step_after_a_save_reaches_the_file(tmp_path: Path, io_backend: str, files: int, processes: int) -> None:
    checkpoint = {"io_backend": io_backend, "storage_writers_per_rank": files}
    saving = tiny_config(checkpoint={"save": str(tmp_path), "async_save": True, **checkpoint})
    for count, seen in run_ranks(train_on_after_capture, 2, saving):
        assert count == processes, "one process serves all saves"
        assert all(len(pids) == processes for pids in seen)
    for step in (1, 2, 3):
        directory = tmp_path / f"iter_{step:07d}"
        manifest = read_manifest(directory)
        assert manifest is not None
        assert find_damage(directory, manifest.files, checksums=True) == []
    loading = tiny_config(checkpoint={"load": str(tmp_path), "ckpt_step": 2})
    assert run_ranks(loaded_values, 2, loading) == [{2.0}, {2.0}]


def save_while_busy(cfg: Any) -> tuple[list[str], list[str]]:
    """Save while the writer of one rank is held, then again when it has gone on."""
    run = setup(cfg)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bridge.training.checkpointing.saving").addHandler(handler)
    save(run, 1)
    finish(run)
    (writer,) = writers()
    if dist.get_rank() == 1:
        os.kill(writer.pid, signal.SIGSTOP)
    save(run, 2)
    save(run, 3)
    save(run, 4)
    if dist.get_rank() == 1:
        os.kill(writer.pid, signal.SIGCONT)
    finish(run)
    save(run, 5)
    finish(run)
    run.state.events.flush()
    context = run.manager.checkpointing_context  # type: ignore[attr-defined]
    context[BACKGROUND_WRITER].close()
    saved = sorted(path.name for path in Path(cfg.checkpoint.save).glob("iter_*"))
    return saved, [message for message in told if "skipped" in message]


def test_a_save_that_is_due_while_one_is_written_is_skipped_if_wanted(tmp_path: Path) -> None:
    checkpoint = {"save": str(tmp_path), "async_save": True, "async_when_busy": "skip"}
    (saved, told), (_, told_elsewhere) = run_ranks(save_while_busy, 2, tiny_config(checkpoint=checkpoint))
    assert saved == ["iter_0000001", "iter_0000002", "iter_0000005"]
    assert told == [
        "the persistent checkpoint of iteration 3 is skipped: the one before is still being written; set "
        "checkpoint.async_when_busy to 'wait', or save less often"
    ]
    assert told_elsewhere == []
    skipped = [event.iteration for event in read_events(tmp_path).events if event.kind == "save_skipped"]
    assert skipped == [3]


class Told:
    """Notes what the loop tells of its saves."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def saving(self, iteration: int) -> None:
        self.told.append(iteration)

    def saved(self) -> None:
        self.told.append("made")


def save_what_was_asked_for_while_busy(cfg: Any) -> tuple[list[str], list[Any], str]:
    """Carry out saves while the writer of one rank is held; then schedule one that another rank cannot begin."""
    run, watch, decision = setup(cfg), Told(), Decision("persistent", "it is due")
    for step in (1, 2, 3, 4):
        run.state.train_state.step = step
        if step == 4 and dist.get_rank() == 1:
            threading.Timer(0.5, lambda: os.kill(writers()[0].pid, signal.SIGCONT)).start()
        _carry_out(run, decision, watch, must_be_made=step == 4)  # type: ignore[arg-type]
        if step == 1:
            finish(run)
            if dist.get_rank() == 1:
                os.kill(writers()[0].pid, signal.SIGSTOP)
    finish(run)

    def start(name: str) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")

    queue, seen = queue_of(run.state), ""
    queue.schedule(AsyncRequest(lambda: None, (), []), "this save", start=start)
    try:
        run.manager.finalize_async_saves(run.state, blocking=True, terminate=True)
    except CheckpointError as error:
        seen = str(error)
    assert not len(queue)
    return sorted(path.name for path in Path(cfg.checkpoint.save).glob("iter_*")), watch.told, seen


def test_a_save_that_was_asked_for_is_not_skipped(tmp_path: Path) -> None:
    checkpoint = {"save": str(tmp_path), "async_save": True, "async_when_busy": "skip"}
    for saved, told, failed in run_ranks(save_what_was_asked_for_while_busy, 2, tiny_config(checkpoint=checkpoint)):
        assert saved == ["iter_0000001", "iter_0000002", "iter_0000004"]
        assert told == [1, "made", 2, "made", 3, 4, "made"]
        assert failed == (
            "starting the background writer of this save failed on rank 1: OSError: [Errno 28] No space left on device"
        )


def save_with_old_and_new_writers(cfg: Any) -> list[bool]:
    """Whether ranks have waited behind the start of each save; before the third, one of them loses its writer."""
    run, found = setup(cfg), []
    for step in (1, 2, 3, 4):
        if step == 3 and dist.get_rank() == 1:
            (process,) = writers()
            process.kill()
            process.wait()
        exchanges: list[str] = []
        with counted(exchanges):
            save(run, step)
        found.append(any("starting the background writer" in exchange for exchange in exchanges))
        finish(run)
    return found


def test_ranks_wait_for_one_another_where_a_writer_is_new(tmp_path: Path) -> None:
    """One that cannot be had makes its rank write by itself, which may take longer than training would wait for it."""
    cfg = tiny_config(checkpoint={"save": str(tmp_path), "async_save": True})
    assert run_ranks(save_with_old_and_new_writers, 2, cfg) == [[True, False, True, False]] * 2


@pytest.mark.parametrize(("device", "awaited"), [("cpu", True), ("meta", True), ("meta", False)])
def test_files_that_no_other_process_can_write_are_written_at_once(
    tmp_path: Path, device: str, awaited: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """If the other ranks wait for that."""
    frame = Frames().of(torch.float32, torch.Size([3]))
    assert frame is not None
    image = FileImage("file", frame.length, [TensorPart(0, frame, torch.ones(3, device=device))])
    (tmp_path / "file").write_bytes(b"content")
    payload = PayloadWrite(lambda _: (["file"], "result"), list, direct=DirectWrite(lambda: [image], tmp_path, list))
    layout: Any = None
    target = SaveTarget(tmp_path, 1)
    save = Save(target, tmp_path, payload, (), layout, lambda _: None, 0.0, start_is_awaited=awaited)
    if not awaited:
        with pytest.raises(CheckpointSaveError, match="the writer was lost; the next save has another, or does withou"):
            save.begin("the writer", Patience())
        return
    call = save.begin("the writer", Patience())
    if device == "cpu":  # a fork can do it
        assert call is None
        assert save.payload is payload
        return
    assert call is not None
    assert call.poll()
    assert call.result().files == [FileRecord.of(tmp_path, "file")]
    assert save.payload.direct is None
    assert [r.getMessage() for r in caplog.records] == [
        "the writer cannot be had: training waits until the files are written"
    ]
