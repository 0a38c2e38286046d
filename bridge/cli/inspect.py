"""`bridge-ckpt inspect`: what is in one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli.ls import layout_text
from bridge.cli.output import (
    Output,
    age_text,
    count_text,
    output_options,
    place_argument,
    plain,
    safe_global_option,
    size_text,
)
from bridge.training.object_url import ObjectUrl

if TYPE_CHECKING:
    from bridge.training.checkpointing.catalog import Contents

DESCRIPTION = """Show what is in a checkpoint: its parts, its tensors with shape, type and shards, its files, versions
and configuration. It is read from metadata alone, so the size of the checkpoint does not matter.

PATH is a checkpoint, or a directory of checkpoints, of which the tracked one is taken; or the same in object storage,
s3://bucket/prefix."""

SHOWN = 40
"""Tensors that are listed without --all or --pattern."""


@click.command("inspect", help=DESCRIPTION, short_help="show parts, tensors, files and configuration of a checkpoint")
@place_argument("path", "PATH")
@click.option("--step", type=int, metavar="N", help="the iteration to take, instead of the tracked one")
@click.option("--pattern", default="*", metavar="GLOB", help="only keys that match, as in '*.weight'")
@click.option("--all", "show_all", is_flag=True, help="list all tensors, however many there are")
@click.option("--config", "show_config", is_flag=True, help="print the configuration of the run that saved it")
@safe_global_option
@output_options
def command(
    path: Path | ObjectUrl,
    step: int | None,
    pattern: str,
    show_all: bool,
    show_config: bool,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry it out."""
    from bridge.training.checkpointing.catalog import find_checkpoint, read_contents
    from bridge.training.checkpointing.safety.safe_globals import allow

    allow(safe_globals)
    output = Output(as_json, quiet)
    if isinstance(path, ObjectUrl):
        from bridge.training.checkpointing.catalog.buckets.contents import contents_in_bucket

        contents = contents_in_bucket(path, step, pattern)
    else:
        contents = read_contents(find_checkpoint(path, step), pattern)
    parts = {
        part: {"tensors": tensors, "objects": objects, "total_bytes": size}
        for part, (tensors, objects, size) in contents.parts().items()
    }
    entry = {**plain(contents.entry), "path": contents.entry.place}
    del entry["url"]
    output.result({**vars(contents), "entry": entry, "parts": parts})
    _print_head(output, contents)
    _print_tensors(output, contents, None if show_all or pattern != "*" else SHOWN)
    if show_config:
        _print_config(output, contents)
    elif contents.config is not None:
        output.hint("To see the configuration of the run that saved it: --config")


def _print_head(output: Output, contents: Contents) -> None:
    entry = contents.entry
    saved = f"saved {age_text(entry.created)} ago by {entry.origin or 'an unknown program'}"
    ranks = "" if entry.world_size is None else f", {count_text(entry.world_size, 'rank')}"
    layout = "" if entry.layout is None or layout_text(entry.layout) == "-" else f" ({layout_text(entry.layout)})"
    output.line(f"{entry.place}: {entry.format}, {size_text(entry.total_bytes)}, {saved}{ranks}{layout}")
    if entry.versions:
        output.line(", ".join(f"{name} {version}" for name, version in sorted(entry.versions.items())))
    if entry.metrics:
        output.line(", ".join(f"{name} {value:.6g}" for name, value in sorted(entry.metrics.items())))
    if entry.averaged:
        output.line(f"the mean of iterations {', '.join(map(str, entry.averaged))}")
    if entry.problem:
        output.line(f"{entry.state}: {entry.problem}")
    rows = [
        (part, str(tensors), str(objects), size_text(size))
        for part, (tensors, objects, size) in sorted(contents.parts().items())
    ]
    output.line()
    output.table(("PART", "TENSORS", "OBJECTS", "SIZE"), rows, frozenset({"TENSORS", "OBJECTS", "SIZE"}))
    output.line(f"the same on all ranks: {', '.join(sorted(contents.common)) or 'nothing'}")
    output.line()
    files = [(name, size_text(size)) for name, size in contents.files.items()]
    output.table(("FILE", "SIZE"), files if len(files) <= SHOWN else files[:SHOWN], frozenset({"SIZE"}))
    if len(files) > SHOWN:
        output.line(f"... and {len(files) - SHOWN} more files")


def _print_tensors(output: Output, contents: Contents, limit: int | None) -> None:
    rows = [
        (tensor.key, str(list(tensor.shape)), tensor.dtype, str(tensor.shards), size_text(tensor.total_bytes))
        for tensor in contents.tensors[:limit]
    ]
    output.line()
    output.table(("TENSOR", "SHAPE", "TYPE", "SHARDS", "SIZE"), rows, frozenset({"SHARDS", "SIZE"}))
    if limit is not None and len(contents.tensors) > limit:
        output.line(f"... and {len(contents.tensors) - limit} more; --all lists them, --pattern GLOB chooses some")


def _print_config(output: Output, contents: Contents) -> None:
    import yaml

    output.line()
    if contents.config is None:
        output.line("it has no run_config.yaml")
    else:
        output.line(yaml.safe_dump(contents.config, sort_keys=False).rstrip())
