"""What a save captures, in steps that are each local or collective, never both.

A rank that fails in a local step has left no other waiting, because all ranks agree on its success before the
next step begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.dataloader import dataloader_sidecar
from bridge.training.checkpointing.contents.fsdp_dtensor import preprocess_on_all_ranks
from bridge.training.checkpointing.contents.glu import CONTENT_KEY, model_glu_sizes
from bridge.training.checkpointing.contents.model import generate_model_state_dict
from bridge.training.checkpointing.contents.optimizer import (
    OPTIMIZER,
    allocate_optimizer_state,
    build_sharded_state_dict_metadata,
)
from bridge.training.checkpointing.contents.peft import apply_peft_adapter_filter_to_state_dict
from bridge.training.checkpointing.contents.rerun import get_rerun_state
from bridge.training.checkpointing.contents.rng import (
    capture_rng_state,
    gather_rng_states,
    has_states_of_replicas,
    keyed_rng_state,
    sharded_rng_state,
)
from bridge.training.checkpointing.contents.run_config import run_config_sidecar
from bridge.training.checkpointing.contents.state_dict import RNG, joined, optimizer_part
from bridge.training.checkpointing.contents.tokenizer import tokenizer_sidecars
from bridge.training.checkpointing.contents.train_state import train_state_sidecar
from bridge.training.checkpointing.contents.vocabulary import VOCABULARY, vocabulary_size
from bridge.training.checkpointing.plans.adapters import adapters_of_run
from bridge.training.checkpointing.plans.resharding import FSDP_DTENSOR
from bridge.training.checkpointing.sidecar import Sidecar
from bridge.training.checkpointing.transaction import Contents


@dataclass(frozen=True)
class LiveObjects:
    """The objects of a run that a save captures."""

    state: Any
    model: list[Any]
    optimizer: Any | None
    scheduler: Any | None
    flops: int
    """Floating-point operations spent so far."""
    train_iterator: Any | None
    groups: Any
    """Process groups."""
    module_name: str | None


def collect(live: LiveObjects, prebuilt_state_dict: dict[str, Any] | None, ranks: Ranks) -> Contents:
    """Capture everything that a save writes. Collective.

    Args:
        live: what to capture.
        prebuilt_state_dict: used instead of generating the state dict.
        ranks: all ranks.

    Raises:
        CheckpointError: a part could not be captured on some rank. Every rank raises.
    """
    metadata, sidecars = ranks.run("collecting the state", lambda: (_content_metadata(live), _sidecars(live)))
    if prebuilt_state_dict is not None:
        state_dict = dict(prebuilt_state_dict)
    else:
        state_dict = _generate(live, metadata, ranks)
    return ranks.run("completing the state", lambda: _complete(live, state_dict, metadata, sidecars))


def _content_metadata(live: LiveObjects) -> dict[str, Any]:
    cfg = live.state.cfg
    metadata = build_sharded_state_dict_metadata(cfg.ddp.use_distributed_optimizer, cfg.checkpoint)
    sizes = model_glu_sizes(live.model, cfg)
    if any(sizes):
        metadata[CONTENT_KEY] = list(sizes)
    vocabulary = vocabulary_size(cfg, live.state.tokenizer)
    if vocabulary is not None:
        metadata[VOCABULARY] = vocabulary
    return metadata


def _sidecars(live: LiveObjects) -> list[Sidecar]:
    """The files beside the sharded payload that do not depend on it; users' code takes part in them."""
    cfg = live.state.cfg
    data = dataloader_sidecar(live.train_iterator, live.groups)
    sidecars = [] if data is None else [data]
    if Ranks.current().is_first:
        sidecars.append(train_state_sidecar(live.state.train_state, live.flops))
        if cfg.checkpoint.save_tokenizer_assets:
            sidecars += tokenizer_sidecars(live.state.tokenizer, cfg.tokenizer)
    return sidecars


def _generate(live: LiveObjects, metadata: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """`generate_state_dict`, with agreement between its parts."""
    cfg = live.state.cfg
    ckpt_format = cfg.checkpoint.ckpt_format
    building = {"metadata": {**metadata, "dp_cp_group": live.groups.dp_cp}}

    def capture() -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
        if cfg.checkpoint.save_optim:
            allocate_optimizer_state(live.optimizer)
        random_state = capture_rng_state(ckpt_format) if cfg.checkpoint.save_rng else None
        rerun_state = get_rerun_state(ckpt_format)
        return generate_model_state_dict(live.model, building, ckpt_format), random_state, rerun_state

    model, random_state, rerun_state = ranks.run("collecting the model's state", capture)
    rng: Any = None
    if random_state is not None:
        random_init = cfg.rng.data_parallel_random_init or has_states_of_replicas(ckpt_format, live.groups)
        states = ranks.run(
            "gathering the random states",
            lambda: gather_rng_states(random_state, random_init, pg_collection=live.groups),
        )
        if ckpt_format == FSDP_DTENSOR:
            rng = keyed_rng_state(states, pg_collection=live.groups)
        else:
            rng = sharded_rng_state(states, pg_collection=live.groups, module_name=live.module_name)
    optimizer = ranks.run(
        "collecting the optimizer's state",
        lambda: optimizer_part(cfg.checkpoint, live.optimizer, live.scheduler, model, building),
    )
    state_dict = joined(model, optimizer, rng, live.state.train_state.step, rerun_state)
    if ckpt_format == FSDP_DTENSOR:
        return preprocess_on_all_ranks(cfg, state_dict, live.model[0], ranks)
    return state_dict


def _complete(
    live: LiveObjects, state_dict: dict[str, Any], metadata: dict[str, Any], sidecars: list[Sidecar]
) -> Contents:
    """Leave out what is not saved of an adapted model, and describe what is."""
    state = live.state
    if state.peft is not None:
        state_dict = apply_peft_adapter_filter_to_state_dict(state_dict, state.peft)
        metadata = metadata | adapters_of_run(state.cfg.peft, state.base_checkpoint).mark()
    if Ranks.current().is_first:
        has_optimizer, has_rng = OPTIMIZER in state_dict, RNG in state_dict
        sidecars = [*sidecars, run_config_sidecar(state.cfg, has_optimizer=has_optimizer, has_rng=has_rng)]
    return Contents(state_dict, metadata, tuple(sidecars))
