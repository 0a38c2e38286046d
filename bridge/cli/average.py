"""`bridge-ckpt average`: the mean of a model over several iterations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli.export import exported_text
from bridge.cli.output import (
    UPLOAD_AFTERWARDS,
    Output,
    count_text,
    directory_argument,
    output_options,
    safe_global_option,
    size_text,
)
from bridge.cli.preparing import enable
from bridge.cli.tensors import WRITTEN, Written, export_options, memory_option, verify_option
from bridge.training.progress import Progress

if TYPE_CHECKING:
    from bridge.training.checkpointing.export.averaging import Averaged

DESCRIPTION = """Take the mean of a model's tensors over several iterations, and publish it as a checkpoint or write it
as safetensors files. The optimizer is left out: a run starts from the mean with checkpoint.pretrained_checkpoint.

SRC is a directory of checkpoints; it is only read. DST is another one, which need not exist; with --format safetensors
it is a new directory."""


@click.command("average", help=DESCRIPTION, short_help="take the mean of a model over several iterations")
@directory_argument("source", "SRC")
@directory_argument("destination", "DST", otherwise=UPLOAD_AFTERWARDS)
@click.option("--step", "steps", type=int, multiple=True, metavar="N", help="an iteration; given two times or more")
@click.option("--last", type=int, metavar="N", help="or how many of the newest iterations")
@click.option(
    "--format",
    "target_format",
    type=click.Choice(["torch_dist", "safetensors"]),
    default="torch_dist",
    help="a checkpoint, or files for other programs (default: torch_dist)",
)
@export_options
@memory_option()
@verify_option
@safe_global_option
@output_options
@click.pass_context
def command(
    context: click.Context,
    source: Path,
    destination: Path,
    steps: tuple[int, ...],
    last: int | None,
    target_format: str,
    written: Written,
    memory: int,
    verify: bool,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry it out."""
    if bool(steps) == (last is not None):
        raise click.UsageError("Name the iterations with --step, or say with --last how many.", context)
    if target_format != "safetensors":
        _refuse_export_options(context)
    enable()
    from bridge.training.checkpointing.conversion.processes import give_memory_back
    from bridge.training.checkpointing.export.averaging import average, export_average

    give_memory_back()
    output = Output(as_json, quiet)
    with Progress(quiet=quiet) as progress:
        if target_format == "safetensors":
            exported = export_average(
                source,
                destination,
                written.options(),
                steps=steps,
                last=last,
                memory=memory,
                verify_source=verify,
                safe_globals=safe_globals,
                report=progress,
            )
        else:
            averaged = average(
                source,
                destination,
                steps=steps,
                last=last,
                memory=memory,
                verify_source=verify,
                force=written.force,
                safe_globals=safe_globals,
                report=progress,
            )
    if target_format == "safetensors":
        output.result(exported)
        output.line(f"took the mean, and {exported_text(exported)}")
        return
    output.result(averaged)
    _print(output, averaged)


def _refuse_export_options(context: click.Context) -> None:
    for name in WRITTEN:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for --format safetensors.", context)


def _print(output: Output, averaged: Averaged) -> None:
    output.line(
        f"published the mean of iterations {', '.join(map(str, averaged.iterations))} as {averaged.path}: "
        f"{count_text(averaged.tensors, 'tensor')}, {size_text(averaged.total_bytes)} in {averaged.seconds:.1f} s"
    )
    output.line(averaged.trackers)
    output.hint("To start a run from it: checkpoint.pretrained_checkpoint")
