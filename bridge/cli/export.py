"""`bridge-ckpt export`: tensors as safetensors files, for other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bridge.cli.output import Output, count_text, directory_argument, output_options, safe_global_option, size_text
from bridge.cli.preparing import enable
from bridge.training.progress import Progress

if TYPE_CHECKING:
    from bridge.training.checkpointing.export.exporting import Exported

F = TypeVar("F", bound=Callable[..., Any])

DESCRIPTION = """Write a checkpoint's model as safetensors files, which other programs read.

SRC is a checkpoint, or a directory of checkpoints, of which the tracked one is taken; it is only read. DST is a new
directory, which appears when everything is in it."""


def export_options(command: F) -> F:
    """Adds the options that say how tensors are written; `options_of` takes them."""
    options = (
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="of all floating-point values (default: as they are stored)",
        ),
        click.option(
            "--hf-layout", is_flag=True, help="names, shapes and config.json as Hugging Face's transformers has them"
        ),
        click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="keys to write, as in '*.weight', instead of the model's; may be given several times",
        ),
        click.option(
            "--shard-gb",
            type=float,
            default=5.0,
            metavar="GB",
            help="10^9 bytes of values in a file; more go into several files with an index (default: 5)",
        ),
        click.option("--force", is_flag=True, help="replace what an earlier command has written to DST"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def memory_option(command: F) -> F:
    """Adds `--memory-gib`."""
    option = click.option(
        "--memory-gib", type=float, default=1.0, metavar="GIB", help="what is held at most (default: 1)"
    )
    return option(command)


def verify_option(command: F) -> F:
    """Adds `--no-verify`."""
    option = click.option("--verify/--no-verify", default=True, help="check the files of SRC first (default: yes)")
    return option(command)


@click.command("export", help=DESCRIPTION, short_help="write a model as safetensors files, for other programs")
@directory_argument("source", "SRC")
@directory_argument("destination", "DST")
@click.option(
    "--format",
    "target_format",
    type=click.Choice(["safetensors"]),
    default="safetensors",
    help="of the files (default: safetensors)",
)
@click.option("--step", type=int, metavar="N", help="the iteration to take, instead of the tracked one")
@export_options
@memory_option
@verify_option
@safe_global_option
@output_options
def command(
    source: Path,
    destination: Path,
    target_format: str,
    step: int | None,
    dtype: str | None,
    hf_layout: bool,
    include: tuple[str, ...],
    shard_gb: float,
    force: bool,
    memory_gib: float,
    verify: bool,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry it out."""
    del target_format  # there is one
    enable()
    from bridge.training.checkpointing.conversion.processes import give_memory_back
    from bridge.training.checkpointing.export.exporting import Options, export

    give_memory_back()
    output = Output(as_json, quiet)
    with Progress(quiet=quiet) as progress:
        exported = export(
            source,
            destination,
            Options(dtype, hf_layout, include, int(shard_gb * 10**9), force),
            step=step,
            memory=int(memory_gib * 2**30),
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
