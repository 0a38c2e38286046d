"""`bridge-ckpt ls`: what checkpoints there are, and which one a run would load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.output import Output, age_text, count_text, output_options, place_argument, size_text
from bridge.cli.recipes import load_recipe, recipe_options
from bridge.training.object_url import ObjectUrl

if TYPE_CHECKING:
    from bridge.training.checkpointing.catalog import CatalogEntry, Choice, Listed

DESCRIPTION = """List the checkpoints in DIR and in the tiers beside it: global non-persistent ones, and those on local
disks and in the memory of this machine. Then say which one a run with checkpoint.load: DIR would resume from, and why.

DIR is checkpoint.save or checkpoint.load of a run, of Megatron Bridge and Megatron-LM too, or a place in object
storage, s3://bucket/prefix. Nothing is verified; verify does that."""

COLUMNS = ("ITERATION", "TIER", "FORMAT", "SIZE", "FILES", "AGE", "RANKS", "LAYOUT", "STATE")
_ONE = re.compile(r"[A-Z]+1")
_RIGHT = frozenset({"ITERATION", "SIZE", "FILES", "AGE", "RANKS"})
_SPARE = ("LAYOUT", "RANKS", "FILES", "FORMAT")
_TIERS = {"persistent": "persistent", "non_persistent_global": "global", "local": "local", "in_memory": "memory"}


@click.command("ls", help=DESCRIPTION, short_help="list checkpoints, and say which one a run would load and why")
@place_argument()
@recipe_options(required=False)
@output_options
def command(
    directory: Path | ObjectUrl,
    recipe: Path | None,
    overlays: tuple[Path, ...],
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry it out."""
    output = Output(as_json, quiet)
    listed = _look(directory, recipe, overlays, overrides)
    output.result(_for_programs(listed))
    output.line(heading(listed))
    if listed.rows:
        # On a terminal, where lines are short, what is wrong stands below the table.
        rows = [_row(row, listed, is_brief=output.is_terminal) for row in listed.rows]
        output.table(COLUMNS, rows, _RIGHT, _SPARE)
        for row, cells in zip(listed.rows, rows, strict=True):
            if output.is_terminal and row.problem:
                output.line(f"iteration {cells[0]} ({cells[1]}): {row.problem}")
    for note in (*listed.notes, *listed.choice.notes):
        output.line(f"note: {note}")
    for line in verdict(directory, listed):
        output.line(line)
    for line in hints(directory, listed):
        output.hint(line)


def _look(
    place: Path | ObjectUrl, recipe: Path | None, overlays: tuple[Path, ...], overrides: tuple[str, ...]
) -> Listed:
    from bridge.training.checkpointing.catalog import list_all
    from bridge.training.checkpointing.catalog.diagnosing import settings_of
    from bridge.training.checkpointing.errors import CheckpointNotFoundError

    if isinstance(place, Path) and not place.exists():
        raise CheckpointNotFoundError(f"{place} does not exist; name the checkpoint.save of a run")
    config = load_recipe(recipe, overlays, overrides)
    cfg, own_paths = (None, []) if config is None else settings_of(config, place)
    if isinstance(place, Path):
        return list_all(place, cfg, own_paths=own_paths)
    from bridge.training.checkpointing.catalog.buckets.listing import list_in_bucket

    return list_in_bucket(place, cfg)


def heading(listed: Listed) -> str:
    """The first line."""
    total = sum(row.total_bytes or 0 for row in listed.rows)
    return f"{listed.place}: {count_text(len(listed.rows), 'checkpoint')}, {size_text(total)}"


def _row(row: Any, listed: Listed, *, is_brief: bool = False) -> tuple[str, ...]:
    state = row.state if is_brief or not row.problem else f"{row.state}: {row.problem}"
    if row.origin not in ("bridge", ""):
        whose = "plain DCP" if row.origin == "torch DCP" else f"of {row.origin}"
        state = whose if row.state == "foreign" else f"{state} ({whose})"
    if row.averaged:
        state = f"{state}, a mean"
    if row.left_behind:
        state = f"{state}, left behind by a rollback"
    if _is_loaded(row, listed.choice):
        state = f"{state}  <- a run resumes here"
    return (
        _iteration_text(row),
        _TIERS[row.kind],
        row.format or "-",
        size_text(row.total_bytes),
        "-" if row.files is None else str(row.files),
        age_text(row.created),
        "-" if row.world_size is None else str(row.world_size),
        "-" if row.layout is None else layout_text(row.layout),
        state,
    )


def _is_loaded(row: CatalogEntry, choice: Choice) -> bool:
    """Whether it is the one that a run would load. Where its name tells no iteration, the place alone says so."""
    source = choice.source
    if source is None or (row.path, row.kind) != (source.path, source.kind):
        return False
    return row.iteration in (None, choice.iteration)


def layout_text(layout: Any) -> str:
    """The sizes that are not 1, as in `TP2 DP4`."""
    return " ".join(size for size in str(layout).split() if not _ONE.fullmatch(size)) or "-"


def verdict(directory: Path | ObjectUrl, listed: Listed) -> list[str]:
    """What a run would do, in words."""
    choice = listed.choice
    lines = [f"passed over: {reason}" for reason in choice.passed_over]
    if choice.outcome == "error":
        return [*lines, f"A run that loads {directory} FAILS: {choice.error}"]
    if listed.unconsidered:
        which = "those given" if listed.is_given else "what is recorded of it"
        tiers = ", ".join(sorted({_TIERS[row.kind] for row in listed.unconsidered}))
        return [
            *lines,
            f"A run that loads {directory} starts FROM SCRATCH by its settings, as far as {which} tell: it takes none "
            f"of the {len(listed.unconsidered)} that there are ({tiers}). Its recipe tells more: "
            f"bridge-ckpt doctor {directory} --recipe FILE",
        ]
    if choice.source is None:
        return [*lines, f"A run that loads {directory} starts FROM SCRATCH: there is no checkpoint."]
    if _tells_no_iteration(listed):
        what = "begins at iteration 0 with a plain DCP checkpoint, which tells no iteration"
        return [*lines, f"A run that loads {directory} {what}: {choice.source.reason}."]
    what = "the release checkpoint" if choice.source.release else f"iteration {choice.iteration}"
    return [*lines, f"A run that loads {directory} resumes from {what}: {choice.source.reason}."]


def _tells_no_iteration(listed: Listed) -> bool:
    """Whether what a run would load is a plain DCP checkpoint whose name tells no iteration."""
    source = listed.choice.source
    return source is not None and any(
        row.path == source.path and row.origin == "torch DCP" and row.iteration is None for row in listed.rows
    )


def _iteration_text(row: CatalogEntry) -> str:
    if row.iteration is not None:
        return str(row.iteration)
    return "release" if row.path.name == "release" else "-"


def hints(directory: Path | ObjectUrl, listed: Listed, *, has_diagnosis: bool = False) -> list[str]:
    """What to do next; `has_diagnosis` where what doctor says has been said."""
    from bridge.training.checkpointing.catalog.listing import best_of

    lines = [f"There are checkpoints in {path}: bridge-ckpt ls {path}" for path in listed.nested]
    chosen, is_error = listed.choice.iteration, listed.choice.outcome == "error"
    newest_first = [row for row in reversed(listed.rows) if row.iteration is not None and row.iteration != chosen]
    earlier = best_of(row for row in newest_first if chosen is None or (row.iteration or 0) < chosen)
    if earlier is not None:
        what = "To load one whose files are all there" if is_error else "To go back to an earlier one"
        lines.append(f"{what}, start the run with checkpoint.ckpt_step={earlier.iteration}")
    if listed.rows:
        lines.append(f"To check that all are sound: bridge-ckpt verify {directory}")
    if (is_error or listed.choice.passed_over) and not has_diagnosis:
        lines.append(f"To see what is wrong: bridge-ckpt doctor {directory}")
    return lines


def _for_programs(listed: Listed) -> dict[str, Any]:
    choice = listed.choice
    return {
        "directory": listed.place,
        "checkpoints": [
            {
                **{name: value for name, value in vars(row).items() if name not in ("layout", "url")},
                "path": row.place,
                "parallel_sizes": None if row.layout is None else row.layout.sizes(),
                "is_loaded": _is_loaded(row, choice),
            }
            for row in listed.rows
        ],
        "leftovers": listed.leftovers,
        "notes": listed.notes,
        "resume": choice_for_programs(choice),
    }


def choice_for_programs(choice: Choice) -> dict[str, Any]:
    """What a run would do, as plain values."""
    source = choice.source
    return {
        "outcome": choice.outcome,
        "iteration": choice.iteration,
        "path": None if source is None else source.place,
        "kind": None if source is None else source.kind,
        "reason": "" if source is None else source.reason,
        "passed_over": choice.passed_over,
        "notes": choice.notes,
        "error": choice.error,
    }
