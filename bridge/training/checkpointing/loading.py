"""load_checkpoint: which checkpoint, or none; `restoring` then loads it.

Rank 0 looks at the storage and decides; every rank learns the decision, or the error, at once. Loading
never changes the configuration.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from bridge.training.checkpointing.events.recording import Phases, record_in, resolved
from bridge.training.checkpointing.fallback import Candidates, load_best
from bridge.training.checkpointing.formats.registry import require_format
from bridge.training.checkpointing.layout import is_iteration_directory, list_checkpoints, parse_iteration_name
from bridge.training.checkpointing.objects.places import save_directory
from bridge.training.checkpointing.objects.run import report_uploads_to
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.preparing import prepare
from bridge.training.checkpointing.resolve import Persistent, Source, preference
from bridge.training.checkpointing.restoring import LiveState, restore
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.source import find_source
from bridge.training.checkpointing.starts import Starts
from bridge.training.checkpointing.stored import DirectoryCheckpoint, StoredCheckpoint
from bridge.training.checkpointing.tiers import NonPersistentTier
from bridge.training.object_url import is_url

logger = logging.getLogger(__name__)


def load_checkpoint(
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    pg_collection: Any | None = None,
    module_name: str | None = None,
) -> tuple[int, int]:
    """Load the checkpoint that `checkpoint.load` and `checkpoint.ckpt_step` name into the run.

    Where `load` is the directory that the run saves in, its non-persistent checkpoints count too: the newest
    complete one of all tiers is loaded. One that turns out to be damaged is passed over for the next, and marked if it
    is a persistent one that this run could save again, unless `checkpoint.fallback` or an explicit step forbids it.
    Where `load` holds no checkpoint yet, `checkpoint.pretrained_checkpoint` gives the model, and only that.
    Without it training starts afresh, with a warning, unless `checkpoint.exit_on_missing_checkpoint` is set.
    The `save` directory is made ready first: made, claimed for this run, cleaned of what a crash left unfinished,
    and tried for writing. This happens whether or not there is something to load.

    Args:
        state: GlobalState; its train state, data iterator state and `loaded_from` are set.
        model: model chunks of this rank, loaded in place.
        optimizer: megatron-core optimizer, loaded in place; None loads the model only.
        opt_param_scheduler: its parameter scheduler, loaded in place.
        strict: as in `torch.nn.Module.load_state_dict`.
        checkpointing_context: kept by the caller between saves and loads.
        skip_load_to_model_and_opt: read only the train state and leave model, optimizer and random states alone.
        pg_collection: process groups; by default those of megatron-core's parallel_state.
        module_name: the namespace of the random states' key.

    Returns:
        The iteration and the FLOPs spent until then; (0, 0) if there was nothing to load.

    Raises:
        ConfigError: the checkpoint settings contradict one another.
        CheckpointNotFoundError: `ckpt_step` is not there, or nothing is and that is an error by the settings.
        CheckpointSaveError: the `save` directory cannot be made or written.
        DirectoryInUseError: another run saves there.
        CheckpointError: what is there is damaged, foreign, or does not fit. Every rank raises the same type.
    """
    cfg = state.cfg.checkpoint
    cfg.check()
    allow(cfg.safe_globals)
    ranks = Ranks.current().waiting(cfg.wait_timeout_minutes)
    require_format(cfg.ckpt_format, ranks)
    live = LiveState(
        state, model, optimizer, opt_param_scheduler, pg_collection or default_pg_collection(), module_name
    )
    context = {} if checkpointing_context is None else checkpointing_context
    phases = Phases()
    preparation = None if cfg.save is None else prepare(cfg, context, live.groups, len(model), ranks)
    if cfg.save is not None and ranks.is_first and state.cfg.logger.checkpoint_events:
        record_in(state.events, save_directory(cfg))
    report_uploads_to(state.events, context)
    tier = None if preparation is None else preparation.tier
    candidates = _candidates(state.cfg, _continued(cfg, tier, ranks), ranks)
    if candidates.waiting:
        state.events.emit(resolved(candidates.waiting[0]))
        candidates.events, candidates.phases = state.events, phases
        opened: list[StoredCheckpoint] = []

        def describe(source: Source) -> tuple[StoredCheckpoint, Saved]:
            stored = _open(source, tier, cfg, ranks)
            opened.append(stored)
            with _noticing_removal(source, ranks):
                saved = stored.describe(ranks)
            if preparation is not None and source.kind != "persistent" and cfg.ckpt_step is None:
                _reject_left_behind(source, saved, preparation.starts)
            phases.end("examining")
            return stored, saved

        def restore_all(stored: StoredCheckpoint, saved: Saved) -> tuple[int, int]:
            model_only, metadata_only = "checkpoint.finetune is set" if cfg.finetune else "", skip_load_to_model_and_opt

            def begin() -> None:
                candidates.begun = saved

            with _noticing_removal(stored.source, ranks):
                progress = restore(
                    stored,
                    saved,
                    live,
                    ranks,
                    strict=strict,
                    model_only=model_only,
                    metadata_only=metadata_only,
                    phases=phases,
                    begin=begin,
                )
            state.resumed_start = _origin(cfg, stored.source, saved, ranks)
            return progress

        try:
            progress = load_best(candidates, describe, restore_all, ranks)
        finally:
            for stored in opened:
                stored.close()
        if preparation is not None:
            preparation.pace.resumed = time.monotonic()
        return progress
    if preparation is not None:
        preparation.pace.resumed = time.monotonic()
    # With PEFT, setup has put the pretrained weights into the model before the adapters were added to it.
    if cfg.pretrained_checkpoint is not None and state.peft is None:
        return load_pretrained(live, ranks, strict=strict, metadata_only=skip_load_to_model_and_opt)
    reason = "checkpoint.load is not set" if cfg.load is None else f"there is no checkpoint in {cfg.load}"
    state.events.emit(resolved(None, reason))
    state.resumed_at = 0
    state.begin_anew()
    if cfg.load is None:
        return 0, 0
    start = "FROM SCRATCH" if state.peft is None else "WITH FRESH ADAPTERS"
    return _nothing_to_load(cfg.load, start, cfg.exit_on_missing_checkpoint, ranks)


def load_checkpoint_from_path(
    load_dir: str,
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    ignore_ckpt_step: bool = False,
    pg_collection: Any | None = None,
    module_name: str | None = None,
) -> tuple[int, int]:
    """Load the checkpoint in `load_dir`, whatever `checkpoint.load` says.

    Args:
        load_dir: a directory of checkpoints, or one checkpoint.
        ignore_ckpt_step: take the latest checkpoint and only its model, as from a pretrained checkpoint, which
            `checkpoint.ckpt_step` does not apply to.

    The other arguments, the result and the errors are those of `load_checkpoint`; that there is no checkpoint
    in `load_dir` is always an error.
    """
    del checkpointing_context
    ranks = Ranks.current()
    live = LiveState(
        state, model, optimizer, opt_param_scheduler, pg_collection or default_pg_collection(), module_name
    )
    cfg = state.cfg.checkpoint
    allow(cfg.safe_globals)
    require_format(cfg.ckpt_format, ranks)
    step = None if ignore_ckpt_step else cfg.ckpt_step
    phases = Phases()
    stored = _require_checkpoint("looking for a checkpoint", load_dir, step, "load_dir", cfg, ranks)
    state.events.emit(resolved(stored.source))
    model_only = "only the model is taken from this path" if ignore_ckpt_step else ""
    if cfg.finetune:
        model_only = "checkpoint.finetune is set"
    try:
        return restore(
            stored,
            _examined(stored, phases, ranks),
            live,
            ranks,
            strict=strict,
            model_only=model_only,
            metadata_only=skip_load_to_model_and_opt,
            phases=phases,
        )
    finally:
        stored.close()


def load_pretrained(
    live: LiveState, ranks: Ranks, *, strict: bool = True, metadata_only: bool = False
) -> tuple[int, int]:
    """Load the model, and only that, from the latest checkpoint in `checkpoint.pretrained_checkpoint`.

    Returns:
        (0, 0): training counts from the beginning.

    Raises:
        CheckpointNotFoundError: there is no checkpoint in it.
        CheckpointError: as `load_checkpoint`.
    """
    cfg = live.state.cfg.checkpoint
    allow(cfg.safe_globals)
    require_format(cfg.ckpt_format, ranks)
    setting = "checkpoint.pretrained_checkpoint"
    place, phases = cfg.pretrained_checkpoint, Phases()
    stored = _require_checkpoint("looking for the pretrained checkpoint", place, None, setting, cfg, ranks)
    live.state.events.emit(resolved(stored.source))
    return restore(
        stored,
        _examined(stored, phases, ranks),
        live,
        ranks,
        strict=strict,
        model_only="it is the pretrained checkpoint",
        metadata_only=metadata_only,
        phases=phases,
    )


def _examined(stored: StoredCheckpoint, phases: Phases, ranks: Ranks) -> Saved:
    """What a checkpoint says about itself. Collective."""
    saved = stored.describe(ranks)
    phases.end("examining")
    return saved


def _require_checkpoint(
    phase: str, place: str, ckpt_step: int | None, setting: str, cfg: Any, ranks: Ranks
) -> StoredCheckpoint:
    path = Path(place).expanduser()

    def find() -> Source:
        if is_url(place):
            return _object_storage().find_one(cfg, place, ckpt_step, setting)  # type: ignore[no-any-return]
        source = find_source(path, ckpt_step, setting=setting)
        if source is None:
            raise CheckpointNotFoundError(f"{setting}: there is no checkpoint in {path}")
        return source

    return _open(ranks.first(phase, find), None, cfg, ranks)


def _continued(cfg: Any, tier: NonPersistentTier | None, ranks: Ranks) -> NonPersistentTier | None:
    """The tier, if its checkpoints belong to what `checkpoint.load` names: they are of the run that saves."""
    if tier is None or cfg.load is None or cfg.finetune:
        return None

    # Where paths lead may differ between machines, and what the ranks do next must not.
    def is_continued() -> bool:
        return _is_own(cfg)

    return tier if ranks.first("comparing checkpoint.load with checkpoint.save", is_continued) else None


def _is_own(cfg: Any) -> bool:
    """Whether the run loads from where it saves. Local."""
    if cfg.load is None or cfg.save is None:
        return False
    if is_url(cfg.load) or is_url(cfg.save):
        return bool(cfg.load.rstrip("/") == cfg.save.rstrip("/"))
    return Path(cfg.load).expanduser().resolve() == Path(cfg.save).expanduser().resolve()


@contextmanager
def _noticing_removal(source: Source, ranks: Ranks) -> Iterator[None]:
    """Tell a persistent checkpoint that is deleted while it is being loaded from one that is damaged. Collective."""
    try:
        yield
    except CheckpointDamagedError as error:
        is_directory = source.kind == "persistent" and not source.origin
        if is_directory and ranks.first("looking for it again", lambda: not source.path.exists()):
            raise CheckpointError(
                f"{source.path} was removed while it was being loaded, as by the retention of a run that saves there: "
                "start again, or have that run keep it (docs/retention.md)"
            ) from error
        raise


def _origin(cfg: Any, source: Source, saved: Saved, ranks: Ranks) -> tuple[str, int]:
    """The save directory of the run, if a checkpoint is one of its own, and the number that it carries. Collective."""
    if cfg.save is None:
        return "", 0
    save_dir = save_directory(cfg)

    def is_own() -> bool:
        if source.kind != "persistent" or source.origin:
            return source.kind != "persistent" or _is_own(cfg)
        return source.path.parent.resolve() == save_dir.resolve()

    found_there = ranks.first("comparing the place of the checkpoint with checkpoint.save", is_own)
    return (str(save_dir), saved.start) if found_there else ("", 0)


def _reject_left_behind(source: Source, saved: Saved, starts: Starts) -> None:
    if starts.have_left_behind(saved.iteration, saved.start):
        raise CheckpointMismatchError(
            f"{source.path} is of a time that this run has left behind: a later start went on from before iteration "
            f"{saved.iteration}; set checkpoint.ckpt_step to load it all the same"
        )


def _candidates(cfg: Any, tier: NonPersistentTier | None, ranks: Ranks) -> Candidates:
    """The checkpoints that `checkpoint.load` leads to, the best first; and what there is to warn of."""
    save = cfg.checkpoint.save
    offers = [] if tier is None else tier.offers(ranks)

    def choose() -> tuple[list[Source], bool]:
        found, others = _find_persistent(cfg, required=tier is None)
        candidates = preference(found, offers, cfg.checkpoint.ckpt_step if cfg.checkpoint.load else None) + others
        if not candidates and cfg.checkpoint.mirror is not None and _is_own(cfg.checkpoint):
            candidates = _object_storage().find_in_mirror(cfg.checkpoint)
        if cfg.checkpoint.save is not None and not offers:
            _warn_of_other_checkpoints(cfg.checkpoint, None if cfg.checkpoint.finetune else found.source)
        return candidates, _is_explicit(cfg.checkpoint)

    waiting, is_explicit = ranks.first("looking for a checkpoint", choose)
    fallback = cfg.checkpoint.fallback and not is_explicit
    return Candidates(waiting, offers, fallback, None if save is None else save_directory(cfg.checkpoint))


def _is_explicit(cfg: Any) -> bool:
    """Whether the settings name one checkpoint, in whose place no other will do."""
    if cfg.load is None or cfg.ckpt_step is not None:
        return cfg.ckpt_step is not None
    if is_url(cfg.load):
        return parse_iteration_name(cfg.load.rstrip("/").rpartition("/")[2]) is not None
    return is_iteration_directory(Path(cfg.load).expanduser())


def _find_persistent(cfg: Any, *, required: bool) -> tuple[Persistent, list[Source]]:
    """The persistent checkpoint; that it is absent is only an error where no other tier can have it.

    Returns:
        It, and older ones that may stand in for it where they cannot be looked for later.
    """
    if cfg.checkpoint.load is None:
        return Persistent(None, 0), []
    try:
        is_remote = is_url(cfg.checkpoint.load)
        found = _object_storage().find_sources(cfg.checkpoint) if is_remote else _find_in_directory(cfg)
    except CheckpointNotFoundError as error:
        if required:
            raise
        return Persistent(None, 0, str(error)), []
    if not found:
        return Persistent(None, 0), []
    return Persistent(found[0], parse_iteration_name(found[0].path.name) or 0), found[1:]


def _object_storage() -> Any:
    """What finds and opens checkpoints there; imported where it is needed, because most runs can do without."""
    from bridge.training.checkpointing.objects import loading

    return loading


def _find_in_directory(cfg: Any) -> list[Source]:
    own_paths = (
        None if is_url(cfg.checkpoint.save) else cfg.checkpoint.save,
        cfg.checkpoint.staging_dir,
        cfg.checkpoint.non_persistent_global_ckpt_dir,
        cfg.checkpoint.non_persistent_local_ckpt_dir,
        cfg.logger.metrics_path,
        cfg.dataset.path_to_cache,
    )
    source = find_source(
        Path(cfg.checkpoint.load).expanduser(),
        cfg.checkpoint.ckpt_step,
        [Path(path).expanduser() for path in own_paths if path is not None],
        check_trackers=cfg.checkpoint.integrity != "off",
        fallback=cfg.checkpoint.fallback,
    )
    return [] if source is None else [source]


def _open(source: Source, tier: NonPersistentTier | None, cfg: Any, ranks: Ranks) -> StoredCheckpoint:
    if source.origin:
        return _object_storage().open_source(source, cfg, cfg.integrity)  # type: ignore[no-any-return]
    if tier is None or source.kind == "persistent":
        return DirectoryCheckpoint(source, cfg.integrity)
    return tier.open(source, ranks)


def _warn_of_other_checkpoints(cfg: Any, source: Source | None) -> None:
    """Say so if the saves will fall among another run's."""
    save_dir = save_directory(cfg)
    iterations = list_checkpoints(save_dir).iterations
    if not iterations or (source is not None and source.path.resolve().parent == save_dir.resolve()):
        return
    if source is not None and source.origin and _is_own(cfg):
        return
    logger.warning(
        "SAVING AMONG THE CHECKPOINTS OF ANOTHER RUN: checkpoint.save (%s) already holds checkpoints, the newest of "
        "iteration %d, and this run does not continue from there. Its saves will replace those of the same iteration "
        "and move the tracker. To continue that run, set checkpoint.load to the same directory; to keep it, set "
        "checkpoint.save to another one.",
        save_dir,
        iterations[-1],
    )


def _nothing_to_load(load_dir: str, start: str, is_error: bool, ranks: Ranks) -> tuple[int, int]:
    if is_error:
        raise CheckpointNotFoundError(
            f"checkpoint.load: there is no checkpoint in {load_dir}, and checkpoint.exit_on_missing_checkpoint is set"
        )
    if ranks.is_first:
        logger.warning(
            "STARTING %s: there is no checkpoint in checkpoint.load (%s). That is right for the first start "
            "of a run; if it is not, stop now and check the path, or set checkpoint.exit_on_missing_checkpoint: true.",
            start,
            load_dir,
        )
    return 0, 0
