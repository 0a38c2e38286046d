"""Which checkpoint a run would load, and why: asked of the code that a run asks, by a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.catalog.foreseen import Foreseen, foreseen
from bridge.training.checkpointing.catalog.payload import payload_problems
from bridge.training.checkpointing.catalog.tiers import global_directory, offers_of
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.contents.run_config import read_run_config
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from bridge.training.checkpointing.fallback import Candidates, load_best
from bridge.training.checkpointing.layout import MANIFEST, is_iteration_directory, parse_iteration_name
from bridge.training.checkpointing.marks import is_marked
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.resolve import Offer, Persistent, Source, preference
from bridge.training.checkpointing.source import describe, find_source
from bridge.training.checkpointing.starts import starts_or_none
from bridge.training.checkpointing.stored import DirectoryCheckpoint
from bridge.training.config import CheckpointConfig
from bridge.training.object_url import is_url

_RECORDED: dict[str, Callable[[Any], bool]] = {
    "non_persistent_ckpt_type": ("global", "local", "in_memory").__contains__,
    "non_persistent_global_ckpt_dir": lambda value: isinstance(value, str),
    "non_persistent_local_ckpt_dir": lambda value: isinstance(value, str),
    "integrity": ("off", "sizes", "full").__contains__,
    "fallback": lambda value: isinstance(value, bool),
}
"""The settings of the run that decide what it loads after a restart, and what they may be."""
_PLACES = ("non_persistent_global_ckpt_dir", "non_persistent_local_ckpt_dir")


@dataclass(frozen=True)
class Choice:
    """What a run that starts now would load."""

    outcome: Literal["resume", "fresh", "error"]
    """`fresh`: there is nothing to load, and it would start from scratch."""
    source: Source | None = None
    saved: Saved | None = None
    """What the checkpoint says about itself; None where only a run can read it."""
    passed_over: tuple[str, ...] = ()
    """Why better ones would not be loaded, the best first."""
    notes: tuple[str, ...] = ()
    """What a run would warn of."""
    error: str = ""
    """With the outcome `error`: what it would fail with."""

    @property
    def iteration(self) -> int | None:
        """Of the checkpoint; None where there is none, or it is a release checkpoint."""
        if self.source is None or self.source.release:
            return None
        named = parse_iteration_name(self.source.path.name)
        return self.saved.iteration if named is None and self.saved is not None else named


def recorded_settings(directory: Path, checkpoint: Path | None = None) -> CheckpointConfig:
    """The settings of a run that goes on in `directory`, as far as its checkpoint tells them, defaults otherwise.

    Args:
        directory: `checkpoint.load` and `checkpoint.save`.
        checkpoint: the one whose `run_config.yaml` is read.
    """
    cfg = CheckpointConfig(load=str(directory), save=str(directory))
    section = _section(checkpoint)
    for name, is_right in _RECORDED.items():
        value = section.get(name)
        if isinstance(value, str | bool) and is_right(value):
            setattr(cfg, name, value)
    return cfg


def recorded_doubts(checkpoint: Path | None) -> list[str]:
    """What the settings that a checkpoint records leave open about a run that has them again, in words."""
    section = _section(checkpoint)
    found = [
        f"the run has recorded checkpoint.{name}: {section[name]}, which leads elsewhere from another directory than "
        f"the one that it was started in; from here it is {Path(section[name]).absolute()}"
        for name in _PLACES
        if isinstance(section.get(name), str) and not Path(section[name]).expanduser().is_absolute()
    ]
    step = section.get("ckpt_step")
    if isinstance(step, int) and not isinstance(step, bool):
        found.append(
            f"the run that saved last had checkpoint.ckpt_step={step}: with that setting it loads iteration {step}"
        )
    return found


def _section(checkpoint: Path | None) -> Mapping[str, Any]:
    """The `checkpoint` section of what a checkpoint records; empty where it cannot be had."""
    if checkpoint is None:
        return {}
    try:
        found = (read_run_config(checkpoint) or {}).get("checkpoint")
    except (CheckpointError, OSError):
        return {}
    return found if isinstance(found, Mapping) else {}


def choose(
    cfg: CheckpointConfig,
    *,
    thorough: bool = False,
    own_paths: Iterable[Path] = (),
    unmarked: Collection[str] = (),
) -> Choice:
    """What a run with these settings would load. Nothing is written, marked or claimed.

    What the run would publish before it loads, because a crash has left it complete, counts as published.

    Args:
        cfg: `load`, `save`, `ckpt_step`, `fallback`, `integrity`, the non-persistent settings and
            `pretrained_checkpoint` are read.
        thorough: check as much of each checkpoint as the run would before it loads; otherwise only names and sizes, and
            what small files hold.
        own_paths: what the run itself writes beside its checkpoints; in `load` it means nothing.
        unmarked: names of checkpoints whose mark of damage does not count.
    """
    if cfg.load is None:
        return Choice("fresh")
    if is_url(cfg.load):
        with collected() as notes:
            try:
                return _choose(cfg, offers_of(cfg), notes, thorough, own_paths, unmarked)
            except (CheckpointError, OSError) as error:
                return Choice("error", notes=tuple(notes), error=str(error))
    beside = global_directory(cfg) if cfg.non_persistent_ckpt_type == "global" else None
    with collected() as notes:
        try:
            with (
                foreseen(Path(cfg.load).expanduser(), is_saved_in=_is_own(cfg)) as load,
                foreseen(beside or Path(cfg.load), is_saved_in=beside is not None) as tier,
            ):
                seen = cfg if beside is None else replace(cfg, non_persistent_global_ckpt_dir=str(tier.view))
                offers = offers_of(seen)
                seen = replace(seen, load=str(load.view))
                found = _choose(seen, offers, notes, thorough, own_paths, unmarked)
                return _real(found, load, tier)
        except (CheckpointError, OSError) as error:
            return Choice("error", notes=tuple(notes), error=str(error))


def _is_own(cfg: CheckpointConfig) -> bool:
    if cfg.load is None or cfg.save is None:
        return False
    return Path(cfg.load).expanduser().resolve() == Path(cfg.save).expanduser().resolve()


def _choose(
    cfg: CheckpointConfig,
    offers: list[Offer],
    notes: list[str],
    thorough: bool,
    own_paths: Iterable[Path],
    unmarked: Collection[str],
) -> Choice:
    try:
        found, others = _persistent(cfg, own_paths, unmarked, required=not offers)
        waiting = preference(found, offers, cfg.ckpt_step) + others
        if not waiting and cfg.mirror is not None and _is_own(cfg):
            waiting = _in_mirror(cfg)
        if not waiting:
            return _nothing(cfg, notes)
        return _first_good(cfg, waiting, offers, notes, thorough)
    except (CheckpointError, OSError) as error:
        return Choice("error", notes=tuple(notes), error=str(error))


def _real(choice: Choice, *places: Foreseen) -> Choice:
    """A choice in views, with the paths that there really are."""

    def text(message: str) -> str:
        for place in places:
            message = place.text(message)
        return message

    source = choice.source
    for place in places:
        if source is not None and place.view in source.path.parents:
            source = replace(source, path=place.real(source.path), reason=place.text(source.reason))
    return replace(
        choice,
        source=source,
        passed_over=tuple(map(text, choice.passed_over)),
        notes=tuple(map(text, choice.notes)),
        error=text(choice.error),
    )


def _nothing(cfg: CheckpointConfig, notes: list[str]) -> Choice:
    if cfg.pretrained_checkpoint is not None:
        setting = "checkpoint.pretrained_checkpoint"
        found = find_source(Path(cfg.pretrained_checkpoint).expanduser(), None, setting=setting)
        if found is None:
            message = f"{setting}: there is no checkpoint in {cfg.pretrained_checkpoint}"
            return Choice("error", notes=tuple(notes), error=message)
        taken = f"the run takes its model, and only that, from {found.place} ({setting})"
        return Choice("fresh", notes=(*notes, taken))
    if cfg.exit_on_missing_checkpoint:
        return Choice("error", notes=tuple(notes), error=f"there is no checkpoint in {cfg.load}")
    return Choice("fresh", notes=tuple(notes))


def _persistent(
    cfg: CheckpointConfig, own_paths: Iterable[Path], unmarked: Collection[str], *, required: bool
) -> tuple[Persistent, list[Source]]:
    """The persistent checkpoint, and older ones that may stand in for it where they cannot be looked for later."""
    try:
        found = _in_bucket(cfg) if is_url(cfg.load) else _in_directory(cfg, own_paths, unmarked)
    except CheckpointNotFoundError as error:
        if required:
            raise
        return Persistent(None, 0, str(error)), []
    if not found:
        return Persistent(None, 0), []
    return Persistent(found[0], parse_iteration_name(found[0].path.name) or 0), found[1:]


def _in_directory(cfg: CheckpointConfig, own_paths: Iterable[Path], unmarked: Collection[str]) -> list[Source]:
    places = (cfg.save, cfg.non_persistent_global_ckpt_dir, cfg.non_persistent_local_ckpt_dir)
    source = find_source(
        Path(str(cfg.load)).expanduser(),
        cfg.ckpt_step,
        [*(Path(place).expanduser() for place in places if place is not None), *own_paths],
        check_trackers=cfg.integrity != "off",
        fallback=cfg.fallback,
        unmarked=unmarked,
    )
    return [] if source is None else [source]


# What needs the S3 library is imported where it is needed: directories can do without it.
def _in_bucket(cfg: CheckpointConfig) -> list[Source]:
    from bridge.training.checkpointing.objects.loading import find_sources

    return find_sources(cfg)


def _in_mirror(cfg: CheckpointConfig) -> list[Source]:
    from bridge.training.checkpointing.objects.loading import find_in_mirror

    return find_in_mirror(cfg)


def _is_explicit(cfg: CheckpointConfig) -> bool:
    """Whether the settings name one checkpoint, in whose place no other will do."""
    if cfg.ckpt_step is not None:
        return True
    if is_url(cfg.load):
        return parse_iteration_name(str(cfg.load).rstrip("/").rpartition("/")[2]) is not None
    return is_iteration_directory(Path(str(cfg.load)).expanduser())


def _first_good(
    cfg: CheckpointConfig, waiting: list[Source], offers: list[Offer], notes: list[str], thorough: bool
) -> Choice:
    ranks = Ranks(None, 0, 1)
    # Without a save directory nothing is marked.
    candidates = Candidates(waiting, offers, cfg.fallback and not _is_explicit(cfg))

    def examine(source: Source) -> tuple[Source, Saved]:
        saved = _examined(cfg, source, ranks, thorough)
        return source, saved

    def accept(source: Source, saved: Saved) -> tuple[Source, Saved | None]:
        return source, None if saved is _UNREAD else saved

    try:
        source, known = load_best(candidates, examine, accept, ranks)
    except CheckpointError as error:
        passed = tuple(str(each) for each in candidates.failed[:-1])
        return Choice("error", passed_over=passed, notes=tuple(notes), error=str(error))
    if not thorough and is_marked(source.path):
        notes.append(f"{source.path} is marked as damaged: the run reads every byte of it before it loads it")
    passed = tuple(str(error) for error in candidates.failed)
    return Choice("resume", source, known, passed, tuple(note for note in notes if not _repeats(note, passed)))


def _repeats(note: str, passed: tuple[str, ...]) -> bool:
    return any(reason in note for reason in passed)


def _examined(cfg: CheckpointConfig, source: Source, ranks: Ranks, thorough: bool) -> Saved:
    if source.kind in ("local", "in_memory"):
        return _UNREAD
    if source.origin:
        from bridge.training.checkpointing.catalog.buckets.examining import examine

        return examine(cfg, source, thorough=thorough) or _UNREAD
    if thorough:
        saved = DirectoryCheckpoint(source, cfg.integrity).describe(ranks)
    else:
        saved, _ = describe(source, cfg.integrity)
    _require_payload(source.path)
    if source.kind != "persistent" and cfg.ckpt_step is None and cfg.save is not None:
        starts = starts_or_none(Path(cfg.save).expanduser())
        if starts.have_left_behind(saved.iteration, saved.start):
            raise CheckpointMismatchError(f"{source.path} is of a time that the run has left behind")
    return saved


def _require_payload(path: Path) -> None:
    """Of a checkpoint without a manifest, whose files nothing else is held against.

    Raises:
        CheckpointDamagedError: files are missing, or shorter than the metadata needs them.
    """
    if (path / MANIFEST).exists():
        return
    _, _, problems = payload_problems(path)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointDamagedError(f"{path} is damaged: {'; '.join(problems[:3])}{more}")


_UNREAD = Saved(0, False, Layout(), False, None, True, True, True, 0)
"""Stands for what only the ranks of a run can read."""
