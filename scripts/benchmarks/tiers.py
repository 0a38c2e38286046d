"""What each tier costs: how long a save holds up training, when it counts, and how long a restart takes to load it.

    .venv/bin/python -m scripts.benchmarks.tiers [--layers N] [--hidden-size N] [--ranks N] [--saves N] [--restarts N]
        [--tiers 'NAME; NAME'] [--directory D]

Data-parallel ranks share out the same model and its optimizer. For each tier they save several times, and are then
lost; the next processes load what was saved, one tier after the other, several times over.

    stall     seconds that training waits for a save: in the save itself, and while it is found done and published
    complete  from the beginning of the save until a restart would take it
    restart   loading it in new processes, its files not in the machine's file cache
    cached    loading it once more

Stalls and completions are medians of the saves after the first two, in which memory is found and the plan is made.
Of restarts the shortest is given and the median: whatever else the machine does falls on all tiers alike.
Nothing is computed between the saves, so background writers have the cores for themselves. Times are of the slowest
rank. Each is compared with what the machine itself takes for the same bytes, divided among the ranks, in the same
run: copying them into memory that was touched before, writing and syncing them, reading them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks import _gpt, _ranks

WARM_UP = 2
"""Saves that are not counted."""
TIERS: dict[str, dict[str, Any]] = {
    "persistent, sync": {},
    "persistent, async": {"async_save": True},
    "global, async": {"non_persistent_ckpt_type": "global", "async_save": True},
    "local, sync": {"non_persistent_ckpt_type": "local"},
    "local, async": {"non_persistent_ckpt_type": "local", "async_save": True},
    "in memory": {"non_persistent_ckpt_type": "in_memory"},
}


@dataclass(frozen=True)
class Result:
    """Seconds for one tier."""

    stall: float
    complete: float
    restarts: list[float]
    cached: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all tiers and the machine, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5, help=f"of each tier; more than {WARM_UP}")
    parser.add_argument("--restarts", type=int, default=3, help="of each tier, in turns")
    first, *others = TIERS
    parser.add_argument("--tiers", default="; ".join(others), help=f"beside '{first}'; by default '%(default)s'")
    parser.add_argument("--directory", type=Path, help="where to save; by default the system's place for such things")
    options = parser.parse_args(arguments)
    if options.saves <= WARM_UP:
        parser.error(f"--saves must be more than {WARM_UP}")
    tiers = [first, *(name.strip() for name in options.tiers.split(";"))]
    if unknown := [name for name in tiers if name not in TIERS]:
        parser.error(f"--tiers: {unknown[0]!r} is none of '{'; '.join(TIERS)}'")
    warnings.simplefilter("ignore")
    _ranks.import_all()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = Path(directory)
        results = _measured({tier: root / str(number) for number, tier in enumerate(tiers)}, options)
        size = sum(file.stat().st_size for file in (root / "0" / "run" / "iter_0000001").rglob("*.distcp"))
        raw = _ranks.on_ranks(_machine, options.ranks, root, size // options.ranks)
    _print(results, raw, size)
    return 0


def _print(results: dict[str, Result], raw: dict[str, float], size: int) -> None:
    print(f"{size / 2**20:.0f} MiB; the machine itself: " + ", ".join(f"{way} {raw[way]:.2f} s" for way in raw))
    print("In brackets: times what the machine takes to copy (stall), to write or copy (complete), to read or copy.")
    print(f"{'tier':<18} {'stall':>15} {'complete':>15} {'restart':>15} {'cached':>15}")
    for tier, result in results.items():
        disk = tier != "in memory"
        seconds = {
            "stall": (result.stall, raw["copy"]),
            "complete": (result.complete, raw["write"] if disk else raw["copy"]),
            "restart": (min(result.restarts), raw["read"] if disk else raw["copy"]),
            "cached": (min(result.cached), raw["read cached"] if disk else raw["copy"]),
        }
        cells = [f"{taken:.2f} s ({taken / peer:.1f})" for taken, peer in seconds.values()]
        medians = f"medians of restarts {statistics.median(result.restarts):.2f} {statistics.median(result.cached):.2f}"
        print(f"{tier:<18} " + " ".join(f"{cell:>15}" for cell in cells), medians)


def _measured(places: dict[str, Path], options: argparse.Namespace) -> dict[str, Result]:
    from bridge.training.checkpointing.tiers.memory.keeper_readers import release_session
    from bridge.training.checkpointing.tiers.session import SESSION, session_of

    saves, restarts = {}, {tier: list[list[float]]() for tier in places}
    try:
        for tier, root in places.items():
            saves[tier] = _ranks.on_ranks(_save, options.ranks, tier, root, options, end=_ranks.crash)
        for _ in range(options.restarts):
            for tier, root in places.items():
                restarts[tier].append(_ranks.on_ranks(_restart, options.ranks, tier, root, options, end=_ranks.crash))
    finally:
        for root in places.values():
            if (root / "run" / SESSION).exists():
                release_session(session_of(root / "run"))
    results = {}
    for tier, (stalls, completions) in saves.items():
        first, second = zip(*restarts[tier], strict=True)
        median = [statistics.median(times[WARM_UP:]) for times in (stalls, completions)]
        results[tier] = Result(*median, list(first), list(second))
    return results


def _setup(tier: str, root: Path, options: argparse.Namespace) -> Any:
    settings: dict[str, Any] = {"most_recent_k": -1, **TIERS[tier]}
    if settings.get("non_persistent_ckpt_type"):
        settings["non_persistent_save_interval"] = 1
    if settings.get("non_persistent_ckpt_type") == "local":
        settings["non_persistent_local_ckpt_dir"] = str(root / "local")
    return _gpt.gpt_run(root / "run", options.layers, options.hidden_size, **settings)


def _save(tier: str, root: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Save several times; the seconds of each stall, and until each was complete."""
    import torch.distributed as dist

    from bridge.training.checkpointing import is_empty_async_queue

    run = _setup(tier, root, options)
    stalls, completions = [], []
    for iteration in range(1, options.saves + 1):
        run.state.train_state.step = iteration
        dist.barrier()
        begun = time.perf_counter()
        _gpt.save(run)
        stall, is_complete = time.perf_counter() - begun, is_empty_async_queue(run.state)
        while not is_complete:
            time.sleep(0.02)
            asked = time.perf_counter()
            is_complete = _gpt.is_saved(run)
            stall += time.perf_counter() - asked
        completions.append(_ranks.slowest(time.perf_counter() - begun))
        stalls.append(_ranks.slowest(stall))
    return stalls, completions


def _restart(tier: str, root: Path, options: argparse.Namespace) -> list[float]:
    """Load twice; the first time without what the machine has in its file cache."""
    run = _setup(tier, root, options)
    seconds = []
    for is_cached in (False, True):
        run.state.train_state.step = 0
        if not is_cached:
            _forget_files(root)
        seconds.append(_ranks.timed(lambda: _gpt.load(run)))
        if run.state.train_state.step != options.saves:
            raise RuntimeError(f"{tier}: loaded iteration {run.state.train_state.step}, not {options.saves}")
    return seconds


def _forget_files(root: Path) -> None:
    """Have the machine drop from its cache what it has of the files; they are on storage."""
    os.sync()
    for file in root.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _machine(root: Path, size: int) -> dict[str, float]:
    """Seconds that the machine takes for `size` bytes on every rank at once; the best of three, but cold reads once."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    place = root / f"raw{dist.get_rank()}"
    source = torch.randint(0, 255, (size,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    view = memoryview(target.numpy())

    def write() -> None:
        with place.open("wb", buffering=0) as file:
            file.write(memoryview(source.numpy()))
            os.fsync(file.fileno())

    def read() -> None:
        with place.open("rb", buffering=0) as file:
            done = 0
            while count := file.readinto(view[done:]):
                done += count

    seconds = {
        "copy": min(_ranks.timed(lambda: target.copy_(source)) for _ in range(3)),
        "write": min(_ranks.timed(write) for _ in range(3)),
    }
    _forget_files(root)
    seconds["read"] = _ranks.timed(read)
    seconds["read cached"] = min(_ranks.timed(read) for _ in range(3))
    return seconds


if __name__ == "__main__":
    sys.exit(main())
