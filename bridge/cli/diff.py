"""`bridge-ckpt diff`: how two checkpoints differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli.output import Output, count_text, directory_argument, output_options, safe_global_option
from bridge.cli.preparing import enable
from bridge.cli.tensors import memory_option
from bridge.training.progress import Progress

if TYPE_CHECKING:
    from bridge.training.checkpointing.catalog import Differences

DESCRIPTION = """Compare two checkpoints: the configurations of the runs that saved them, which tensors they have with
which shapes and types, and the values, element by element. They may be in different formats.

A and B are checkpoints, or directories of checkpoints, of which the tracked one is taken. The exit status is 0 if all
tensors and objects are the same, 1 if not."""

SHOWN = 30
"""Tensors that are listed without --all."""


@click.command("diff", help=DESCRIPTION, short_help="compare two checkpoints: configuration, structure, values")
@directory_argument("first", "A")
@directory_argument("second", "B")
@click.option("--step-a", type=int, metavar="N", help="the iteration to take from A")
@click.option("--step-b", type=int, metavar="N", help="the iteration to take from B")
@click.option("--pattern", default="*", metavar="GLOB", help="compare only keys that match, as in '*.weight'")
@click.option("--values/--no-values", default=True, help="compare values too (default: yes)")
@memory_option()
@click.option("--all", "show_all", is_flag=True, help="list all tensors that differ, however many there are")
@safe_global_option
@output_options
def command(
    first: Path,
    second: Path,
    step_a: int | None,
    step_b: int | None,
    pattern: str,
    values: bool,
    memory: int,
    show_all: bool,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> int:
    """Carry it out; return the exit status."""
    enable()
    from bridge.training.checkpointing.catalog import compare, find_checkpoint
    from bridge.training.checkpointing.safety.safe_globals import allow

    allow(safe_globals)
    output = Output(as_json, quiet)
    with Progress(quiet=quiet) as progress:
        found = compare(
            find_checkpoint(first, step_a, "A"),
            find_checkpoint(second, step_b, "B"),
            pattern=pattern,
            values=values,
            memory=memory,
            report=progress,
        )
    output.result({**vars(found), "are_equal": found.are_equal})
    _print(output, found, None if show_all else SHOWN, values=values)
    return 0 if found.are_equal else 1


def _print(output: Output, found: Differences, limit: int | None, *, values: bool) -> None:
    output.line(f"A {found.first}")
    output.line(f"B {found.second}")
    if found.config:
        settings = [(each.key, str(each.first), str(each.second)) for each in found.config]
        output.line()
        output.table(("SETTING", "A", "B"), settings)
    for name, keys in (("A", found.only_first), ("B", found.only_second)):
        for key in keys:
            output.line(f"only in {name}: {key}")
    for each in found.structure:
        output.line(f"{each.key}: {each.first} in A, {each.second} in B")
    for key in found.common:
        output.line(f"the common state differs: {key}")
    for key in found.objects:
        output.line(f"objects differ: {key}")
    if found.values:
        output.line()
        right = frozenset({"DIFFERENT", "OF", "LARGEST", "MEAN", "RELATIVE"})
        rows = [
            (
                each.key,
                f"{each.different:,}",
                f"{each.elements:,}",
                f"{each.largest:.3g}",
                f"{each.mean:.3g}",
                f"{each.relative:.3g}",
            )
            for each in found.values[:limit]
        ]
        output.table(("TENSOR", "DIFFERENT", "OF", "LARGEST", "MEAN", "RELATIVE"), rows, right)
        if limit is not None and len(found.values) > limit:
            output.line(f"... and {len(found.values) - limit} more; --all lists them")
    if not values:
        output.line("the structure is the same" if found.are_equal else "they differ; values were not compared")
    elif found.are_equal:
        output.line(f"{count_text(found.compared, 'tensor')}, all the same")
    else:
        output.line(f"{len(found.values)} of {count_text(found.compared, 'tensor')} have other values")
