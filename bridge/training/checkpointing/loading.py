"""load_checkpoint: which checkpoint, or none; `restoring` then loads it.

Rank 0 looks at the storage and decides; every rank learns the decision, or the error, at once. Loading
never changes the configuration.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointNotFoundError
from bridge.training.checkpointing.layout import list_checkpoints
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.restoring import LiveState, restore
from bridge.training.checkpointing.safe_globals import allow
from bridge.training.checkpointing.source import find_source

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
    if cfg.save is not None:
        save_dir = Path(cfg.save).expanduser()
        ranks.first("preparing checkpoint.save", lambda: commit.recover_once(save_dir, checkpointing_context))
    source = ranks.first("looking for a checkpoint", lambda: _find(state.cfg))
    if source is not None:
        model_only = "checkpoint.finetune is set" if cfg.finetune else ""
        return restore(
            source, live, ranks, strict=strict, model_only=model_only, metadata_only=skip_load_to_model_and_opt
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
    step = None if ignore_ckpt_step else cfg.ckpt_step
    source = ranks.first(
        "looking for a checkpoint", lambda: _require_source(Path(load_dir).expanduser(), step, "load_dir")
    )
    model_only = "only the model is taken from this path" if ignore_ckpt_step else ""
    if cfg.finetune:
        model_only = "checkpoint.finetune is set"
    return restore(source, live, ranks, strict=strict, model_only=model_only, metadata_only=skip_load_to_model_and_opt)


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
    setting = "checkpoint.pretrained_checkpoint"
    path = Path(live.state.cfg.checkpoint.pretrained_checkpoint).expanduser()
    source = ranks.first("looking for the pretrained checkpoint", lambda: _require_source(path, None, setting))
    return restore(
        source, live, ranks, strict=strict, model_only="it is the pretrained checkpoint", metadata_only=metadata_only
    )


def _require_source(path: Path, ckpt_step: int | None, setting: str) -> Source:
    source = find_source(path, ckpt_step, setting=setting)
    if source is None:
        raise CheckpointNotFoundError(f"{setting}: there is no checkpoint in {path}")
    return source


def _find(cfg: Any) -> Source | None:
    """The checkpoint that `checkpoint.load` leads to, and a warning if the saves will fall among another run's."""
    source = None
    if cfg.checkpoint.load is not None:
        own_paths = (cfg.checkpoint.save, cfg.logger.metrics_path, cfg.dataset.path_to_cache)
        source = find_source(
            Path(cfg.checkpoint.load).expanduser(),
            cfg.checkpoint.ckpt_step,
            [Path(path).expanduser() for path in own_paths if path is not None],
        )
    if cfg.checkpoint.save is not None:
        _warn_of_other_checkpoints(Path(cfg.checkpoint.save).expanduser(), None if cfg.checkpoint.finetune else source)
    return source


def _warn_of_other_checkpoints(save_dir: Path, continued: Source | None) -> None:
    iterations = list_checkpoints(save_dir).iterations
    if not iterations or (continued is not None and continued.path.resolve().parent == save_dir.resolve()):
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
