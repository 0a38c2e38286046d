"""`bridge-ckpt doctor`: why a run would resume, or would not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli.ls import choice_for_programs, hints, verdict
from bridge.cli.output import Output, output_options, place_argument, safe_global_option
from bridge.cli.recipes import load_recipe, recipe_options
from bridge.training.object_url import ObjectUrl

if TYPE_CHECKING:
    from bridge.training.checkpointing.catalog import Diagnosis

DESCRIPTION = """Explain what a run with checkpoint.load: DIR would do: from which checkpoint it would resume and
why, what it would restore and what not, which checkpoints it would pass over, who saves in DIR, and what is left
there of crashes. DIR may be a run directory of Megatron Bridge or Megatron-LM: it says what is understood of it. Or it
is a place in object storage, s3://bucket/prefix.

Without a recipe it is a run with the settings that the checkpoint records. The exit status is 0 if a run would
start and nothing needs to be repaired. Nothing is changed."""

_SIGNS = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}


@click.command("doctor", help=DESCRIPTION, short_help="explain why a run would or would not resume, and from what")
@place_argument()
@recipe_options(required=False)
@click.option("--world-size", type=click.IntRange(1), metavar="N", help="ranks of the run (default: as it was saved)")
@safe_global_option
@output_options
def command(
    directory: Path | ObjectUrl,
    recipe: Path | None,
    overlays: tuple[Path, ...],
    overrides: tuple[str, ...],
    world_size: int | None,
    safe_globals: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.catalog import diagnose
    from bridge.training.checkpointing.safety.safe_globals import allow

    config = load_recipe(recipe, overlays, overrides)
    allow(safe_globals)
    output = Output(as_json, quiet)
    if isinstance(directory, ObjectUrl):
        from bridge.training.checkpointing.catalog.buckets.diagnosing import diagnose_bucket

        found = diagnose_bucket(directory, config, world_size)
    else:
        found = diagnose(directory, config, world_size)
    output.result(_for_programs(found))
    for finding in found.findings:
        output.line(f"{_SIGNS[finding.grade]}{finding.text}")
        if finding.advice:
            output.hint(f"        {finding.advice}")
    for line in verdict(directory, found.listed):
        if not line.startswith("passed over: "):  # these are findings
            output.line(line)
    if found.plan is not None:
        output.line(f"{found.plan_of.capitalize()} would restore of it:")
        output.line(found.plan.table())
    for line in hints(directory, found.listed, has_diagnosis=True):
        output.hint(line)
    return 0 if found.is_well else 1


def _for_programs(found: Diagnosis) -> dict[str, object]:
    plan = (
        None if found.plan is None else {name: value for name, value in vars(found.plan).items() if value is not None}
    )
    return {
        "directory": found.place,
        "is_well": found.is_well,
        "owner": found.owner,
        "findings": found.findings,
        "resume": choice_for_programs(found.choice),
        "plan_of": found.plan_of,
        "plan": plan,
    }
