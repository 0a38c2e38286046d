"""`bridge-ckpt report`: one page that shows what the saves of a run have cost, and what became of its checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click

from bridge.cli.output import Output, directory_argument, output_options

DESCRIPTION = """Write a page about the checkpoints in DIR, which is checkpoint.save of a run.

It shows what each save has cost, sizes and throughput, what retention has kept, the loss with the points from which
the run went on, and what went wrong. The page is one file and needs no network. It is made of the file of events in
DIR, of the manifests, and of the run's metrics file if there is one."""


@dataclass(frozen=True)
class Reported:
    """What a report is about."""

    output: str
    events: int
    unreadable: int
    saves: int
    failed: int
    checkpoints: int
    """That are there now."""
    losses: int


@click.command("report", help=DESCRIPTION, short_help="write a page that shows what saves have cost")
@directory_argument(
    otherwise="name the directory that the run writes to, where its events are: checkpoint.save or staging_dir"
)
@click.option(
    "-o",
    "--output",
    "destination",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="the page to write, as in report.html",
)
@output_options
def command(directory: Path, destination: Path, as_json: bool, quiet: bool) -> int:
    """Carry it out; return the exit status."""
    output = Output(as_json, quiet)
    reported = report(directory, destination.expanduser())
    output.result(reported)
    output.line(
        f"wrote {reported.output}: {reported.saves} saves, {reported.failed} of them failed or unfinished, "
        f"{reported.checkpoints} checkpoints are there"
    )
    if not reported.events:
        output.hint(
            "the directory has no file of events (logger.checkpoint_events), so the page shows no durations and no "
            "failures"
        )
    return 0


def report(directory: Path, output: Path, made: float | None = None) -> Reported:
    """Write a page about a directory of checkpoints.

    Args:
        directory: `checkpoint.save` of a run.
        output: the page; its directory must exist.
        made: Unix time in seconds that the page is dated with; None is now.

    Raises:
        CheckpointNotFoundError: there is nothing in the directory to report about.
        OSError: the directory cannot be read, or the page cannot be written.
    """
    from bridge.training.checkpointing.events.report.gathering import gather
    from bridge.training.checkpointing.events.report.page import render
    from bridge.training.checkpointing.events.report.view import build_view

    log, found, losses = gather(directory)
    now = time.time() if made is None else made
    view = build_view(str(directory), log.events, found, losses, made=now, unreadable=log.unreadable)
    output.write_text(render(view), encoding="utf-8", errors="replace")
    totals = view.totals
    return Reported(
        output=str(output),
        events=len(log.events),
        unreadable=log.unreadable,
        saves=len(view.saves),
        failed=totals.failed + totals.unfinished,
        checkpoints=totals.there,
        losses=sum(map(len, view.losses)),
    )
