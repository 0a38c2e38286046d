"""Run a function on several ranks: import once, fork the ranks, collect what they return.

A real `torchrun` start costs 6 to 11 seconds, most of it imports; forking costs about one. The parent imports
torch, Megatron-Core and bridge, but never starts torch.distributed, whose threads would not survive the fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bridge import accelerator
from scripts.benchmarks._ranks import free_port
from tests.distributed.forking import fork

accelerator.enable()

import megatron.core  # noqa: E402, F401  (imported here so that the ranks need not)
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset  # noqa: E402

torch.set_num_threads(1)

SYNTHETIC_SEQUENCES = 10_000
"""That a rank's synthetic data has, of some 2,000 tokens each: all that megatron-core makes take 0.2 s to shuffle."""

OUTPUT_TAIL = 8000  # characters of a rank's output shown when it fails


class RankError(AssertionError):
    """A rank raised, died or did not finish. The message holds rank, traceback and the end of its output."""


@dataclass
class _Rank:
    number: int
    pid: int
    log: Path
    result: Path
    running: bool = True


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(*args)` in `world_size` forked processes and return what each returned, in rank order.

    Every process has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (a free
    port) as under torchrun; `fn` starts torch.distributed itself, for instance with `init_ranks`. Because
    the ranks are forked, `fn` may be any callable and `args` any objects; what `fn` returns must be picklable.

    Raises:
        RankError: a rank raised or died (the others are killed), or the `timeout` (seconds) passed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        ranks: list[_Rank] = []
        try:
            gc.freeze()  # a collection in a rank would look at, and so copy, all that the parent has imported
            try:
                for number in range(world_size):
                    ranks.append(_fork(fn, args, number, world_size, port, Path(directory)))
            finally:
                gc.unfreeze()
            _wait_for_all(ranks, timeout)
            return [pickle.loads(rank.result.read_bytes())[1] for rank in ranks]
        finally:
            for rank in ranks:
                _kill(rank)


def init_ranks(timeout: float = 60) -> None:
    """Start torch.distributed in a rank of `run_ranks`; a collective that waits for `timeout` s raises."""
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(accelerator.process_group_backend(), timeout=timedelta(seconds=timeout))
    torch.distributed.barrier()  # a rank that had little to do would be gone while others still connect to it


def init_model_parallel(tp: int = 1, pp: int = 1, *, seed: int = 1234, **sizes: Any) -> None:
    """`init_ranks`, then Megatron-Core's groups and seeds; `sizes` goes to `initialize_model_parallel`."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    init_ranks()
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=True, **sizes)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _fork(
    fn: Callable[..., Any], args: tuple[Any, ...], number: int, world_size: int, port: int, directory: Path
) -> _Rank:
    log, result = directory / f"rank{number}.log", directory / f"rank{number}.pickle"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # here and in the child: whichever runs first
        return _Rank(number, pid, log, result)
    # The child must never return into pytest, whatever happens here.
    try:
        _die_with_parent()
        os.setpgid(0, 0)  # a group of its own, so that the helpers of a rank (writer processes) die with it
        _redirect_output(log)
        names = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
        }
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        torch.set_num_threads(1)
        MockGPTLowLevelDataset.size = SYNTHETIC_SEQUENCES
        result.write_bytes(_pickled_outcome(fn, args))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _die_with_parent() -> None:
    """A test run that is killed leaves no ranks behind (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _redirect_output(log: Path) -> None:
    # Python's streams too: pytest's capture put objects of its own in their place.
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)


def _pickled_outcome(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, fn(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _wait_for_all(ranks: list[_Rank], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.running]:
        for rank in running:
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                rank.running = False
                _check(rank, os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            raise RankError(
                f"{_names(running)} of {len(ranks)} did not finish within {timeout:g} s"
                + "".join(map(_output_of, running))
            )
        time.sleep(0.005)


def _check(rank: _Rank, status: int) -> None:
    if not rank.result.exists() or not rank.result.stat().st_size:
        how = f"killed by signal {-status}" if status < 0 else f"exited with status {status}"
        raise RankError(f"rank {rank.number} died: {how}{_output_of(rank)}")
    succeeded, value = pickle.loads(rank.result.read_bytes())
    if not succeeded:
        raise RankError(f"rank {rank.number} raised:\n{value}{_output_of(rank)}")


def _kill(rank: _Rank) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)  # the rank, if it still runs, and the helpers that it left behind
    if rank.running:
        os.waitpid(rank.pid, 0)


def _output_of(rank: _Rank) -> str:
    text = rank.log.read_text(errors="replace") if rank.log.exists() else ""
    return f"\n--- output of rank {rank.number} ---\n{text[-OUTPUT_TAIL:]}" if text else ""


def _names(ranks: list[_Rank]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank.number) for rank in ranks)
