"""Time to load a replicated state: on every rank, in two stages, and by megatron-core's way of sharing the reading.

    .venv/bin/python -m scripts.benchmarks.two_stage_load [--ranks N] [--mib N] [--tensor-mib N] [--loads N]
                                                          [--store-mb-per-s N]

Every rank wants the same tensors. All ways load them in turns, in the same processes, from one torch_dist checkpoint:

    plain      checkpoint.fully_parallel_load: false; every rank reads everything
    two-stage  true; each tensor is read once and sent to the other ranks
    auto       what `auto` chooses, measuring included
    megatron   stock megatron-core's FullyParallelLoadStrategyWrapper around its own strategy

The files lie in the page cache of this machine, which all ranks read faster than they send to one another: there two
stages can only lose. --store-mb-per-s makes all ranks together wait as if they read from one store of that speed.
Times are of the slowest rank, the median of the loads after the first; the ratio is how many times as fast as plain.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import queue
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
WAYS = ("plain", "two-stage", "auto", "megatron")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mib", type=int, default=256, help="size of the state")
    parser.add_argument("--tensor-mib", type=int, default=8)
    parser.add_argument("--loads", type=int, default=4, help="of each way; at least 2")
    parser.add_argument("--store-mb-per-s", type=float, help="the speed of a simulated store that all ranks share")
    options = parser.parse_args(arguments)
    if options.loads < 2:
        parser.error("--loads must be at least 2")
    warnings.simplefilter("ignore")
    from bridge import accelerator

    accelerator.enable()
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as directory:
        # Forked, so that the ranks need not import again what the parent has.
        multiprocessing.start_processes(_rank, (Path(directory), options), nprocs=options.ranks, start_method="fork")
        found = json.loads((Path(directory) / "found.json").read_text())
    _print(found, options)
    return 0


def _print(found: dict[str, Any], options: argparse.Namespace) -> None:
    store = "the page cache" if not options.store_mb_per_s else f"one store of {options.store_mb_per_s:g} MB/s"
    print(f"{options.ranks} ranks load the same {options.mib} MiB, from {store}")
    seconds = {way: statistics.median(times[1:]) for way, times in found["seconds"].items()}
    print(f"{'way':<10} {'first':>9} {'repeated':>9} {'plain / way':>12}")
    for way, times in found["seconds"].items():
        print(f"{way:<10} {times[0]:>7.2f} s {seconds[way]:>7.2f} s {seconds['plain'] / seconds[way]:>12.2f}")
    print(found["summary"])
    print(f"auto: {found['choice']}")


@dataclass
class SharedStore:
    """A load strategy whose ranks wait for one another as if they read from one store. For megatron-core, it is one."""

    base: Any
    lock: Path
    bytes_per_s: float

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """As the strategy's; collective."""
        self._wait(sharded_state_dict)
        return self.base.load(sharded_state_dict, checkpoint_dir)

    def _wait(self, sharded_state_dict: Any) -> None:
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        for item in nested_values(sharded_state_dict):
            with self.lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # one tensor at a time, so that ranks take turns
                time.sleep(item.data.nbytes / self.bytes_per_s)


class SharedStoreAlone(SharedStore):
    """The same around a strategy that reads alone."""

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """As the strategy's."""
        read = self.base.prepare_alone(sharded_state_dict, checkpoint_dir)

        def wait_and_read() -> Any:
            self._wait(sharded_state_dict)
            return read()

        return wait_and_read


def _rank(rank: int, directory: Path, options: argparse.Namespace) -> None:
    """Load with every way in turns; rank 0 leaves what it found in a file."""
    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    checkpoint = directory / "checkpoint"
    _save(_state(options, rank, 1.0), checkpoint)
    group = dist.new_group()
    state = _state(options, rank, 0.0)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    summary = choice = ""
    for _ in range(options.loads):
        for way in WAYS:
            for item in state.values():
                item.data.zero_()
            strategy = _strategy(way, checkpoint, group, options)
            dist.barrier()
            begun = time.perf_counter()
            loaded = strategy.load(dict(state), checkpoint)
            dist.barrier()
            seconds[way].append(time.perf_counter() - begun)
            if not all(bool((tensor == 1).all()) for tensor in loaded.values()):
                raise SystemExit(f"{way} loaded other values than were saved")
            if way == "two-stage":
                summary = strategy.summarize_load_times()
            if way == "auto":
                choice = strategy.choice.reason
    if rank == 0:
        (directory / "found.json").write_text(json.dumps({"seconds": seconds, "summary": summary, "choice": choice}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive the group


def _state(options: argparse.Namespace, rank: int, value: float) -> dict[str, Any]:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rows = options.tensor_mib * MIB // 4096
    return {
        key: ShardedTensor.from_rank_offsets(key, torch.full((rows, 1024), value), replica_id=rank)
        for key in (f"decoder.layers.{index}.weight" for index in range(options.mib // options.tensor_mib))
    }


def _save(state: dict[str, Any], checkpoint: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if dist.get_rank() == 0:
        checkpoint.mkdir()
    dist.barrier()
    filesystem_async._results_queue = queue.Queue()  # or it starts a server process, which takes seconds
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(checkpoint), strategy)


def _strategy(way: str, checkpoint: Path, group: Any, options: argparse.Namespace) -> Any:
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from bridge.training.checkpointing.agreement import Ranks
    from bridge.training.checkpointing.formats.read_choice import Measured
    from bridge.training.checkpointing.formats.strategies import load_strategy
    from bridge.training.checkpointing.formats.two_stage import two_stage

    strategy: Any = TorchDistLoadShardedStrategy() if way == "megatron" else load_strategy(checkpoint)
    if options.store_mb_per_s:
        slowed = SharedStoreAlone if hasattr(strategy, "prepare_alone") else SharedStore
        strategy = slowed(strategy, checkpoint.parent / "lock", options.store_mb_per_s * 1e6)
    if way == "megatron":
        return FullyParallelLoadStrategyWrapper(strategy, group)
    return two_stage(
        strategy, {"plain": None, "two-stage": group, "auto": Measured(group, small_bytes=0)}[way], Ranks.current()
    )


if __name__ == "__main__":
    sys.exit(main())
