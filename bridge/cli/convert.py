"""`bridge-ckpt convert`: a checkpoint in another format."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bridge.cli.output import (
    UPLOAD_AFTERWARDS,
    Output,
    directory_argument,
    output_options,
    safe_global_option,
)
from bridge.cli.preparing import enable
from bridge.cli.tensors import memory_option
from bridge.training.progress import Progress

DESCRIPTION = """Publish a checkpoint in another format. Every tensor, object and file of it arrives, under the same
names and with the same values.

SRC is a checkpoint, or a directory of checkpoints, of which the tracked one is taken; it is only read. DST is a
directory of checkpoints, which need not exist. A conversion that was cut short continues when it is started again."""


@click.command("convert", help=DESCRIPTION, short_help="publish a checkpoint in another format")
@directory_argument("source", "SRC")
@directory_argument("destination", "DST", otherwise=UPLOAD_AFTERWARDS)
@click.option(
    "--format",
    "target_format",
    required=True,
    type=click.Choice(["torch_dist", "zarr", "fsdp_dtensor"]),
    help="to convert to",
)
@click.option("--step", type=int, metavar="N", help="the iteration to take, instead of the tracked one")
@memory_option(4.0, "what all processes hold at most")
@click.option(
    "--processes",
    type=int,
    metavar="N",
    help="that work at the same time (default: one a core, at most 4; 1 for less than a GiB)",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    help="check the source first and compare everything with it afterwards (default: yes)",
)
@click.option("--force", is_flag=True, help="replace DST's checkpoint of this iteration")
@safe_global_option
@output_options
def command(
    source: Path,
    destination: Path,
    target_format: str,
    step: int | None,
    memory: int,
    processes: int | None,
    verify: bool,
    force: bool,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> int:
    """Carry it out; return the exit status."""
    enable()
    from bridge.training.checkpointing.conversion.processes import give_memory_back
    from bridge.training.checkpointing.convert import convert

    give_memory_back()
    output = Output(as_json, quiet)
    progress = Progress(quiet=quiet)
    try:
        converted = convert(
            source,
            destination,
            target_format,
            step=step,
            memory=memory,
            processes=processes,
            verify=verify,
            force=force,
            safe_globals=safe_globals,
            report=progress,
        )
    except KeyboardInterrupt:
        print("interrupted; start the conversion again to continue it", file=sys.stderr)
        return 130
    finally:
        progress.clear()
    output.result(converted)
    reused = f", {converted.parts_reused} of {converted.parts} parts from before" if converted.parts_reused else ""
    output.line(
        f"converted {converted.source} ({converted.source_format}) to {converted.path} ({converted.target_format}): "
        f"{converted.tensors} tensors, {converted.objects} objects, {converted.total_bytes / 2**20:.1f} MiB in "
        f"{converted.seconds:.1f} s{reused}; {'compared with the source' if converted.verified else 'not compared'}"
    )
    output.line(converted.trackers)
    return 0
