"""Time to save tensors: this project's writers beside torch's, megatron-core's, and the bare writing of the bytes.

    .venv/bin/python -m scripts.benchmarks.save [--large 40x32MiB] [--small 20000x8KiB] [--rounds N]
        [--directory DIR] [--json FILE] [--markdown FILE]

All ways save the same tensors, in turns in one process, and count until storage has everything. What counts is the
ratio of two ways in the same round; the medians of these are printed. Seconds are of wall time and of the processor,
child processes included: on a machine that is busy with something else only the latter say anything.

    copy           the tensors, into memory that has been touched
    raw            the bytes, one tensor after the other, into one file, with fsync
    raw direct     the same past the page cache, from one aligned buffer
    torch.save     one file, with fsync
    dcp            torch.distributed.checkpoint.save
    megatron       megatron-core's dist_checkpointing.save
    direct         the same with TorchDistSaveStrategy
    manager        what the checkpoint manager of this project calls

Asynchronous ways count what training loses: until the save returns, and what a loop that writes to every tensor, as an
optimizer does, takes longer than it does undisturbed while the save goes on. They end when storage has everything.

    dcp async      torch.distributed.checkpoint.async_save, in a thread
    megatron async megatron-core's, in a forked process, with the finalization
    direct async   the same with TorchDistSaveStrategy; here, too, megatron-core forks a process, which waits
    manager async  what the checkpoint manager does, without any fork
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks._workloads import Seconds, compare

RATIOS = [
    ("direct", "raw"),
    ("direct", "raw direct"),
    ("manager", "raw"),
    ("megatron", "manager"),
    ("dcp", "manager"),
    ("megatron", "direct"),
    ("dcp", "direct"),
    ("torch.save", "direct"),
    ("direct async", "copy"),
    ("manager async", "copy"),
    ("megatron async", "direct async"),
    ("megatron async", "manager async"),
    ("dcp async", "manager async"),
]
"""Pairs of ways: how many times as long the first takes as the second."""
STEPS = 3
"""Of the loop beside an asynchronous save, at least."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all ways and write the tables."""
    compare(arguments, __doc__, 3, RATIOS, _measure)
    return 0


def _measure(directory: Path, count: int, size: int, rounds: int) -> tuple[Seconds, dict[str, Any]]:
    ways = _Ways(directory, count, size)
    seconds = _in_turns(ways, rounds)
    kept = ways.kept / (count * size)
    ways.close()
    return seconds, {"kept memory / state": kept}


@dataclass
class _Clocks:
    """Seconds so far, of wall time and of the processor."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> _Clocks:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


def _in_turns(ways: _Ways, rounds: int) -> Seconds:
    seconds: Seconds = {}
    for number in range(rounds + 1):
        gc.collect()
        for name, run in ways.all().items():
            begun = _Clocks.now()
            lost = run()
            ended = _Clocks.now()
            ways.clean()
            if number:  # the first round warms up
                clocks = seconds.setdefault(name, {"wall": [], "processor": []})
                clocks["wall"].append(ended.wall - begun.wall if lost is None else lost)
                clocks["processor"].append(ended.processor - begun.processor)
    return seconds


class _Ways:
    """The ways to save one set of tensors. Asynchronous ones return the seconds that training loses."""

    def __init__(self, directory: Path, count: int, size: int) -> None:
        import torch

        from bridge.training.checkpointing.io import TorchDistSaveStrategy
        from bridge.training.checkpointing.io.background_writer import BackgroundWriter

        self._directory = directory
        columns = max(1, size // 4 // 16)
        self._tensors = {f"layers.{number}.weight": torch.rand(16, columns) for number in range(count)}
        self._copies = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._buffer = mmap.mmap(-1, count * 16 * columns * 4)
        self._buffer[:] = os.urandom(4096) * (len(self._buffer) // 4096) + bytes(len(self._buffer) % 4096)
        self._strategy = TorchDistSaveStrategy()
        self._writer = BackgroundWriter()
        self._planning: Any = None
        self._saves = 0
        directory.mkdir(parents=True)

    @property
    def kept(self) -> int:
        """Bytes of host memory that asynchronous saves keep."""
        return self._writer.memory

    def all(self) -> dict[str, Callable[[], float | None]]:
        """All ways by name."""
        return {
            "copy": self._copy,
            "raw": self._raw,
            "raw direct": self._raw_direct,
            "torch.save": self._torch_save,
            "dcp": self._dcp,
            "megatron": lambda: self._megatron(None),
            "direct": lambda: self._megatron(self._strategy),
            "manager": self._manager,
            "dcp async": self._dcp_async,
            "megatron async": lambda: self._megatron_async(None),
            "direct async": lambda: self._megatron_async(self._strategy),
            "manager async": self._manager_async,
        }

    def close(self) -> None:
        """Give up what the ways have kept."""
        self._strategy.close()
        self._writer.close()

    def clean(self) -> None:
        """Remove what was saved."""
        shutil.rmtree(self._directory)
        self._directory.mkdir()

    def _new(self) -> Path:
        self._saves += 1
        place = self._directory / str(self._saves)
        place.mkdir()
        return place

    def _copy(self) -> None:
        for name, tensor in self._tensors.items():
            self._copies[name].copy_(tensor)

    def _raw(self) -> None:
        with (self._directory / "raw").open("wb", buffering=1 << 20) as stream:
            for tensor in self._tensors.values():
                stream.write(memoryview(tensor.numpy()).cast("B"))
            stream.flush()
            os.fsync(stream.fileno())

    def _raw_direct(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0)
        try:
            descriptor = os.open(self._directory / "raw", flags)
        except OSError:
            descriptor = os.open(self._directory / "raw", os.O_WRONLY | os.O_CREAT)
        view, block, done = memoryview(self._buffer), 4 << 20, 0
        while len(view) - done >= 4096:
            end = min(done + block, len(view) // 4096 * 4096)
            done += os.write(descriptor, view[done:end])
        os.fsync(descriptor)
        os.close(descriptor)

    def _torch_save(self) -> None:
        import torch

        with (self._directory / "single.pt").open("wb") as stream:
            torch.save(self._tensors, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def _dcp(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._tensors, checkpoint_id=self._new(), no_dist=True)

    def _state(self) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in self._tensors.items()}

    def _megatron(self, strategy: Any) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self._state(), str(self._new()), strategy)

    def _manager(self) -> None:
        from bridge.training.checkpointing.agreement import Ranks
        from bridge.training.checkpointing.formats import torch_dist
        from bridge.training.checkpointing.formats.options import SaveOptions

        place = self._new()
        options = SaveOptions(strategy=self._planning)
        write, self._planning = torch_dist.plan_save(self._state(), place, {}, Ranks.current(), options)
        write.finish([write.write("xxh3")[1]])

    def _dcp_async(self) -> float:
        import torch.distributed.checkpoint as dcp

        undisturbed, begun = self._step(), time.perf_counter()
        future = dcp.async_save(self._tensors, checkpoint_id=self._new(), no_dist=True)
        lost = time.perf_counter() - begun
        lost += self._beside(undisturbed, future.done)
        future.result()
        return lost

    def _megatron_async(self, strategy: Any) -> float:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        queue, undisturbed, begun = AsyncCallsQueue(), self._step(), time.perf_counter()
        request = dist_checkpointing.save(self._state(), str(self._new()), strategy, async_sharded_save=True)
        queue.schedule_async_request(request)
        lost = time.perf_counter() - begun
        lost += self._beside(undisturbed, lambda: bool(queue.maybe_finalize_async_calls(blocking=False)))
        queue.close()
        return lost

    def _manager_async(self) -> float:
        from bridge.training.checkpointing.agreement import Ranks
        from bridge.training.checkpointing.formats import torch_dist
        from bridge.training.checkpointing.formats.options import SaveOptions
        from bridge.training.checkpointing.io.background_writer import Files, Patience

        undisturbed, begun, place = self._step(), time.perf_counter(), self._new()
        options = SaveOptions(strategy=self._planning)
        write, self._planning = torch_dist.plan_save(self._state(), place, {}, Ranks.current(), options)
        files = Files(write.direct.images if write.direct else [], [], place, "xxh3")
        writing = self._writer.write(files, "the writer", Patience(), lambda records, seconds: records)
        if writing is None or write.direct is None:
            raise RuntimeError("there is not enough memory for a copy of the tensors")
        result = write.direct.result()
        lost = time.perf_counter() - begun
        lost += self._beside(undisturbed, writing.poll)
        writing.result()
        begun = time.perf_counter()
        write.finish([result])
        return lost + time.perf_counter() - begun

    def _step(self) -> float:
        """The time of one step, the best of some."""
        return min(self._one_step() for _ in range(STEPS))

    def _one_step(self) -> float:
        begun = time.perf_counter()
        for tensor in self._tensors.values():
            tensor.neg_()
        return time.perf_counter() - begun

    def _beside(self, undisturbed: float, ended: Callable[[], bool]) -> float:
        """Make steps until a save has ended; return by how much longer they took. The polls count."""
        lost, steps, done = 0.0, 0, False
        while not done or steps < STEPS:
            begun = time.perf_counter()
            self._one_step()
            done = done or ended()
            lost += max(0.0, time.perf_counter() - begun - undisturbed)
            steps += 1
        return lost


if __name__ == "__main__":
    sys.exit(main())
