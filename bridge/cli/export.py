"""`bridge-ckpt export`: tensors as safetensors files, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

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
from bridge.cli.tensors import Written, export_options, memory_option, verify_option
from bridge.training.progress import Progress

if TYPE_CHECKING:
    from bridge.training.checkpointing.export.exporting import Exported

DESCRIPTION = """Write a checkpoint's model as safetensors files, which other programs read.

SRC is a checkpoint, or a directory of checkpoints, of which the tracked one is taken; it is only read. DST is a new
directory, which appears when everything is in it."""


@click.command("export", help=DESCRIPTION, short_help="write a model as safetensors files, for other programs")
@directory_argument("source", "SRC")
@directory_argument("destination", "DST", otherwise=UPLOAD_AFTERWARDS)
@click.option(
    "--format",
    "target_format",
    type=click.Choice(["safetensors"]),
    default="safetensors",
    help="of the files (default: safetensors)",
)
@click.option("--step", type=int, metavar="N", help="the iteration to take, instead of the tracked one")
@export_options
@memory_option()
@verify_option
@safe_global_option
@output_options
def command(
    source: Path,
    destination: Path,
    target_format: str,
    step: int | None,
    written: Written,
    memory: int,
    verify: bool,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry it out."""
    del target_format  # there is one
    enable()
    from bridge.training.checkpointing.conversion.processes import give_memory_back
    from bridge.training.checkpointing.export.exporting import export

    give_memory_back()
    output = Output(as_json, quiet)
    with Progress(quiet=quiet) as progress:
        exported = export(
            source,
            destination,
            written.options(),
            step=step,
            memory=memory,
            verify_source=verify,
            safe_globals=safe_globals,
            report=progress,
        )
    output.result(exported)
    output.line(exported_text(exported))


def exported_text(exported: Exported) -> str:
    """What was written, in a line."""
    of = ", ".join(map(str, exported.iterations))
    iterations = f"iteration{'' if len(exported.iterations) == 1 else 's'} {of}"
    layout = "" if exported.model_type is None else f" as a {exported.model_type} of transformers"
    return (
        f"exported {iterations}{layout} to {exported.path}: {count_text(exported.tensors, 'tensor')}, "
        f"{size_text(exported.value_bytes)} in {count_text(len(exported.files), 'file')}, {exported.seconds:.1f} s"
    )
