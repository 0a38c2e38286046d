"""Why a run would resume, or would not: its directory, the checkpoint, and what of it would be restored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bridge.training.checkpointing.catalog.choosing import Choice
from bridge.training.checkpointing.catalog.entries import CatalogEntry, trackers_of
from bridge.training.checkpointing.catalog.listing import Listed, best_of, list_all
from bridge.training.checkpointing.catalog.origins import PLAIN
from bridge.training.checkpointing.catalog.owners import Owner, find_owner
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.detection import read_metadata
from bridge.training.checkpointing.errors import CheckpointError, CheckpointNotFoundError
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    RELEASE,
    RUN_CONFIG,
    TRACKER,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
    staged_name,
)
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.adapters import adapters_of_run, require_adapters
from bridge.training.checkpointing.plans.load_plan import LoadPlan, Saved, Wanted, plan_load
from bridge.training.checkpointing.plans.resharding import OptimizerForm
from bridge.training.checkpointing.source import older_sources
from bridge.training.checkpointing.trackers import read_tracker, sound_tracker
from bridge.training.config import CheckpointConfig, ConfigContainer, ConfigError
from bridge.training.object_url import ObjectUrl

Grade = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    grade: Grade
    text: str
    advice: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found of a directory and of a run that would load it."""

    directory: Path
    owner: Owner
    listed: Listed
    findings: tuple[Finding, ...]
    plan: LoadPlan | None
    """What would be restored; None where nothing would be, or it cannot be said."""
    plan_of: str
    """The run that the plan is of, in words."""

    @property
    def place(self) -> str:
        """Where this is, for people."""
        return self.listed.place

    @property
    def choice(self) -> Choice:
        """What a run would load."""
        return self.listed.choice

    @property
    def is_well(self) -> bool:
        """Whether a run would start, and nothing needs to be repaired."""
        return self.choice.outcome != "error" and not any(each.grade == "problem" for each in self.findings)


def diagnose(directory: Path, recipe: ConfigContainer | None = None, world_size: int | None = None) -> Diagnosis:
    """Examine a directory of checkpoints as a run would that is started with `checkpoint.load` set to it.

    Args:
        directory: of checkpoints, or one checkpoint.
        recipe: of the run; None is the run that saved last, as its checkpoint records it.
        world_size: ranks of the run; None is as many as saved the checkpoint.

    Raises:
        NotACheckpointError: it is a file.
        CheckpointNotFoundError: it does not exist, and there is no recipe.
        OSError: it cannot be read.
    """
    if not directory.exists() and recipe is None:
        raise CheckpointNotFoundError(f"{directory} does not exist; name the checkpoint.save of a run")
    cfg, own_paths = (None, []) if recipe is None else settings_of(recipe, directory)
    listed = list_all(directory, cfg, thorough=True, own_paths=own_paths)
    owner = find_owner(directory)
    with collected():
        findings = list(_findings(directory, listed, owner))
    plan, plan_of = None, ""
    if listed.choice.saved is not None and listed.choice.source is not None:
        config = recipe or recorded_config(listed.choice.source.path)
        plan_of = plan_name(recipe)
        plan, more = planned(listed.choice.source.path, listed.choice.saved, config, world_size)
        findings += more
        findings += _of_origin(listed, listed.choice.saved)
    return Diagnosis(directory, owner, listed, tuple(findings), plan, plan_of)


def plan_name(recipe: ConfigContainer | None) -> str:
    """The run that a plan is of, in words."""
    return "a run of the recipe" if recipe is not None else "a run with the settings that it was saved with"


def settings_of(recipe: ConfigContainer, directory: Path | ObjectUrl) -> tuple[CheckpointConfig, list[Path]]:
    """The settings of a run of a recipe that loads from a place, and what it writes beside its checkpoints."""
    named = (recipe.logger.metrics_path, recipe.dataset.path_to_cache)
    own_paths = [Path(path).expanduser() for path in named if path is not None]
    save = recipe.checkpoint.save or (str(directory) if isinstance(directory, Path) else None)
    return replace(recipe.checkpoint, load=str(directory), save=save), own_paths


def _findings(directory: Path, listed: Listed, owner: Owner) -> Iterator[Finding]:
    if not directory.exists():
        yield Finding("note", f"{directory} does not exist")
    if owner.is_alive:
        yield Finding("note", f"a run saves here now: {owner.description}", "repair and prune wait until it has ended")
    elif owner.is_alive is None:
        yield Finding(
            "note", f"the file system has no locks: whether a run saves here is unknown ({owner.description})"
        )
    if not is_iteration_directory(directory):
        yield from _of_trackers(directory, listed)
        yield from _of_leftovers(directory, listed, owner)
        yield from _of_newer(directory, listed)
    yield from of_passed_over(listed.choice)
    if listed.unconsidered:
        yield Finding(
            "problem",
            f"there are {len(listed.unconsidered)} checkpoints, and a run with these settings takes none of them",
            "give --recipe with the run's checkpoint.non_persistent_... settings",
        )
    passed = " ".join(listed.choice.passed_over)
    for entry in listed.rows:
        # A path is followed by a space or a colon, so one that begins like another is told apart.
        if not (entry.state == "damaged" and (f"{entry.path} " in passed or f"{entry.path}:" in passed)):
            yield from _of_entry(entry)
    yield from (Finding("note", note) for note in listed.choice.notes)


def of_passed_over(choice: Choice) -> Iterator[Finding]:
    """Better checkpoints than that which would be loaded."""
    for reason in choice.passed_over:
        yield Finding("problem", f"would be passed over: {reason}", "bridge-ckpt verify tells which files are wrong")


def _of_trackers(directory: Path, listed: Listed) -> Iterator[Finding]:
    listing = list_checkpoints(directory)
    advice = f"bridge-ckpt repair {directory} writes the trackers anew"
    for name in trackers_of(listing):
        only = replace(listing, has_tracker=name == TRACKER, has_legacy_tracker=name == LEGACY_TRACKER)
        try:
            tracked = read_tracker(only)
        except (CheckpointError, OSError) as error:
            yield Finding("problem", str(error), advice)
            continue
        if tracked is None:
            continue
        target = RELEASE if tracked.release else iteration_name(tracked.iteration)
        if (directory / target).is_dir() or target in map(staged_name, listed.unpublished):
            yield Finding("ok", f"{name} names {target}")
        else:
            yield Finding("problem", f"{name} names {target}, which does not exist", advice)
    if not trackers_of(listing) and listing.iterations:
        yield Finding("problem", "there is no tracker: a run takes the newest whole checkpoint", advice)
    try:
        sound_tracker(listing, fallback=False)
    except CheckpointError as error:
        yield Finding("problem", str(error), advice)
    except OSError as error:
        yield Finding("problem", f"the tracker cannot be held against the checkpoint that it names: {error}")
    if listing.has_tracker and listing.has_legacy_tracker:
        yield from _of_difference(directory)


def _of_difference(directory: Path) -> Iterator[Finding]:
    listing = list_checkpoints(directory)
    try:
        own, (iteration, release) = read_tracker(listing), read_metadata(directory / LEGACY_TRACKER)
    except (CheckpointError, OSError):
        return
    if own is not None and (own.iteration, own.release) != (iteration, release):
        yield Finding(
            "note",
            f"the trackers differ: {TRACKER} names {own.iteration} and counts; {LEGACY_TRACKER} names "
            f"{RELEASE if release else iteration}, for readers of Megatron-LM",
            f"the next save moves both; so does bridge-ckpt repair {directory}",
        )


def _of_leftovers(directory: Path, listed: Listed, owner: Owner) -> Iterator[Finding]:
    for name in listed.unpublished:
        yield Finding(
            "note",
            f"a crash has left {staged_name(name)} complete as {directory / name}; the next run that saves here "
            "publishes it before it loads",
            "so does repair",
        )
    for name in listed.leftovers:
        what = "the remains of a save" if staged_name(name) is not None else "on its way out"
        if owner.is_alive and staged_name(name) is not None:
            what = "perhaps a save in progress"
        advice = "" if owner.is_alive else "it counts for nothing; the next run that saves here removes it, or repair"
        yield Finding("note", f"{name}: {what}", advice)


def _of_newer(directory: Path, listed: Listed) -> Iterator[Finding]:
    chosen = listed.choice.iteration
    newer = [
        row
        for row in listed.rows
        if row.kind == "persistent" and chosen is not None and row.iteration is not None and row.iteration > chosen
    ]
    if newer:
        names = ", ".join(f"{row.iteration}{' (left behind)' if row.left_behind else ''}" for row in newer)
        good = best_of(reversed(newer))
        advice = "" if good is None else f"to load the newest of them: checkpoint.ckpt_step={good.iteration}"
        yield Finding("note", f"newer than what would be loaded: iteration {names}", advice)
    listing = list_checkpoints(directory)
    if chosen is not None and chosen in listing.iterations:
        stand_in = next(iter(older_sources(listing, chosen)), None)
        if stand_in is not None:
            yield Finding("ok", f"should it turn out to be damaged while it is read, {stand_in.path.name} is next")


def _of_entry(entry: CatalogEntry) -> Iterator[Finding]:
    if entry.state == "marked":
        yield Finding(
            "note",
            f"{entry.path.name} is marked as damaged: {entry.problem or 'the mark does not say why'}",
            "retention neither counts nor deletes it; repair takes the mark off if every byte of it is right",
        )
    elif entry.state == "damaged":
        yield Finding(
            "problem",
            f"{entry.path.name}: {entry.problem}",
            "delete it, or save the iteration again, which replaces it; runs pass over it",
        )
    elif entry.kind in ("local", "in_memory") and entry.problem:
        yield Finding("note", f"{entry.kind} checkpoint of iteration {entry.iteration}: {entry.problem}")


def recorded_config(checkpoint: Path) -> ConfigContainer | None:
    """The configuration of the run that saved a checkpoint; None where it has none that can be read here."""
    try:
        return ConfigContainer.from_yaml(checkpoint / RUN_CONFIG)
    except (ConfigError, OSError):
        return None


def planned(
    path: Path, saved: Saved, config: ConfigContainer | None, world_size: int | None
) -> tuple[LoadPlan | None, list[Finding]]:
    """What a run would restore of a checkpoint, and what speaks against it.

    Args:
        path: the checkpoint, for messages.
        saved: what it says about itself.
        config: of the run; None if it is unknown.
        world_size: ranks of the run; None is as many as saved the checkpoint.
    """
    if config is None:
        return None, [Finding("note", "what a run would restore depends on its settings: give --recipe FILE")]
    try:
        wanted = wanted_by(config, saved, world_size)
        require_adapters(path, saved.adapters, wanted.adapters)
        return plan_load(saved, wanted), []
    except CheckpointError as error:
        return None, [Finding("problem", f"the checkpoint does not fit the run: {error}")]
    except ConfigError as error:
        return None, [Finding("problem", str(error), "correct the recipe, or give another --world-size")]


def wanted_by(config: ConfigContainer, saved: Saved, world_size: int | None = None) -> Wanted:
    """What a run asks of a checkpoint, as far as its settings tell without its model.

    Args:
        config: of the run.
        saved: the checkpoint; a run without a `world_size` has as many ranks as it.
        world_size: ranks of the run.

    Raises:
        ConfigError: the number of ranks does not fit the parallel sizes.
    """
    model, layout = config.model, saved.layout
    ranks = world_size or layout.data * layout.tensor * layout.pipeline * layout.context
    is_half = model.precision != "fp32"
    parts = 2 if model.num_moe_experts is not None and model.expert_model_parallel_size > 1 else 1
    return Wanted(
        layout=Layout(
            tensor=model.tensor_model_parallel_size,
            pipeline=model.pipeline_model_parallel_size,
            virtual_pipeline=model.virtual_pipeline_model_parallel_size or 1,
            context=model.context_parallel_size,
            expert=model.expert_model_parallel_size,
            expert_tensor=model.expert_tensor_parallel_size or model.tensor_model_parallel_size,
            data=config.data_parallel_size(ranks),
        ),
        load_optim=config.checkpoint.load_optim,
        load_rng=config.checkpoint.load_rng,
        load_dataloader_state=config.checkpoint.load_dataloader_state,
        has_optimizer=True,
        uses_distributed_optimizer=config.ddp.use_distributed_optimizer,
        megatron_fsdp=config.ddp.use_megatron_fsdp,
        data_parallel_random_init=config.rng.data_parallel_random_init,
        model_only="checkpoint.finetune is set" if config.checkpoint.finetune else "",
        optimizer_form=OptimizerForm(config.ddp.use_distributed_optimizer, is_half, parts),
        precision=model.precision,
        adapters=None if config.peft is None else adapters_of_run(config.peft, None),
        reruns=config.rerun_state_machine.rerun_mode != "disabled",
    )


def _of_origin(listed: Listed, saved: Saved) -> Iterator[Finding]:
    """What is understood of another program's checkpoint."""
    chosen = next((row for row in listed.rows if row.path == getattr(listed.choice.source, "path", None)), None)
    if chosen is None or chosen.origin in ("bridge", ""):
        return
    yield Finding(
        "note",
        f"it was written by {chosen.origin}: it has no manifest, so damage in its tensors cannot be told from values",
        "the first save of a run adds checkpoints with checksums beside it, and leaves it as it is",
    )
    known = f"parallel sizes {saved.layout}" if saved.layout_is_known else "its parallel sizes are unknown"
    has_iteration = chosen.iteration is not None or saved.release or chosen.origin != PLAIN
    iteration = f"iteration {saved.iteration}" if has_iteration else "no iteration, so a run counts from 0"
    yield Finding("ok", f"understood of it: {iteration}, {known}")
