"""`bridge-ckpt repair`: a directory of checkpoints is set right."""

from __future__ import annotations

from pathlib import Path

import click

from bridge.cli.output import Output, directory_argument, output_options, sure_option
from bridge.training.progress import Progress

DESCRIPTION = """Set right what crashes and accidents have left in DIR: publish what was left complete, remove the
remains of saves and deletions, take the mark of damage off checkpoints that are sound in every byte, and write the
trackers anew from what is published.

Without --apply it only says what it would do. It refuses to work where a run saves. No checkpoint is deleted."""

IN_A_BUCKET = (
    "the next run that uploads to {url} removes remains and sets the trackers; `bridge-ckpt doctor {url}` says what is "
    "wrong, and checkpoint.ckpt_step loads another checkpoint meanwhile"
)


@click.command("repair", help=DESCRIPTION, short_help="set trackers, remains and marks right (--apply does it)")
@directory_argument(otherwise=IN_A_BUCKET)
@click.option("--apply", "is_real", is_flag=True, help="do it, instead of saying what would be done")
@sure_option
@output_options
def command(directory: Path, is_real: bool, is_sure: bool, as_json: bool, quiet: bool) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.catalog import plan_repairs, repair

    output = Output(as_json, quiet)
    with Progress(quiet=quiet) as progress:
        found = (repair if is_real else plan_repairs)(directory, report=progress, is_sure=is_sure)
    output.result({"directory": directory, "applied": is_real, **vars(found)})
    for each in found.repairs:
        output.line(f"{'did' if is_real else 'would'}: {each.text}")
    for problem in found.problems:
        output.line(f"{'FAILED' if is_real else 'CANNOT'}: {problem}")
    if not found.repairs and not found.problems:
        output.line("there is nothing to repair")
    elif found.repairs and not is_real:
        output.hint(f"To do it: bridge-ckpt repair {directory} --apply")
    return 1 if found.problems else 0
