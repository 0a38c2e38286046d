"""load_checkpoint: which checkpoint, or none; `restoring` then loads it.

Rank 0 looks at the storage and decides; every rank learns the decision, or the error, at once. Loading
never changes the configuration.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from bridge.training.checkpointing.layout import list_checkpoints, parse_iteration_name
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.preparing import prepare
from bridge.training.checkpointing.resolve import Persistent, Source, preference
from bridge.training.checkpointing.restoring import LiveState, restore
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.source import find_source
from bridge.training.checkpointing.stored import DirectoryCheckpoint, StoredCheckpoint
from bridge.training.checkpointing.tiers import NonPersistentTier

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
    complete one of all tiers is loaded, and one that turns out to be damaged is passed over for the next.
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
    ranks = Ranks.current()
    live = LiveState(
        state, model, optimizer, opt_param_scheduler, pg_collection or default_pg_collection(), module_name
    )
    context = {} if checkpointing_context is None else checkpointing_context
    tier = None if cfg.save is None else prepare(cfg, context, live.groups, len(model), ranks)
    candidates = _candidates(state.cfg, _continued(cfg, tier), ranks)
    if candidates:
        stored, saved = _open_best(candidates, tier, ranks)
        model_only = "checkpoint.finetune is set" if cfg.finetune else ""
        return restore(
            stored, saved, live, ranks, strict=strict, model_only=model_only, metadata_only=skip_load_to_model_and_opt
        )
    # With PEFT, setup has put the pretrained weights into the model before the adapters were added to it.
    if cfg.pretrained_checkpoint is not None and state.peft is None:
        return load_pretrained(live, ranks, strict=strict, metadata_only=skip_load_to_model_and_opt)
    if cfg.load is None:
        return 0, 0
    start = "FROM SCRATCH" if state.peft is None else "WITH FRESH ADAPTERS"
    return _nothing_to_load(Path(cfg.load), start, cfg.exit_on_missing_checkpoint, ranks)


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
    step = None if ignore_ckpt_step else cfg.ckpt_step
    stored = _require_checkpoint("looking for a checkpoint", Path(load_dir).expanduser(), step, "load_dir", ranks)
    model_only = "only the model is taken from this path" if ignore_ckpt_step else ""
    if cfg.finetune:
        model_only = "checkpoint.finetune is set"
    return restore(
        stored,
        stored.describe(ranks),
        live,
        ranks,
        strict=strict,
        model_only=model_only,
        metadata_only=skip_load_to_model_and_opt,
    )


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
    allow(live.state.cfg.checkpoint.safe_globals)
    setting = "checkpoint.pretrained_checkpoint"
    path = Path(live.state.cfg.checkpoint.pretrained_checkpoint).expanduser()
    stored = _require_checkpoint("looking for the pretrained checkpoint", path, None, setting, ranks)
    return restore(
        stored,
        stored.describe(ranks),
        live,
        ranks,
        strict=strict,
        model_only="it is the pretrained checkpoint",
        metadata_only=metadata_only,
    )


def _require_checkpoint(
    phase: str, path: Path, ckpt_step: int | None, setting: str, ranks: Ranks
) -> DirectoryCheckpoint:
    def find() -> Source:
        source = find_source(path, ckpt_step, setting=setting)
        if source is None:
            raise CheckpointNotFoundError(f"{setting}: there is no checkpoint in {path}")
        return source

    return DirectoryCheckpoint(ranks.first(phase, find))


def _continued(cfg: Any, tier: NonPersistentTier | None) -> NonPersistentTier | None:
    """The tier, if its checkpoints belong to what `checkpoint.load` names: they are of the run that saves."""
    if tier is None or cfg.load is None or cfg.finetune:
        return None
    same = Path(cfg.load).expanduser().resolve() == Path(cfg.save).expanduser().resolve()
    return tier if same else None


def _candidates(cfg: Any, tier: NonPersistentTier | None, ranks: Ranks) -> list[Source]:
    """The checkpoints that `checkpoint.load` leads to, the best first; and what there is to warn of."""
    offers = [] if tier is None else tier.offers(ranks)

    def choose() -> list[Source]:
        found = _find_persistent(cfg, required=tier is None)
        candidates = preference(found, offers, cfg.checkpoint.ckpt_step if cfg.checkpoint.load else None)
        if cfg.checkpoint.save is not None and not offers:
            _warn_of_other_checkpoints(cfg.checkpoint, None if cfg.checkpoint.finetune else found.source)
        return candidates

    return ranks.first("looking for a checkpoint", choose)


def _find_persistent(cfg: Any, *, required: bool) -> Persistent:
    """The persistent checkpoint; that it is absent is only an error where no other tier can have it."""
    if cfg.checkpoint.load is None:
        return Persistent(None, 0)
    own_paths = (
        cfg.checkpoint.save,
        cfg.checkpoint.non_persistent_global_ckpt_dir,
        cfg.checkpoint.non_persistent_local_ckpt_dir,
        cfg.logger.metrics_path,
        cfg.dataset.path_to_cache,
    )
    load_dir = Path(cfg.checkpoint.load).expanduser()
    try:
        source = find_source(
            load_dir, cfg.checkpoint.ckpt_step, [Path(path).expanduser() for path in own_paths if path is not None]
        )
    except CheckpointNotFoundError as error:
        if required:
            raise
        return Persistent(None, 0, str(error))
    iteration = None if source is None else parse_iteration_name(source.path.name)
    return Persistent(source, iteration or 0)


def _open_best(
    candidates: list[Source], tier: NonPersistentTier | None, ranks: Ranks
) -> tuple[StoredCheckpoint, Saved]:
    """The best candidate that is sound and fits; the last one's problem is the run's."""
    for number, source in enumerate(candidates, 1):
        try:
            if tier is None or source.kind == "persistent":
                stored: StoredCheckpoint = DirectoryCheckpoint(source)
            else:
                stored = tier.open(source, ranks)
            return stored, stored.describe(ranks)
        except (CheckpointDamagedError, CheckpointMismatchError) as error:
            if number == len(candidates):
                raise
            if ranks.is_first:
                next_best = candidates[number].path
                logger.warning("PASSING OVER THE NEWEST CHECKPOINT, going back to %s: %s", next_best, error)
    raise CheckpointNotFoundError("there is no checkpoint to open")


def _warn_of_other_checkpoints(cfg: Any, source: Source | None) -> None:
    """Say so if the saves will fall among another run's."""
    save_dir = Path(cfg.save).expanduser()
    iterations = list_checkpoints(save_dir).iterations
    if not iterations or (source is not None and source.path.resolve().parent == save_dir.resolve()):
        return
    logger.warning(
        "SAVING AMONG THE CHECKPOINTS OF ANOTHER RUN: checkpoint.save (%s) already holds checkpoints, the newest of "
        "iteration %d, and this run does not continue from there. Its saves will replace those of the same iteration "
        "and move the tracker. To continue that run, set checkpoint.load to the same directory; to keep it, set "
        "checkpoint.save to another one.",
        save_dir,
        iterations[-1],
    )


def _nothing_to_load(load_dir: Path, start: str, is_error: bool, ranks: Ranks) -> tuple[int, int]:
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
