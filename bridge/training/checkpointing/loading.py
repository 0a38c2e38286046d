"""load_checkpoint: resolve → plan → read → apply.

Rank 0 looks at the storage and decides; every rank learns the decision, or the error, at once. Nothing
of the run changes before everything has been read. Loading never changes the configuration.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.dataloader import read_dataloader_state
from bridge.training.checkpointing.contents.model import load_model_state_dict
from bridge.training.checkpointing.contents.optimizer import load_optimizer, load_scheduler
from bridge.training.checkpointing.contents.rng import get_rng_state, set_rng_state
from bridge.training.checkpointing.contents.state_dict import RNG, generate_state_dict
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.errors import CheckpointNotFoundError
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.layout import TRAIN_STATE
from bridge.training.checkpointing.parallel import Layout, default_pg_collection
from bridge.training.checkpointing.plan import LoadPlan, Saved, Wanted, plan_load
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe, find_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """The live objects that a load fills."""

    state: Any
    model: list[Any]
    optimizer: Any | None
    scheduler: Any | None
    groups: Any
    module_name: str | None


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

    An empty or absent `load` directory starts afresh, with a warning, unless
    `checkpoint.exit_on_missing_checkpoint` is set. If `load` is also the `save` directory, what an
    earlier crash left unfinished there is cleaned up first.

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
        CheckpointError: what is there is damaged, foreign, or does not fit. Every rank raises the same type.
    """
    cfg = state.cfg.checkpoint
    cfg.check()
    if cfg.load is None:
        return 0, 0
    ranks = Ranks.current()
    load_dir = Path(cfg.load)
    source = ranks.first("looking for a checkpoint", lambda: _resolve(load_dir, state.cfg, checkpointing_context))
    if source is None:
        return _nothing_to_load(load_dir, cfg.exit_on_missing_checkpoint, ranks)
    groups = pg_collection or default_pg_collection()
    run = _Run(state, model, optimizer, opt_param_scheduler, groups, module_name)
    return _load_from(source, run, ranks, strict=strict, metadata_only=skip_load_to_model_and_opt)


def _resolve(load_dir: Path, cfg: Any, context: dict[str, Any] | None) -> Source | None:
    save = cfg.checkpoint.save
    if save is not None and load_dir.exists() and Path(save).resolve() == load_dir.resolve():
        commit.recover_once(load_dir, context)
    own_files = [] if cfg.logger.metrics_path is None else [Path(cfg.logger.metrics_path)]
    return find_source(load_dir, cfg.checkpoint.ckpt_step, own_files)


def _nothing_to_load(load_dir: Path, is_error: bool, ranks: Ranks) -> tuple[int, int]:
    if is_error:
        raise CheckpointNotFoundError(
            f"checkpoint.load: there is no checkpoint in {load_dir}, and checkpoint.exit_on_missing_checkpoint is set"
        )
    if ranks.is_first:
        logger.warning(
            "STARTING FROM SCRATCH: there is no checkpoint in checkpoint.load (%s). That is right for the first start "
            "of a run; if it is not, stop now and check the path, or set checkpoint.exit_on_missing_checkpoint: true.",
            load_dir,
        )
    return 0, 0


def _load_from(source: Source, run: _Run, ranks: Ranks, *, strict: bool, metadata_only: bool) -> tuple[int, int]:
    begun = time.monotonic()
    saved = ranks.first("examining the checkpoint", lambda: describe(source))
    if ranks.is_first:
        logger.info("loading %s: %s", source.path, source.reason)
    cfg = run.state.cfg
    if metadata_only:
        ranks.run("restoring the train state", lambda: _apply_train_state(source, saved, run))
    else:
        plan = ranks.run("planning the load", lambda: plan_load(saved, _wanted(run)))
        template = ranks.run("preparing the state to load", lambda: _template(saved, plan, run))
        loaded = torch_dist.load(
            template,
            source.path,
            ranks,
            strictness=cfg.checkpoint.dist_ckpt_strictness,
            parallelization_group=run.groups.dp_cp if cfg.checkpoint.fully_parallel_load else None,
        )
        ranks.run("applying the checkpoint", lambda: _apply(loaded, source, saved, plan, run, strict))
        if ranks.is_first:
            logger.info("parts of %s:\n%s", source.path, plan.table())
    run.state.loaded_from = str(source.path)
    if ranks.is_first:
        seconds = time.monotonic() - begun
        logger.info("loaded iteration %d from %s in %.2f s", run.state.train_state.step, source.path, seconds)
    return run.state.train_state.step, run.state.train_state.floating_point_operations_so_far


def _wanted(run: _Run) -> Wanted:
    cfg = run.state.cfg
    return Wanted(
        layout=Layout.of(run.groups, len(run.model)),
        load_optim=cfg.checkpoint.load_optim,
        load_rng=cfg.checkpoint.load_rng,
        has_optimizer=run.optimizer is not None,
        uses_distributed_optimizer=cfg.ddp.use_distributed_optimizer,
        data_parallel_random_init=cfg.rng.data_parallel_random_init,
    )


def _template(saved: Saved, plan: LoadPlan, run: _Run) -> dict[str, Any]:
    cfg = run.state.cfg
    metadata = {**(saved.content_metadata or {}), "dp_cp_group": run.groups.dp_cp}
    rng_state = None
    if plan.rng.restore:
        rng_state = get_rng_state(
            cfg.rng.data_parallel_random_init,
            cfg.checkpoint.ckpt_format,
            pg_collection=run.groups,
            module_name=run.module_name,
        )
    return generate_state_dict(
        cfg.checkpoint,
        run.model,
        run.optimizer if plan.optimizer.restore else None,
        run.scheduler if plan.scheduler.restore else None,
        rng_state,
        optim_sd_kwargs={"is_loading": True, "metadata": metadata},
        model_sd_kwargs={"metadata": metadata},
    )


def _apply(loaded: dict[str, Any], source: Source, saved: Saved, plan: LoadPlan, run: _Run, strict: bool) -> None:
    if plan.data_iterator.restore:
        run.state.dataloader_state = read_dataloader_state(source.path, run.groups.dp.rank())
    load_model_state_dict(run.model, loaded, strict)
    if run.optimizer is not None:
        if plan.optimizer.restore:
            load_optimizer(run.optimizer, loaded)
        else:
            # Main parameters were copied from the model's before the load; copy them again.
            run.optimizer.reload_model_params()
    if run.scheduler is not None and plan.scheduler.restore:
        load_scheduler(run.scheduler, loaded)
    _apply_train_state(source, saved, run)
    if plan.rng.restore:
        # Last: nothing after this may draw a random number.
        set_rng_state(loaded[RNG], pg_collection=run.groups)


def _apply_train_state(source: Source, saved: Saved, run: _Run) -> None:
    train_state = type(run.state.train_state)()
    if saved.release:
        train_state.step = 0
    elif saved.has_train_state:
        train_state.load_state_dict(read_train_state(source.path / TRAIN_STATE))
    else:
        train_state.step = saved.iteration
    run.state.train_state = train_state
