"""`bridge-ckpt convert`: a checkpoint in another format."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

DESCRIPTION = """Publish a checkpoint in another format. Every tensor, object and file of it arrives, under the same
names and with the same values.

SRC is a checkpoint, or a directory of checkpoints, of which the tracked one is taken; it is only read. DST is a
directory of checkpoints, which need not exist. A conversion that was cut short continues when it is started again."""

_SECONDS = 0.5
"""Between two lines of progress."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "convert",
        help="publish a checkpoint in another format",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint, or a directory of checkpoints")
    parser.add_argument("destination", metavar="DST", type=Path, help="the directory of checkpoints to publish it in")
    parser.add_argument("--format", required=True, choices=("torch_dist", "zarr", "fsdp_dtensor"), help="to convert to")
    parser.add_argument("--step", type=int, metavar="N", help="the iteration to take, instead of the tracked one")
    parser.add_argument(
        "--memory-gib", type=float, default=4.0, metavar="GIB", help="what all processes hold at most (default: 4)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="that work at the same time (default: one a core, at most 4; 1 for less than a GiB)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check the source first and compare everything with it afterwards (default: yes)",
    )
    parser.add_argument("--force", action="store_true", help="replace DST's checkpoint of this iteration")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument(
        "--safe-global",
        metavar="CLASS",
        action="append",
        default=[],
        help="module.Class of the run's checkpoint.safe_globals; may be given several times",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.conversion.processes import give_memory_back
    from bridge.training.checkpointing.convert import convert

    give_memory_back()
    progress = Progress() if sys.stderr.isatty() else None
    try:
        converted = convert(
            options.source.expanduser(),
            options.destination.expanduser(),
            options.format,
            step=options.step,
            memory=int(options.memory_gib * 2**30),
            processes=options.processes,
            verify=options.verify,
            force=options.force,
            safe_globals=options.safe_global,
            report=progress,
        )
    except KeyboardInterrupt:
        print("interrupted; start the conversion again to continue it", file=sys.stderr)
        return 130
    finally:
        if progress is not None:
            progress.clear()
    if options.json:
        print(json.dumps(asdict(converted), default=str, indent=1))
        return 0
    reused = f", {converted.parts_reused} of {converted.parts} parts from before" if converted.parts_reused else ""
    print(
        f"converted {converted.source} ({converted.source_format}) to {converted.path} ({converted.target_format}): "
        f"{converted.tensors} tensors, {converted.objects} objects, {converted.total_bytes / 2**20:.1f} MiB in "
        f"{converted.seconds:.1f} s{reused}; {'compared with the source' if converted.verified else 'not compared'}"
    )
    print(converted.trackers)
    return 0


class Progress:
    """A line on the terminal that tells how far each step is, how fast it goes, and how long it is going to take."""

    def __init__(self) -> None:
        self._step = ""
        self._started = self._shown = 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show it, if it is long enough that something was shown."""
        now = time.monotonic()
        if step != self._step:
            self._step, self._started, self._shown = step, now, 0.0
        if now - self._shown < _SECONDS:
            return
        self._shown = now
        print(f"\r\x1b[K{progress_line(step, done, total, now - self._started)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def progress_line(step: str, done: int, total: int, seconds: float) -> str:
    """One line of progress.

    Args:
        step: what is being done.
        done: bytes.
        total: bytes.
        seconds: since the step began.
    """
    line = f"{step} {done / 2**30:.2f} of {total / 2**30:.2f} GiB"
    if not done or seconds <= 0:
        return line
    left = int((total - done) * seconds / done)
    return f"{line}, {done / 2**20 / seconds:.0f} MiB/s, {left // 60}:{left % 60:02d} left"
