"""All checkpoints of a run in one list: those of its directory, those of its other tiers, and the one it would load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.catalog.choosing import Choice, choose, recorded_doubts, recorded_settings
from bridge.training.checkpointing.catalog.entries import Catalog, CatalogEntry, read_catalog, read_entry
from bridge.training.checkpointing.catalog.foreseen import completed_by_writers, to_publish
from bridge.training.checkpointing.catalog.origins import metrics_files
from bridge.training.checkpointing.catalog.tiers import Snapshots, global_directory, snapshots_of
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.layout import (
    NON_PERSISTENT_DIRECTORY,
    RUN_CONFIG,
    is_iteration_directory,
    list_checkpoints,
    parse_iteration_name,
)
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe
from bridge.training.checkpointing.starts import starts_or_none
from bridge.training.checkpointing.tiers.session import SESSION
from bridge.training.config import CheckpointConfig


@dataclass(frozen=True)
class Listed:
    """The checkpoints of a directory and of the tiers beside it."""

    directory: Path
    rows: tuple[CatalogEntry, ...]
    """By iteration and tier."""
    leftovers: tuple[str, ...]
    """Remains of unfinished saves and deletions in the directory, which count for nothing."""
    choice: Choice
    """Which one a run would load."""
    notes: tuple[str, ...]
    """What is worth knowing of the directory."""
    nested: tuple[Path, ...]
    """Where the directory has no checkpoint: the directories in it that have some."""
    settings: CheckpointConfig
    """Those that decided: given, or those of the run that saved last."""
    unpublished: tuple[str, ...] = ()
    """What a crash has left complete, and the next run that saves there publishes."""
    is_given: bool = False
    """Whether the settings were given, and not guessed by what is recorded."""
    url: str = ""
    """Where this is in object storage; `directory` then leads nowhere."""

    @property
    def place(self) -> str:
        """Where this is, for people."""
        return self.url or str(self.directory)

    @property
    def unconsidered(self) -> tuple[CatalogEntry, ...]:
        """Checkpoints that there are where a run with the settings finds none at all."""
        return self.rows if self.choice.outcome == "fresh" else ()


def list_all(
    directory: Path, cfg: CheckpointConfig | None = None, *, thorough: bool = False, own_paths: Iterable[Path] = ()
) -> Listed:
    """Look at a directory of checkpoints, at the tiers beside it, and at what a run would load.

    Args:
        directory: of checkpoints, or one checkpoint.
        cfg: the settings of the run; None takes those that its last checkpoint records.
        thorough: as for `choose`.
        own_paths: as for `choose`.

    Raises:
        NotACheckpointError: it is a file.
        OSError: it cannot be read.
    """
    catalog = read_catalog(directory)
    unpublished = to_publish(directory)
    rows = [*catalog.entries, *_unpublished(directory, unpublished, catalog, "persistent")]
    newest = _last(catalog, rows)
    beside_it = None if is_iteration_directory(directory) else _newest_beside(directory / NON_PERSISTENT_DIRECTORY)
    recorder = _later(newest, beside_it)
    settings = cfg or recorded_settings(directory, recorder)
    notes = [f"its tracker cannot be read: {catalog.tracker_problem}"] if catalog.tracker_problem else []
    notes += _of_unpublished(directory, unpublished)
    leftovers = tuple(name for name in catalog.leftovers if name not in unpublished)
    outlived = {name: target for name, target in completed_by_writers(directory).items() if name in leftovers}
    leftovers = tuple(name for name in leftovers if name not in outlived)
    notes += [
        f"writers have completed {target} as {directory / name} after their run had died; the next run that saves here "
        "publishes it before it loads, and so does repair"
        for name, target in outlived.items()
    ]
    if leftovers:
        notes.append(
            f"{len(leftovers)} remains of unfinished saves or deletions, which the next run that saves here removes"
        )
    if cfg is None:
        notes += recorded_doubts(recorder)
    if not is_iteration_directory(directory):
        beside = global_directory(settings)
        if beside is not None and beside.is_dir():
            found, left = read_catalog(beside, "non_persistent_global"), to_publish(beside)
            rows += [*found.entries, *_unpublished(beside, left, found, "non_persistent_global")]
            notes += _of_unpublished(beside, left)
        rows += snapshot_rows(settings)
        if cfg is None and recorder is None and (directory / SESSION).is_file():
            notes.append(
                "a run may have kept local or in-memory checkpoints, and where those are only its settings say: give "
                "them to doctor with --recipe"
            )
    rows = _with_history(settings, rows)
    rows.sort(key=lambda row: (-1 if row.iteration is None else row.iteration, row.kind != "persistent"))
    # What else is in the directory counts only where there is no checkpoint in it.
    own = metrics_files(directory) if cfg is None and not catalog.entries else []
    choice = choose(replace(settings, load=str(directory)), thorough=thorough, own_paths=[*own_paths, *own])
    if own and choice.outcome == "fresh":
        files = ", ".join(path.name for path in own)
        taken = f"{files}: taken for the run's own, as logger.metrics_path; the start of another run fails"
        choice = replace(choice, notes=(*choice.notes, taken))
    nested = () if rows else _nested(directory)
    names = tuple(unpublished)
    return Listed(
        directory, tuple(rows), leftovers, choice, tuple(notes), nested, settings, names, is_given=cfg is not None
    )


def _with_history(cfg: CheckpointConfig, rows: Iterable[CatalogEntry]) -> list[CatalogEntry]:
    """The checkpoints with what the starts of the run tell of them."""
    if cfg.save is None:
        return list(rows)
    with collected():
        starts = starts_or_none(Path(cfg.save).expanduser())

    def is_left(row: CatalogEntry) -> bool:
        return row.iteration is not None and starts.have_left_behind(row.iteration, row.start)

    return [replace(row, left_behind=is_left(row)) for row in rows]


def snapshot_rows(cfg: CheckpointConfig) -> list[CatalogEntry]:
    """The local and in-memory checkpoints of a run, those of this machine."""
    return [_entry(found) for found in snapshots_of(cfg)]


def best_of(candidates: Iterable[CatalogEntry]) -> CatalogEntry | None:
    """The first of some checkpoints that a run could load, as far as that is cheap to find out.

    What is marked or damaged, and what the run has left behind, is nothing to recommend.
    """
    for row in candidates:
        if row.kind != "persistent" or row.state not in ("committed", "foreign") or row.left_behind:
            continue
        if row.url:
            return row
        try:
            with collected():
                describe(Source(row.path, row.iteration is None, "it is looked at"))
        except (CheckpointError, OSError):
            continue
        return row
    return None


def _newest_beside(directory: Path) -> CatalogEntry | None:
    """The newest global non-persistent checkpoint of a directory; None if there is none to be read."""
    try:
        catalog = read_catalog(directory, "non_persistent_global")
    except (CheckpointError, OSError):
        return None
    return _last(catalog, catalog.entries)


def _unpublished(
    directory: Path, names: Mapping[str, str], catalog: Catalog, kind: CheckpointKind
) -> Iterator[CatalogEntry]:
    for name, target in names.items():
        iteration = parse_iteration_name(target)
        tracked = catalog.tracked is not None and not catalog.tracked.release and catalog.tracked.iteration == iteration
        entry = read_entry(directory / name, kind, tracked=tracked)
        yield replace(entry, iteration=iteration, problem=entry.problem or "not yet published")


def _of_unpublished(directory: Path, names: Mapping[str, str]) -> list[str]:
    return [
        f"a crash has left {target} complete as {directory / name}; the next run that saves here publishes it before "
        "it loads, and so does repair"
        for name, target in names.items()
    ]


def _nested(directory: Path) -> tuple[Path, ...]:
    """The directories of checkpoints directly in a directory that somebody may have taken for one."""
    found = [path for path in sorted(directory.iterdir()) if path.is_dir()] if directory.is_dir() else []
    return tuple(path for path in found if (listing := list_checkpoints(path)).iterations or listing.has_release)


def _last(catalog: Catalog, rows: Sequence[CatalogEntry]) -> CatalogEntry | None:
    """The checkpoint whose configuration is that of the run: the tracked one, else the newest."""
    tracked = next((row for row in rows if row.tracked), None)
    newest = max(rows, key=lambda row: -1 if row.iteration is None else row.iteration, default=None)
    return tracked or newest if catalog.exists else None


def _later(*entries: CatalogEntry | None) -> Path | None:
    """That of them which was saved last, of those that record a configuration; the first where none does."""
    found = [entry for entry in entries if entry is not None]
    recording = [entry for entry in found if (entry.path / RUN_CONFIG).is_file()]
    if not recording:
        return found[0].path if found else None
    return max(recording, key=lambda entry: entry.created or 0.0).path


def _entry(found: Snapshots) -> CatalogEntry:
    missing = "" if found.is_complete else f"on this machine are those of rank {', '.join(map(str, found.owners))}"
    return CatalogEntry(
        found.path,
        found.iteration,
        found.kind,
        "committed",
        "bridge",
        None,
        found.total_bytes,
        len(found.owners),
        found.created,
        None,
        found.world_size,
        problem=missing,
    )
