"""`bridge-ckpt prune`: old checkpoints go, by the rules that a run has for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.output import (
    Output,
    PositiveFloat,
    count_text,
    directory_argument,
    output_options,
    size_text,
    sure_option,
)
from bridge.cli.recipes import load_recipe, recipe_options

if TYPE_CHECKING:
    from bridge.training.checkpointing.retention.policies import Policy
    from bridge.training.config import CheckpointConfig

DESCRIPTION = """Show which checkpoints in DIR would be deleted and what keeps each of the others, and with --apply
delete them. The rules are those of a recipe, or of the options below, which mean the same as the settings of these
names and are added to the recipe's.

What the tracker names, everything newer, and what a setting or a link leads to is never deleted. --apply refuses to
work where a run saves: that run prunes by itself."""

IN_A_BUCKET = (
    "the run that uploads to {url} prunes it by its own settings, as checkpoint.most_recent_k; by hand, delete a "
    "checkpoint's manifest.json first and then the rest of it"
)


@click.command("prune", help=DESCRIPTION, short_help="delete old checkpoints by retention's rules (--apply does it)")
@directory_argument(otherwise=IN_A_BUCKET)
@click.option("--most-recent-k", type=click.IntRange(1), metavar="K", help="keep the K newest")
@click.option("--save-retain-interval", type=click.IntRange(1), metavar="N", help="keep the multiples of N iterations")
@click.option("--retain-every-hours", type=PositiveFloat(), metavar="H", help="keep one every H hours")
@click.option("--retain-best-k", type=click.IntRange(1), metavar="K", help="keep the K best by --retain-best-metric")
@click.option("--retain-best-metric", metavar="NAME", help="the metric to judge by")
@click.option(
    "--retain-best-mode", type=click.Choice(["min", "max"]), help="whether low or high is good (default: min)"
)
@click.option(
    "--retain-iterations", type=int, multiple=True, metavar="N", help="keep this one; may be given several times"
)
@recipe_options(required=False)
@click.option("--apply", "is_real", is_flag=True, help="delete, instead of saying what would be deleted")
@sure_option
@output_options
def command(
    directory: Path,
    recipe: Path | None,
    overlays: tuple[Path, ...],
    overrides: tuple[str, ...],
    is_real: bool,
    is_sure: bool,
    as_json: bool,
    quiet: bool,
    **rules: Any,
) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.catalog import plan_pruning, prune
    from bridge.training.checkpointing.retention.sweeper import needed_again
    from bridge.training.config import CheckpointConfig

    config = load_recipe(recipe, overlays, overrides)
    cfg = CheckpointConfig(most_recent_k=-1) if config is None else config.checkpoint
    policies = _policies(None if config is None else config.checkpoint, rules)
    if not policies:
        raise click.UsageError(
            "there is no rule to prune by: give --most-recent-k, --save-retain-interval, --retain-every-hours or "
            "--retain-best-k, or a --recipe that sets one."
        )
    output = Output(as_json, quiet)
    in_use = needed_again(cfg)
    judged = plan_pruning(directory, policies, in_use)
    goes = [each for each in judged if not each.stays]
    pruned = prune(directory, policies, in_use, is_sure=is_sure) if is_real else None
    gone = goes if pruned is None else [each for each in goes if each.iteration in pruned.removed]
    problems = () if pruned is None else pruned.problems
    output.result(
        {
            "directory": directory,
            "applied": is_real,
            "removed": [] if pruned is None else pruned.removed,
            "problems": problems,
            "freed_bytes": sum(each.total_bytes for each in gone),
            "checkpoints": [{**vars(each), "stays": each.stays} for each in judged],
        }
    )
    verb = "deleted" if is_real else "would be deleted"
    rows = [
        (
            str(each.iteration),
            size_text(each.total_bytes),
            "kept" if each.stays else verb if each in gone else "NOT DELETED",
            ", ".join(each.reasons),
        )
        for each in judged
    ]
    output.table(("ITERATION", "SIZE", "", "BECAUSE"), rows, frozenset({"ITERATION", "SIZE"}))
    output.line(f"{count_text(len(gone), 'checkpoint')} {verb}, {size_text(sum(each.total_bytes for each in gone))}")
    for problem in problems:
        output.line(f"FAILED: {problem}")
    if goes and not is_real:
        output.hint("To do it: the same command with --apply")
    return 1 if problems else 0


def _policies(recipe: CheckpointConfig | None, rules: dict[str, Any]) -> tuple[Policy, ...]:
    """The recipe's rules, and those that were given beside it: each keeps what it names.

    Raises:
        click.UsageError: what was given contradicts itself.
    """
    from bridge.training.checkpointing.retention.policies import Listed, policies_of
    from bridge.training.config import CheckpointConfig

    given = _settings(CheckpointConfig(most_recent_k=-1), rules)
    found = list(dict.fromkeys((*(() if recipe is None else policies_of(recipe)), *policies_of(given))))
    for cfg in (recipe, given):
        # A list of exceptions counts beside any rule, wherever that is from.
        listed = None if cfg is None or not cfg.retain_iterations else Listed(frozenset(cfg.retain_iterations))
        if found and listed is not None and listed not in found:
            found.append(listed)
    return tuple(found)


def _settings(cfg: CheckpointConfig, rules: dict[str, Any]) -> CheckpointConfig:
    """Settings with those rules that were given.

    Raises:
        click.UsageError: they contradict one another.
    """
    from dataclasses import replace

    given = {name: value for name, value in rules.items() if value not in (None, ())}
    if "retain_iterations" in given:
        given["retain_iterations"] = list(given["retain_iterations"])
    cfg = replace(cfg, **given)
    if (cfg.retain_best_k is None) != (cfg.retain_best_metric is None):
        raise click.UsageError("--retain-best-k and --retain-best-metric belong together: give both.")
    return cfg
