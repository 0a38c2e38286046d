"""Restoring one checkpoint into a run: plan → read → apply. Collective."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents import fsdp_dtensor
from bridge.training.checkpointing.contents.dataloader import DataloaderState
from bridge.training.checkpointing.contents.glu import model_glu_sizes, require_same_optimizer_order
from bridge.training.checkpointing.contents.main_params import load_main_params, with_full_precision
from bridge.training.checkpointing.contents.model import load_model_state_dict
from bridge.training.checkpointing.contents.optimizer import load_optimizer, load_scheduler, share_main_params
from bridge.training.checkpointing.contents.optimizer_forms import form_of
from bridge.training.checkpointing.contents.peft import apply_peft_adapter_filter_to_state_dict, load_adapters
from bridge.training.checkpointing.contents.rerun import (
    RERUN,
    rerun_is_enabled,
    rerun_template,
    set_rerun_state,
)
from bridge.training.checkpointing.contents.rng import reseed, rng_place, rng_template, set_rng_state
from bridge.training.checkpointing.contents.state_dict import RNG, generate_state_dict
from bridge.training.checkpointing.contents.version import set_checkpoint_version
from bridge.training.checkpointing.contents.vocabulary import vocabulary_size
from bridge.training.checkpointing.events.recording import Phases, record_load
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.formats.read_choice import sharing_group
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.adapters import adapters_of_run, other_base, require_adapters
from bridge.training.checkpointing.plans.load_plan import LoadPlan, Saved, Wanted, plan_load
from bridge.training.checkpointing.plans.random_states import request_rng
from bridge.training.checkpointing.read_meter import bytes_read, bytes_wanted, shown
from bridge.training.checkpointing.stored import StoredCheckpoint
from bridge.training.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveState:
    """The live objects of a run that a checkpoint is restored into."""

    state: Any
    model: list[Any]
    optimizer: Any | None
    scheduler: Any | None
    groups: Any
    """Process groups."""
    module_name: str | None


def restore(
    stored: StoredCheckpoint,
    saved: Saved,
    live: LiveState,
    ranks: Ranks,
    *,
    strict: bool = True,
    model_only: str = "",
    metadata_only: bool = False,
    phases: Phases | None = None,
    begin: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Restore what the checkpoint has, the run wants, and the layout allows; log what became of each part.

    Args:
        stored: the checkpoint.
        saved: what it said about itself.
        live: what to restore into.
        ranks: all ranks.
        strict: as in `torch.nn.Module.load_state_dict`.
        model_only: why nothing but the model is wanted; empty restores everything.
        metadata_only: read the counters and leave model, optimizer and random states alone.
        phases: of this load, if it has begun before; what is done here is added to it.
        begin: called before the first value is read that may go straight into the live state.

    Returns:
        The iteration and the FLOPs spent until then; (0, 0) with `model_only`.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit. Every rank raises the same type.
    """
    phases, begun = phases or Phases(), bytes_read()
    source = stored.source
    if ranks.is_first:
        logger.info("loading %s: %s", source.place, source.reason)
    wanted = _wanted(live, model_only)
    plan = ranks.run("planning the load", lambda: _plan(source.path, saved, wanted))
    if metadata_only:
        ranks.run("restoring the train state", lambda: _apply_train_state(stored, saved, plan, live))
    else:
        _read_and_apply(stored, saved, wanted, plan, live, ranks, strict, phases, begin)
    live.state.loaded_from, live.state.loaded_kind = source.place, source.kind
    live.state.resumed_at = live.state.train_state.step
    if not model_only:
        live.state.begin_anew()
    phases.end("applying")
    ended = bytes_read()
    line = record_load(
        live.state.events,
        source.place,
        saved.iteration,
        source.kind,
        phases,
        checkpoint_format=saved.checkpoint_format,
        total_bytes=saved.total_bytes,
        bytes_read=None if begun is None or ended is None else ended - begun,
    )
    if ranks.is_first:
        logger.info("%s", line)
    train_state = live.state.train_state
    return train_state.step, train_state.floating_point_operations_so_far


def _wanted(live: LiveState, model_only: str) -> Wanted:
    cfg = live.state.cfg
    return Wanted(
        layout=Layout.of(live.groups, len(live.model)),
        load_optim=cfg.checkpoint.load_optim,
        load_rng=cfg.checkpoint.load_rng,
        load_dataloader_state=cfg.checkpoint.load_dataloader_state,
        has_optimizer=live.optimizer is not None,
        uses_distributed_optimizer=cfg.ddp.use_distributed_optimizer,
        megatron_fsdp=fsdp_dtensor.is_megatron_fsdp(live.model[0]),
        data_parallel_random_init=cfg.rng.data_parallel_random_init,
        vocabulary_size=vocabulary_size(cfg, live.state.tokenizer),
        model_only=model_only,
        optimizer_form=form_of(live.optimizer),
        precision=cfg.model.precision,
        adapters=None if live.state.peft is None else adapters_of_run(cfg.peft, live.state.base_checkpoint),
        reruns=rerun_is_enabled(),
    )


def _plan(path: Path, saved: Saved, wanted: Wanted) -> LoadPlan:
    require_adapters(path, saved.adapters, wanted.adapters)
    if Ranks.current().is_first and (other := other_base(saved.adapters, wanted.adapters)):
        logger.warning(
            "ANOTHER BASE MODEL: the adapters in %s were trained on %s, which is not what "
            "checkpoint.pretrained_checkpoint gives now; name that one to go on with it",
            path,
            other,
        )
    return plan_load(saved, wanted)


def _read_and_apply(
    stored: StoredCheckpoint,
    saved: Saved,
    wanted: Wanted,
    plan: LoadPlan,
    live: LiveState,
    ranks: Ranks,
    strict: bool,
    phases: Phases,
    begin: Callable[[], None],
) -> None:
    cfg = live.state.cfg.checkpoint
    request = request_rng(saved.rng, wanted.rng, rng_place(live.groups)) if plan.rng.restore else None
    template = ranks.run("preparing the state to load", lambda: _template(saved, plan, live))
    sharded = fsdp_dtensor.is_megatron_fsdp(live.model[0])
    if sharded:
        template = fsdp_dtensor.template_on_all_ranks(live.state.cfg, template, live.model[0], ranks)
    if request is not None:
        template[RNG] = fsdp_dtensor.rng_request(request) if sharded else rng_template(request, live.module_name)
    restores_rerun = plan.rerun is not None and plan.rerun.restore
    if restores_rerun:
        template[RERUN] = rerun_template()
    iterator_state = ranks.run("reading the state of the data iterator", lambda: _iterator_state(stored, plan, live))
    phases.end("preparing")
    begin()
    progress = _progress(live.state.cfg.logger) if ranks.is_first else None
    with shown(progress, f"reading {stored.source.path.name}", 0 if progress is None else bytes_wanted(template)):
        loaded = stored.load(
            template,
            ranks,
            LoadOptions(
                strictness=_strictness(cfg) if sharded else cfg.dist_ckpt_strictness,
                parallelization_group=sharing_group(cfg.fully_parallel_load, live.groups.dp_cp),
                # Ranks that take over one another's random states do not cover the saved object one to one.
                validate_access=not plan.reseed_rng,
                io_backend=cfg.io_backend,
            ),
        )
    phases.end("reading")

    ranks.run(
        "applying the checkpoint",
        lambda: _apply(loaded.state_dict, plan, live, strict=strict and not loaded.dropped),
    )
    if plan.data_iterator.restore:
        live.state.dataloader_state = iterator_state
    is_other_precision = saved.precision is None or saved.precision != wanted.precision
    if live.optimizer is not None and plan.optimizer.restore and is_other_precision:
        ranks.run("sharing the main parameters", lambda: share_main_params(live.optimizer))
    if sharded:
        ranks.run("gathering the parameters", lambda: fsdp_dtensor.gather_weights(live.model))

    def apply_rest() -> None:
        _apply_train_state(stored, saved, plan, live)
        if restores_rerun:
            set_rerun_state(loaded.state_dict[RERUN])
        # Last: nothing after this may draw a random number.
        if plan.reseed_rng:
            seed, random_init = live.state.cfg.rng.seed, wanted.data_parallel_random_init
            reseed(seed, saved.iteration, random_init, pg_collection=live.groups)
        if request is not None:
            states = loaded.state_dict[RNG]
            set_rng_state(fsdp_dtensor.rng_states(states, request) if sharded else states, request)

    ranks.run("applying the checkpoint's counters and random states", apply_rest)
    if ranks.is_first:
        logger.info("parts of %s:\n%s", stored.source.path, plan.table())


def _progress(cfg: Any) -> Progress:
    """Shows what is read, unless the logger section asks for less than that."""
    return Progress(quiet=not cfg.show_progress or cfg.log_level not in ("DEBUG", "INFO"), say=logger.info)


def _template(saved: Saved, plan: LoadPlan, live: LiveState) -> dict[str, Any]:
    cfg = live.state.cfg
    if plan.optimizer.restore:
        require_same_optimizer_order(saved.content_metadata, model_glu_sizes(live.model))
    metadata = {**(saved.content_metadata or {}), "dp_cp_group": live.groups.dp_cp}
    template = generate_state_dict(
        cfg.checkpoint,
        live.model,
        live.optimizer if plan.optimizer.restore else None,
        live.scheduler if plan.scheduler.restore else None,
        None,
        optim_sd_kwargs={"is_loading": True, "metadata": metadata, "saved_form": saved.optimizer_form},
        model_sd_kwargs={"metadata": metadata},
    )
    if cfg.checkpoint.load_main_params_from_ckpt:
        with_full_precision(template, len(live.model))
    if live.state.peft is not None:
        template = apply_peft_adapter_filter_to_state_dict(template, live.state.peft)
    return template


def _iterator_state(stored: StoredCheckpoint, plan: LoadPlan, live: LiveState) -> DataloaderState | None:
    if not plan.data_iterator.restore:
        return None
    data_parallel = live.groups.dp
    return stored.data_iterator_state(data_parallel.rank(), data_parallel.size())


def _strictness(cfg: Any) -> str:
    """`strict_fsdp_dtensor_load` in the terms of `dist_ckpt_strictness`."""
    return "raise_unexpected" if cfg.strict_fsdp_dtensor_load else "log_unexpected"


def _apply(loaded: dict[str, Any], plan: LoadPlan, live: LiveState, *, strict: bool) -> None:
    if "checkpoint_version" in loaded:
        set_checkpoint_version(loaded["checkpoint_version"])
    if fsdp_dtensor.is_megatron_fsdp(live.model[0]):
        _apply_sharded(loaded, plan, live)
        return
    if live.state.peft is None:
        load_model_state_dict(live.model, loaded, strict)
    else:
        load_adapters(live.model, loaded, live.state.peft, strict)
    if live.optimizer is not None:
        if plan.optimizer.restore:
            load_optimizer(live.optimizer, loaded)
        elif live.state.cfg.checkpoint.load_main_params_from_ckpt:
            load_main_params(live.optimizer, live.model, loaded)
        else:
            # Main parameters were copied from the model's before the load; copy them again.
            live.optimizer.reload_model_params()
    if live.scheduler is not None and plan.scheduler.restore:
        load_scheduler(live.scheduler, loaded)


def _apply_sharded(loaded: dict[str, Any], plan: LoadPlan, live: LiveState) -> None:
    """Under Megatron FSDP the tensors have been read into place; what is left follows from them, or is small."""
    fsdp_dtensor.install_weights(live.model)
    if live.optimizer is not None and plan.optimizer.restore:
        fsdp_dtensor.load_groups(live.optimizer, loaded[fsdp_dtensor.OPTIMIZER][fsdp_dtensor.GROUPS])
    if live.scheduler is not None and plan.scheduler.restore:
        load_scheduler(live.scheduler, loaded)


def _apply_train_state(stored: StoredCheckpoint, saved: Saved, plan: LoadPlan, live: LiveState) -> None:
    train_state = type(live.state.train_state)()
    if plan.train_state.restore:
        if saved.has_train_state:
            train_state.load_state_dict(stored.train_state())
        else:
            train_state.load_state_dict(saved.counters)
        if saved.release:
            train_state.step = 0
    live.state.train_state = train_state
