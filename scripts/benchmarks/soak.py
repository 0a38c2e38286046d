"""Does a long run leak? Many asynchronous saves with retention, and what the ranks hold on to after each.

    .venv/bin/python -m scripts.benchmarks.soak [--saves N] [--ranks N] [--keep N] [--directory D] [--json FILE]

Ranks train a tiny model and save after every iteration. Whenever a checkpoint is published, each rank counts what it
holds, and rank 0 reads the checkpoint back and compares every file with its checksum. At the end, the value after the
warm-up, the last one, and the slope of a line through all after the warm-up, for each 1,000 saves:

    file descriptors    open in a rank
    processes           started by a rank and still there, zombies too
    shared memory       MiB of the machine's, with what others use of it
    resident memory     MiB of a rank that it shares with no other process

A writer of the next save may be starting or ending when a count is made, so the first two go up and down by a few.
The exit status is 1 if a checkpoint is not as it was written.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks._ranks import free_port

WARM_UP = 0.1
"""The part of the saves that slopes leave out: memory is found and caches fill."""
MEASURES = ("file descriptors", "processes", "shared memory", "resident memory")


@dataclass(frozen=True)
class Trend:
    """How one measure of one rank went."""

    rank: int
    measure: str
    first: float
    """After the warm-up."""
    last: float
    highest: float
    slope: float
    """For each 1,000 saves."""


@dataclass(frozen=True)
class Result:
    """What a soak has found."""

    published: int
    damaged: list[str]
    kept: int
    """Checkpoints that are there at the end."""
    seconds: float
    trends: list[Trend]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--keep", type=int, default=3, help="checkpoints that retention keeps")
    parser.add_argument("--directory", type=Path, help="where to save; by default the system's place for such things")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    if options.saves < 10:
        parser.error("--saves must be at least 10")
    result = soak(options.saves, options.ranks, options.keep, options.directory)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=1))
    print(f"{result.published} checkpoints published in {result.seconds:.0f} s, {result.kept} of them kept")
    print(f"{'rank':>4} {'':<18} {'first':>9} {'last':>9} {'highest':>9} {'per 1,000 saves':>16}")
    for trend in result.trends:
        numbers = f"{trend.first:>9.1f} {trend.last:>9.1f} {trend.highest:>9.1f} {trend.slope:>+16.2f}"
        print(f"{trend.rank:>4} {trend.measure:<18} {numbers}")
    for line in result.damaged:
        print(line)
    print(f"checkpoints that are not as they were written: {len(result.damaged)}")
    return 1 if result.damaged or result.published != options.saves else 0


def soak(saves: int, ranks: int, keep: int, directory: Path | None = None) -> Result:
    """Make the saves on forked ranks and collect what each has counted.

    Args:
        saves: how many, at least 10.
        ranks: data-parallel ranks.
        keep: `checkpoint.most_recent_k`.
        directory: where to save; None: the system's place for temporary files.

    Raises:
        RuntimeError: a rank failed.
    """
    import torch.multiprocessing as multiprocessing

    warnings.simplefilter("ignore")
    from bridge import accelerator

    accelerator.enable()
    import megatron.core  # noqa: F401  (imported here so that the ranks need not)

    with tempfile.TemporaryDirectory(dir=directory) as place:
        begun = time.monotonic()
        arguments = (ranks, free_port(), saves, keep, Path(place))
        multiprocessing.start_processes(_rank, arguments, ranks, start_method="fork")
        seconds = time.monotonic() - begun
        found = [json.loads((Path(place) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        kept = len(list((Path(place) / "save").glob("iter_*")))
    trends = [
        _trend(rank, measure, [sample[number] for sample in found[rank]["samples"]])
        for rank in range(ranks)
        for number, measure in enumerate(MEASURES)
    ]
    return Result(len(found[0]["samples"]), found[0]["damaged"], kept, seconds, trends)


def _rank(rank: int, ranks: int, port: int, saves: int, keep: int, place: Path) -> None:
    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    from bridge.training.callbacks import CallbackContext, CallbackManager
    from bridge.training.train import pretrain

    samples: list[list[float]] = []
    damaged: list[str] = []

    def published(context: CallbackContext) -> None:
        samples.append(_sample())
        if rank == 0 and context.checkpoint is not None:
            damaged.extend(_damage(context.checkpoint.path))
            if sys.stderr.isatty():
                print(f"\r{len(samples)} of {saves}", end="", file=sys.stderr, flush=True)

    callbacks = CallbackManager()
    callbacks.register("on_checkpoint_save", published)
    # It writes to all that a rank has in common with the process that it was forked from, which then is its own. The
    # interpreter does so at some time by itself, and that would look like growth.
    gc.collect()
    pretrain(_config(place / "save", saves, keep), callbacks)
    (place / f"rank{rank}.json").write_text(json.dumps({"samples": samples, "damaged": damaged}))


def _config(save: Path, saves: int, keep: int) -> Any:
    from bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DatasetConfig,
        GPTModelConfig,
        TokenizerConfig,
        TrainingConfig,
    )

    return ConfigContainer(
        model=GPTModelConfig(
            num_layers=1, hidden_size=32, num_attention_heads=2, seq_length=16, make_vocab_size_divisible_by=16
        ),
        train=TrainingConfig(train_iters=saves, micro_batch_size=2, global_batch_size=8),
        dataset=DatasetConfig(mock=True),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        checkpoint=CheckpointConfig(save=str(save), save_interval=1, async_save=True, most_recent_k=keep),
    )


def _damage(path: Path) -> list[str]:
    from bridge.training.checkpointing.integrity import find_damage, read_manifest

    manifest = read_manifest(path)
    if manifest is None:
        return [f"{path.name} has no manifest"]
    return [f"{path.name}: {problem}" for problem in find_damage(path, manifest.files, checksums=True)]


def _sample() -> list[float]:
    return [
        float(len(list(Path("/proc/self/fd").iterdir()))),
        float(_children()),
        _kilobytes(Path("/proc/meminfo"), "Shmem") / 1024,
        _kilobytes(Path("/proc/self/smaps_rollup"), "Private_Clean", "Private_Dirty") / 1024,
    ]


def _children() -> int:
    """Processes below this one, of all its threads."""
    waiting, count = [os.getpid()], 0
    while waiting:
        process = waiting.pop()
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found = [int(number) for number in task.read_text().split()]
            except OSError:  # it has ended meanwhile
                continue
            count += len(found)
            waiting += found
    return count


def _kilobytes(file: Path, *names: str) -> float:
    wanted = {f"{name}:" for name in names}
    lines = [line.split() for line in file.read_text().splitlines()]
    return float(sum(int(words[1]) for words in lines if words[0] in wanted))


def _trend(rank: int, measure: str, values: list[float]) -> Trend:
    values = values[int(len(values) * WARM_UP) :]
    return Trend(rank, measure, values[0], values[-1], max(values), 1000 * slope(values))


def slope(values: Sequence[float]) -> float:
    """Of the straight line nearest to values at 0, 1, 2 ..., by least squares."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((number - middle) ** 2 for number in range(len(values)))
    return sum((number - middle) * (value - mean) for number, value in enumerate(values)) / spread if spread else 0.0


if __name__ == "__main__":
    sys.exit(main())
