"""`bridge-ckpt verify`: whether all checkpoints are sound."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.output import Output, count_text, output_options, place_argument, plain, safe_global_option, size_text
from bridge.training.object_url import ObjectUrl
from bridge.training.progress import Progress

if TYPE_CHECKING:
    from bridge.training.checkpointing.catalog import Verification, Verified

DESCRIPTION = """Check every published checkpoint in DIR, global non-persistent ones in DIR/non_persistent included:
each file against the size and the checksum that the manifest says, and the trackers against the checkpoints. DIR may
be one checkpoint, or a place in object storage, s3://bucket/prefix: its objects are read and not kept.

The exit status is 0 only if all of them are sound. Nothing is changed."""

_PATIENCE = 2.0
"""Seconds for a block of a file to be read."""


@click.command("verify", help=DESCRIPTION, short_help="check that checkpoints are sound, file by file")
@place_argument()
@click.option("--step", type=int, metavar="N", help="only the checkpoint of this iteration")
@click.option(
    "--level",
    type=click.Choice(["sizes", "full"]),
    default="full",
    help="full reads every byte (default); sizes compares sizes, and the contents of small files",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="that read (default: one a core, at most 8)")
@safe_global_option
@output_options
def command(
    directory: Path | ObjectUrl,
    step: int | None,
    level: Any,
    threads: int | None,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.catalog.reading import THREADS
    from bridge.training.checkpointing.safety.safe_globals import allow

    allow(safe_globals)
    output = Output(as_json, quiet)
    progress = Progress(quiet=quiet)

    def show(verified: Verified) -> None:
        progress.clear()
        for line in lines_of(verified, Path(str(directory)), quiet=quiet):
            output.line(line)

    try:
        found = _check(directory, step=step, level=level, threads=threads, report=progress, done=show)
    except KeyboardInterrupt:
        _end_threads(THREADS)
        raise
    finally:
        progress.clear()
    output.result(_for_programs(found))
    for problem in found.problems:
        output.line(f"DAMAGED TRACKER: {problem}")
    output.line(summary(found))
    if not all(each.is_sound for each in found.checkpoints):
        output.hint("A run passes over damaged checkpoints, unless checkpoint.ckpt_step names one.")
    for each in found.to_repair:
        output.hint(f"To set the trackers right: bridge-ckpt repair {each}")
    return 0 if found.is_sound else 1


def _check(place: Path | ObjectUrl, **how: Any) -> Verification:
    if isinstance(place, ObjectUrl):
        from bridge.training.checkpointing.catalog.buckets.verifying import verify_bucket

        return verify_bucket(place, **how)
    from bridge.training.checkpointing.catalog import verify_directory

    return verify_directory(place, **how)


def _for_programs(found: Verification) -> dict[str, Any]:
    checkpoints = [{**plain(each), "path": each.place} for each in found.checkpoints]
    for each in checkpoints:
        del each["url"]
    values = {name: value for name, value in vars(found).items() if name != "url"}
    return {**values, "directory": found.place, "checkpoints": checkpoints, "is_sound": found.is_sound}


def _end_threads(prefix: str) -> None:
    """Wait a little for threads to notice that nobody needs them; what storage holds up for ever is left behind."""
    for thread in threading.enumerate():
        if thread.name.startswith(prefix):
            thread.join(_PATIENCE)
            if thread.is_alive():
                print("error: interrupted", file=sys.stderr, flush=True)
                os._exit(130)


def summary(found: Verification) -> str:
    """The last line."""
    total = count_text(len(found.checkpoints), "checkpoint")
    damaged = sum(not each.is_sound for each in found.checkpoints)
    if damaged:
        return f"{damaged} of {total} NOT SOUND"
    without = sum(not each.has_checksums for each in found.checkpoints)
    if without:
        sound = len(found.checkpoints) - without
        return f"{total}: {f'{sound} sound, ' if sound else ''}{without} without checksums{_how(found.level)}"
    return f"{total}, all sound{_how(found.level)}"


def _how(level: str) -> str:
    return "" if level == "full" else " as far as sizes and small files tell"


def lines_of(verified: Verified, directory: Path, *, quiet: bool = False) -> list[str]:
    """What is printed of one checkpoint in a directory."""
    path = verified.path
    name = str(path.relative_to(directory)) if directory in path.parents else path.name
    if verified.problems:
        return [f"{name}  DAMAGED  {problem}" for problem in verified.problems]
    if quiet:
        return []
    state = "sound" if verified.has_checksums else "whole"
    head = f"{name}  {state}  {count_text(verified.files, 'file')}, {size_text(verified.total_bytes)}"
    return [head, *(f"{name}  note: {note}" for note in verified.notes)]
