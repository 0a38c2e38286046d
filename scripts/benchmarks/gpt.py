"""Saves and loads of real training state on several ranks: this project beside megatron-core and the bare bytes.

    .venv/bin/python -m scripts.benchmarks.gpt [--layers N] [--hidden-size N] [--rounds N] [--warm-up N]
        [--ranks 1,2,4] [--directory DIR] [--json FILE] [--markdown FILE]

GPTs of megatron-core's with its distributed optimizer, dense and with experts. All ways save and load the same model
and optimizer, in turns, in the same processes. Seconds are those of the slowest rank.

    raw        writing and syncing as many bytes on each rank; copying them; reading them
    direct     this project's manager
    stock      the same with `io_backend: stock`
    megatron   megatron-core's strategies, with their plan cached

    save       a synchronous save, until storage has everything
    stall      what an asynchronous save holds up training, until it is found complete; nothing is computed beside it
    load       with the files in the page cache, applied to model and optimizer

At the end each way saves and loads once more, with everything overwritten in between, and all is compared.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks import _gpt, _ranks
from scripts.benchmarks._command import add_directory, command, hand_out

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dense, 1 rank": (1, {}),
    "MoE, 1 rank": (1, _gpt.MOE),
    "dense, TP2": (2, {"tensor_model_parallel_size": 2}),
    "MoE, EP2": (2, {**_gpt.MOE, "expert_model_parallel_size": 2}),
    "dense, TP2 x DP2": (4, {"tensor_model_parallel_size": 2}),
    "MoE, EP2 x DP2": (4, {**_gpt.MOE, "expert_model_parallel_size": 2}),
}
"""Ranks, and settings of the model."""
MEASURES = ("save", "stall", "load")
WAYS = ("raw", "direct", "stock", "megatron")
RATIOS = (("direct", "raw"), ("stock", "direct"), ("megatron", "direct"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases and write the table."""
    parser = command(__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted: megatron-core plans twice")
    parser.add_argument("--ranks", default="1,2,4", help="the cases for these numbers of ranks")
    add_directory(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    _ranks.import_all()
    chosen = {int(number) for number in options.ranks.split(",")}
    cases = {}
    for name, (ranks, model) in CASES.items():
        if ranks in chosen:
            with tempfile.TemporaryDirectory(dir=options.directory, ignore_cleanup_errors=True) as directory:
                shape = options.layers, options.hidden_size, model
                rounds = options.warm_up, options.rounds
                found = _ranks.on_ranks(_measure, ranks, Path(directory), *shape, *rounds)
            cases[name] = {"ranks": ranks, **found, "ratios": ratios(found["seconds"])}
    report = {"rounds": options.rounds, "cases": cases}
    hand_out(report, markdown(report), options)
    return 0 if all(case["is what it was"] for case in cases.values()) else 1


def ratios(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """By measure and pair of ways, how many times as long the first takes: the median of all rounds."""
    return {
        measure: {
            f"{slow} / {fast}": statistics.median(
                a / b for a, b in zip(seconds[measure][slow], seconds[measure][fast], strict=True)
            )
            for slow, fast in RATIOS
        }
        for measure in MEASURES
    }


def _measure(
    directory: Path, layers: int, hidden: int, model: dict[str, Any], warm_up: int, rounds: int
) -> dict[str, Any]:
    """On every rank."""
    logging.disable(logging.ERROR)
    run = _gpt.gpt_run(directory / "direct", layers, hidden, model)
    _gpt.step(run)
    size = sum(tensor.nbytes for tensor in _gpt.tensors_of(_gpt.sharded_state(run)).values())
    ways = {
        "direct": _Ours(run),
        "stock": _Ours(_gpt.beside(run, directory / "stock", io_backend="stock")),
        "megatron": _Stock(run, directory / "megatron"),
    }
    ways["direct"].save()
    written = sum(file.stat().st_size for file in (directory / "direct").rglob("*.distcp"))
    raw = _Raw(directory, written // int(os.environ["WORLD_SIZE"]), size)
    actions: dict[str, dict[str, Callable[[], float]]] = {
        "save": {"raw": raw.save, **{name: way.save for name, way in ways.items()}},
        "load": {"raw": raw.load, **{name: way.load for name, way in ways.items()}},
        "stall": {"raw": raw.copy, **{name: way.stall for name, way in ways.items()}},
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in MEASURES}
    for number in range(warm_up + rounds):
        for measure, by_way in actions.items():
            for way, action in by_way.items():
                taken = action()
                if number >= warm_up:
                    seconds[measure][way].append(taken)
    return {"bytes": written, "seconds": seconds, "is what it was": _is_restored(run, ways)}


def _is_restored(run: Any, ways: dict[str, Any]) -> bool:
    """Save and load by each way, with what was there overwritten in between; whether all is as it was, on all ranks."""
    import torch

    before = {name: tensor.clone() for name, tensor in _gpt.live_tensors(run).items()}
    same = True
    for way in ways.values():
        way.save()
        for tensor in _gpt.live_tensors(run).values():
            tensor.zero_()
        way.load()
        after = _gpt.live_tensors(run)
        same = same and after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    return _ranks.slowest(0.0 if same else 1.0) == 0.0


class _Ours:
    """This project's manager."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def save(self) -> float:
        self._run.cfg.checkpoint.async_save = False
        self._run.state.train_state.step += 1
        return _ranks.timed(lambda: _gpt.save(self._run))

    def stall(self) -> float:
        self._run.cfg.checkpoint.async_save = True
        self._run.state.train_state.step += 1
        return _stall(lambda: _gpt.save(self._run), lambda: _gpt.is_saved(self._run))

    def load(self) -> float:
        _ranks.read_into_cache(Path(self._run.cfg.checkpoint.save))  # our writer passes the page cache by
        saved = self._run.state.train_state.step
        self._run.state.train_state.step = 0
        seconds = _ranks.timed(lambda: _gpt.load(self._run))
        if self._run.state.train_state.step != saved:
            raise RuntimeError(f"iteration {self._run.state.train_state.step} was loaded, and {saved} was saved")
        return seconds


class _Stock:
    """megatron-core alone."""

    def __init__(self, run: Any, directory: Path) -> None:
        self._megatron, self._directory, self._saves = _gpt.Megatron(run), directory, 0
        directory.mkdir(exist_ok=True)

    def save(self) -> float:
        place = self._new()
        return _ranks.timed(lambda: self._megatron.save(place, background=False))

    def stall(self) -> float:
        place = self._new()
        return _stall(lambda: self._megatron.save(place, background=True), self._megatron.is_saved)

    def load(self) -> float:
        return _ranks.timed(lambda: self._megatron.load(self._directory / str(self._saves)))

    def _new(self) -> Path:
        import torch.distributed as dist

        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._directory / str(self._saves), ignore_errors=True)
            (self._directory / str(self._saves + 1)).mkdir()
        dist.barrier()
        self._saves += 1
        return self._directory / str(self._saves)


class _Raw:
    """The bytes alone."""

    def __init__(self, directory: Path, share: int, size: int) -> None:
        import torch
        import torch.distributed as dist

        self._place = directory / f"raw{dist.get_rank()}"
        self._source = torch.randint(0, 255, (max(1, share),), dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)
        self._loaded = torch.zeros(max(1, size), dtype=torch.uint8)

    def save(self) -> float:
        def write() -> None:
            with self._place.open("wb", buffering=0) as file:
                view, done = memoryview(self._source.numpy()), 0
                while done < len(view):
                    done += file.write(view[done:])
                os.fsync(file.fileno())

        return _ranks.timed(write)

    def copy(self) -> float:
        return _ranks.timed(lambda: self._target.copy_(self._source))

    def load(self) -> float:
        """As many bytes as this rank has in memory; from its own file, over again if that is shorter."""

        def read() -> None:
            view, done = memoryview(self._loaded.numpy()), 0
            with self._place.open("rb", buffering=0) as file:
                while done < len(view):
                    count = file.readinto(view[done:])
                    done += count
                    if not count:
                        file.seek(0)

        return _ranks.timed(read)


def _stall(begin: Callable[[], None], is_saved: Callable[[], bool]) -> float:
    """Begin a save and wait for it; the seconds of the slowest rank in which training would have stood still."""
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    begin()
    stall = time.perf_counter() - begun
    done = False
    while not done:
        time.sleep(0.02)
        asked = time.perf_counter()
        done = is_saved()
        stall += time.perf_counter() - asked
    return _ranks.slowest(stall)


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    lines = [
        f"Seconds of the slowest rank, median of {report['rounds']} rounds; in brackets, times `direct`.",
        "",
        "| model and ranks | MiB | measure | raw | direct | stock | megatron |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        for measure in MEASURES:
            middle = {way: statistics.median(case["seconds"][measure][way]) for way in WAYS}
            found = case["ratios"][measure]
            lines.append(
                f"| {name} | {case['bytes'] / 2**20:,.0f} | {measure} | {middle['raw']:.3f} "
                f"({1 / found['direct / raw']:.2f}) | {middle['direct']:.3f} "
                f"| {middle['stock']:.3f} ({found['stock / direct']:.1f}) "
                f"| {middle['megatron']:.3f} ({found['megatron / direct']:.1f}) |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
