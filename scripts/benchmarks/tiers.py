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
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    from bridge import accelerator

    accelerator.enable()
    import megatron.core  # noqa: F401  (imported here so that the ranks need not)

    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = Path(directory)
        results = _measured({tier: root / str(number) for number, tier in enumerate(tiers)}, options)
        size = sum(file.stat().st_size for file in (root / "0" / "run" / "iter_0000001").rglob("*.distcp"))
        raw = _on_ranks(_machine, options.ranks, root, size // options.ranks)
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
            saves[tier] = _on_ranks(_save, options.ranks, tier, root, options)
        for _ in range(options.restarts):
            for tier, root in places.items():
                restarts[tier].append(_on_ranks(_restart, options.ranks, tier, root, options))
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


def _on_ranks(work: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """Call `work` on forked ranks; what rank 0 returns."""
    import socket

    import torch.multiprocessing as multiprocessing

    with socket.socket() as probe, tempfile.TemporaryDirectory() as directory:
        probe.bind(("127.0.0.1", 0))
        result = Path(directory) / "result.json"
        variables = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        variables["MASTER_PORT"] = probe.getsockname()[1]
        probe.close()
        # Forked, so that the ranks need not import again what the parent has.
        multiprocessing.start_processes(_rank, (work, variables, result, arguments), ranks, start_method="fork")
        return json.loads(result.read_text())


def _rank(rank: int, work: Callable[..., Any], variables: dict[str, Any], result: Path, arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()})
    found = work(*arguments)
    if rank == 0:
        result.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
    # As a crash: what outlives the trainer must not hear of its end.
    os._exit(0)


def _timed(action: Callable[[], Any]) -> float:
    """Seconds until the slowest rank has finished."""
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    action()
    return _slowest(time.perf_counter() - begun)


def _slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _setup(tier: str, root: Path, options: argparse.Namespace) -> Any:
    from bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DatasetConfig,
        GPTModelConfig,
        TokenizerConfig,
        TrainingConfig,
    )
    from bridge.training.setup import setup

    settings = dict(TIERS[tier])
    if settings.get("non_persistent_ckpt_type"):
        settings["non_persistent_save_interval"] = 1
    if settings.get("non_persistent_ckpt_type") == "local":
        settings["non_persistent_local_ckpt_dir"] = str(root / "local")
    cfg = ConfigContainer(
        model=GPTModelConfig(
            num_layers=options.layers, hidden_size=options.hidden_size, num_attention_heads=8, seq_length=32
        ),
        train=TrainingConfig(train_iters=1000, micro_batch_size=1, global_batch_size=options.ranks),
        dataset=DatasetConfig(mock=True),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        checkpoint=CheckpointConfig(save=str(root / "run"), save_interval=1000, **settings),
    )
    cfg.logger.log_level = "ERROR"
    return setup(cfg)


def _save(tier: str, root: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Save several times; the seconds of each stall, and until each was complete."""
    import torch.distributed as dist

    from bridge.training.checkpointing import CheckpointSaveContext, is_empty_async_queue

    run = _setup(tier, root, options)
    stalls, completions = [], []
    for iteration in range(1, options.saves + 1):
        run.state.train_state.step = iteration
        context = CheckpointSaveContext(
            run.state,
            run.model,
            run.optimizer,
            run.scheduler,
            0,
            run.train_data_iterator,
            non_persistent_ckpt=run.cfg.checkpoint.non_persistent_ckpt_type is not None,
            pg_collection=run.pg_collection,
        )
        dist.barrier()
        begun = time.perf_counter()
        run.manager.save(context, None)
        stall = time.perf_counter() - begun
        while not is_empty_async_queue(run.state):
            time.sleep(0.02)
            asked = time.perf_counter()
            run.manager.finalize_async_saves(run.state)
            stall += time.perf_counter() - asked
        completions.append(_slowest(time.perf_counter() - begun))
        stalls.append(_slowest(stall))
    return stalls, completions


def _restart(tier: str, root: Path, options: argparse.Namespace) -> list[float]:
    """Load twice; the first time without what the machine has in its file cache."""
    from bridge.training.checkpointing import CheckpointLoadContext

    run = _setup(tier, root, options)
    run.cfg.checkpoint.load = run.cfg.checkpoint.save
    context = CheckpointLoadContext(run.state, run.model, run.optimizer, run.scheduler, pg_collection=run.pg_collection)
    seconds = []
    for is_cached in (False, True):
        run.state.train_state.step = 0
        if not is_cached:
            _forget_files(root)
        seconds.append(_timed(lambda: run.manager.load(context)))
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
        "copy": min(_timed(lambda: target.copy_(source)) for _ in range(3)),
        "write": min(_timed(write) for _ in range(3)),
    }
    _forget_files(root)
    seconds["read"] = _timed(read)
    seconds["read cached"] = min(_timed(read) for _ in range(3))
    return seconds


if __name__ == "__main__":
    sys.exit(main())
