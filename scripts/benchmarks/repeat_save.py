"""Time to plan a save: the first of a structure and the repeated ones.

    .venv/bin/python -m scripts.benchmarks.repeat_save [--tensors N] [--ranks N] [--saves N] [--alone] [--json FILE]

Planning is what holds up training before the first byte is copied or written: preparing the state, comparing and
validating it, sharing out the writing, exchanging plans. The state is many small tensors, half of them copied on
every rank and half of them sharded. All ways plan the same state in turns, in the same processes:

    anew            every save plans as the first one of a run does
    reused          a repeated save compares structures and plans nothing
    megatron        megatron-core's strategies as Megatron-LM sets them up without ckpt_assume_constant_structure
    megatron cached the same with it: nothing is compared, so a changed structure is not noticed

Times are of the slowest rank; "repeated" is the median of the third save and those after it, because megatron-core
plans its second save too.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PEER = "megatron cached"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=8, help="of each way; at least 3")
    parser.add_argument("--alone", action="store_true", help="the main replica writes; by default ranks share")
    parser.add_argument("--json", type=Path, help="write the times to this file too")
    options = parser.parse_args(arguments)
    if options.saves < 3:
        parser.error("--saves must be at least 3")
    warnings.simplefilter("ignore")
    from bridge import accelerator

    accelerator.enable()
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as directory:
        # Forked, so that the ranks need not import again what the parent has.
        multiprocessing.start_processes(_rank, (Path(directory), options), nprocs=options.ranks, start_method="fork")
        seconds = json.loads((Path(directory) / "seconds.json").read_text())
    if options.json is not None:
        report = {"tensors": options.tensors, "ranks": options.ranks, "seconds": seconds}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    _print(seconds)
    return 0


def _print(seconds: dict[str, list[float]]) -> None:
    repeated = {way: statistics.median(times[2:]) for way, times in seconds.items()}
    print(f"{'way':<16} {'first':>9} {'repeated':>9} {'first / repeated':>17} {'repeated / peer':>16}")
    for way, times in seconds.items():
        print(
            f"{way:<16} {times[0] * 1e3:>6.0f} ms {repeated[way] * 1e3:>6.0f} ms "
            f"{times[0] / repeated[way]:>17.1f} {repeated[way] / repeated[PEER]:>16.2f}"
        )


def _rank(rank: int, directory: Path, options: argparse.Namespace) -> None:
    """Plan with every way in turns; rank 0 leaves the times in a file."""
    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    group = None if options.alone else dist.group.WORLD
    ways = {
        "anew": _ours(directory, group, reuse=False),
        "reused": _ours(directory, group, reuse=True),
        "megatron": _megatron(directory, group, cached=False),
        PEER: _megatron(directory, group, cached=True),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.saves):
        for way, plan in ways.items():
            state = _state(options.tensors, rank, options.ranks)
            dist.barrier()
            begun = time.perf_counter()
            plan(state)
            dist.barrier()
            seconds[way].append(time.perf_counter() - begun)
    if rank == 0:
        (directory / "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def _state(tensors: int, rank: int, ranks: int) -> dict[str, Any]:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    state = {}
    for index in range(tensors):
        key = f"decoder.layers.{index}.weight"
        place: dict[str, Any] = {"replica_id": rank}
        offsets = [] if index % 2 else [(0, rank, ranks)]
        state[key] = ShardedTensor.from_rank_offsets(key, torch.zeros(16), *offsets, **({} if offsets else place))
    return {"model": state}


def _ours(directory: Path, group: Any, *, reuse: bool) -> Callable[[dict[str, Any]], None]:
    from bridge.training.checkpointing.agreement import Ranks
    from bridge.training.checkpointing.formats.options import SaveOptions
    from bridge.training.checkpointing.formats.torch_dist import plan_save

    kept: list[Any] = [None]

    def plan(state: dict[str, Any]) -> None:
        options = SaveOptions(strategy=kept[0] if reuse else None, parallelization_group=group)
        _, kept[0] = plan_save(state, directory, {}, Ranks.current(), options)

    return plan


def _megatron(directory: Path, group: Any, *, cached: bool) -> Callable[[dict[str, Any]], None]:
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    filesystem_async._results_queue = object()  # or the first plan starts a server process that only writing needs
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1, cached_metadata=cached)
    if group is not None:
        strategy = FullyParallelSaveStrategyWrapper(strategy, group, cached)
    first = [True]

    def plan(state: dict[str, Any]) -> None:
        sharded, _ = save_preprocess(state, validate_access_integrity=first[0])
        strategy.async_save(sharded, directory)
        first[0] = False

    return plan


if __name__ == "__main__":
    sys.exit(main())
