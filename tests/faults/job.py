"""A job of the real training loop for a fault to hit: what its ranks run, and what is known of it afterwards."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.config import ConfigContainer
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.distributed import launch
from tests.faults.tracer import Fault, Traced, trace
from tests.training.tiny import digests, tiny_config

TIMEOUT = 120.0
"""Seconds after which a job of a few seconds is taken to hang."""


@dataclass(frozen=True)
class Job:
    """A run that saves every iteration, in a directory that it resumes from by itself."""

    directory: Path
    data: Path
    """Prefix of the indexed text that it trains on."""
    train_iters: int
    ranks: int = 1
    checkpoint: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    """Called in each rank before it begins; here bugs are planted."""
    with_digests: bool = False
    """Note the digests after every iteration."""

    @property
    def save(self) -> Path:
        """Where it saves."""
        return self.directory / "storage" / "save"

    def config(self) -> ConfigContainer:
        """The run's configuration, the same schedule for any number of iterations."""
        save = str(self.save)
        checkpoint = {"save": save, "load": save, "save_interval": 1, "save_retries": 0, "save_retry_seconds": 0.01}
        return tiny_config(
            train_iters=self.train_iters,
            model={
                "num_layers": 1,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "seq_length": 8,
                "add_bias_linear": False,
            },
            scheduler={"lr_decay_iters": 100, "lr_warmup_iters": 0},
            dataset={"mock": False, "path": str(self.data), "path_to_cache": str(self.data.parent / "cache")},
            checkpoint={**checkpoint, **self.checkpoint},
            # Written by a thread, at moments that differ from run to run, and the calls of a job are counted.
            logger={"checkpoint_events": False},
        )

    def announced(self) -> list[int]:
        """The iterations of the checkpoints that it has been told are published, in order."""
        try:
            return [int(line) for line in (self.directory / "announced").read_text().split()]
        except FileNotFoundError:
            return []


@dataclass(frozen=True)
class Ended:
    """How one rank ended by itself."""

    error: str | None
    """The name of the exception's type, and its message; None: it reached the end."""
    typed: bool = True
    """Whether the exception is one of the checkpoint layer's."""
    started_at: int = -1
    setup_seconds: float = 0.0
    at_start: dict[str, str] = field(default_factory=dict)
    at_end: dict[str, str] = field(default_factory=dict)
    by_iteration: dict[int, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """How a whole job went."""

    traced: Traced
    ranks: list[Ended | None]
    """None for a rank that was killed."""
    output: str
    announced: list[int]
    """Since the job began."""


def write_text(directory: Path) -> Path:
    """Make a small indexed text; return its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    directory.mkdir(parents=True)
    prefix = directory / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in range(240):  # enough for every run to stay in its first epoch, whose order is always the same
        builder.add_document([*range(start, start + 11), 254], [12])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run(job: Job, fault: Fault | None = None, missing: frozenset[str] = frozenset(), timeout: float = TIMEOUT) -> Ran:
    """Run a job under the tracer; call it in a process without other children."""
    job.directory.mkdir(parents=True, exist_ok=True)
    before = len(job.announced())
    outputs = job.directory / "ranks"
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    traced = trace(starts(job, outputs), job.save.resolve(), fault, timeout=timeout, missing=missing)
    ended = [read_ended(outputs / f"{rank}.pickle") for rank in range(job.ranks)]
    text = "".join((outputs / f"{rank}.log").read_text(errors="replace")[-4000:] for rank in range(job.ranks))
    return Ran(traced, ended, text, job.announced()[before:])


def starts(job: Job, outputs: Path) -> list[Callable[[], None]]:
    """The bodies of a job's ranks; each notes in `outputs` how it ended."""
    port = launch.free_port()
    return [_start(job, rank, port, outputs) for rank in range(job.ranks)]


def _start(job: Job, rank: int, port: int, outputs: Path) -> Callable[[], None]:
    def start() -> None:
        status = 1
        try:
            atexit._clear()  # what is registered there is the parent's
            os.setpgid(0, 0)
            log = os.open(outputs / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
            _environ(rank, job.ranks, port)
            found = _outcome(job)
            _run_exit_handlers()
            (outputs / f"{rank}.pickle").write_bytes(pickle.dumps(found))
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    return start


def _environ(rank: int, ranks: int, port: int) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")


def _run_exit_handlers() -> None:
    """What the interpreter does at its end and `os._exit` leaves out: the deletions in the background end there."""
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()


def _outcome(job: Job) -> Ended:
    if job.prepare is not None:
        job.prepare()
    try:
        return _train(job)
    except Exception as error:
        traceback.print_exc()
        return Ended(f"{type(error).__name__}: {error}", isinstance(error, CheckpointError))


def _train(job: Job) -> Ended:
    callbacks = CallbackManager()
    by_iteration: dict[int, dict[str, str]] = {}
    begun = time.monotonic()
    made = setup(job.config(), callbacks)
    seconds = time.monotonic() - begun
    started_at = made.state.train_state.step
    _listen(callbacks, made, job, by_iteration)
    at_start = _digests(made)
    train(made)
    return Ended(None, True, started_at, seconds, at_start, _digests(made), by_iteration)


def _digests(made: Run) -> dict[str, str]:
    """Everything that must be equal bit for bit, in runs of any length: the decay's is not used, and counts that."""
    scheduler = {name: value for name, value in made.scheduler.state_dict().items() if name != "wd_incr_steps"}
    return {**digests(made), "scheduler": repr(scheduler)}


def _listen(callbacks: CallbackManager, made: Run, job: Job, by_iteration: dict[int, dict[str, str]]) -> None:
    def step(_: CallbackContext) -> None:
        by_iteration[made.state.train_state.step] = _digests(made)

    def saved(context: CallbackContext) -> None:
        if context.checkpoint is not None and os.environ["RANK"] == "0":
            with (job.directory / "announced").open("a") as stream:
                stream.write(f"{context.checkpoint.iteration}\n")

    callbacks.register("on_checkpoint_save", saved)
    if job.with_digests:
        callbacks.register("on_train_step_end", step)


def read_ended(file: Path) -> Ended | None:
    """What a rank has written of its end."""
    try:
        found: Ended = pickle.loads(file.read_bytes())
    except (FileNotFoundError, EOFError):
        return None
    return found


def kill_group(pid: int) -> None:
    """End a rank with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
