"""What a save captures, in steps that are each local or collective, never both.

Local steps that follow one another end in one agreement, so that a rank that fails in one of them leaves no other
waiting in a collective: the caller carries out what is first, and then, in an agreement of its own, what is last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
    is_described_alone,
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
from bridge.training.checkpointing.failed_steps import attempted, step
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


@dataclass(frozen=True)
class Captured:
    """What one rank has captured by itself."""

    metadata: dict[str, Any]
    """The checkpoint's content metadata."""
    sidecars: list[Sidecar]
    prebuilt: dict[str, Any] | None
    """The state dict, if it is not to be generated."""
    building: dict[str, Any]
    """How the state dict is generated, as for `generate_state_dict`."""
    model: dict[str, Any]
    """The model's sections."""
    random_state: dict[str, Any] | None
    rerun_state: dict[str, Any] | None


def collect(live: LiveObjects, prebuilt_state_dict: dict[str, Any] | None, ranks: Ranks) -> Contents:
    """Capture everything that a save writes. Collective.

    Args:
        live: what to capture.
        prebuilt_state_dict: used instead of generating the state dict.
        ranks: all ranks.

    Raises:
        CheckpointError: a part could not be captured on some rank. Every rank raises.
    """
    captured = ranks.run("collecting the state", lambda: capture(live, prebuilt_state_dict))
    return ranks.run("completing the state", exchange(live, captured, ranks))


def capture(live: LiveObjects, prebuilt_state_dict: dict[str, Any] | None) -> Captured:
    """The first step: what this rank knows by itself. Local; `exchange` follows when all ranks have done it."""
    with step("collecting the state"):
        metadata, sidecars = _content_metadata(live), _sidecars(live)
    cfg = live.state.cfg.checkpoint
    building = {"metadata": {**metadata, "dp_cp_group": live.groups.dp_cp}}
    if live.state.peft is not None:
        metadata = metadata | adapters_of_run(live.state.cfg.peft, live.state.base_checkpoint).mark()
    if prebuilt_state_dict is not None:
        return Captured(metadata, sidecars, dict(prebuilt_state_dict), building, {}, None, None)
    with step("collecting the model's state"):
        if cfg.save_optim:
            allocate_optimizer_state(live.optimizer)
        random_state = capture_rng_state(cfg.ckpt_format) if cfg.save_rng else None
        rerun_state = get_rerun_state(cfg.ckpt_format)
        model = generate_model_state_dict(live.model, building, cfg.ckpt_format)
    return Captured(metadata, sidecars, None, building, model, random_state, rerun_state)


def exchange(live: LiveObjects, captured: Captured, ranks: Ranks) -> Callable[[], Contents]:
    """The second step: what ranks must tell one another. Collective.

    Returns:
        The third step, which is local and belongs into the next agreement: it returns what is saved, or raises what
        has failed on this rank since the one before. It may be called again.

    Raises:
        CheckpointError: ranks have agreed on a failure already.
    """
    prebuilt = captured.prebuilt
    state_dict = _generate(live, captured, ranks) if prebuilt is None else lambda: prebuilt

    @cache
    def complete() -> Contents:
        with step("completing the state"):
            return _complete(live, state_dict(), captured.metadata, captured.sidecars)

    return complete


def collects_alone(live: LiveObjects) -> bool:
    """Whether there is nothing to tell in `exchange` to save these objects. Local, and not the same on every rank."""
    cfg = live.state.cfg.checkpoint
    if cfg.ckpt_format == FSDP_DTENSOR or (cfg.save_rng and _are_apart(live)):
        return False
    fully = cfg.dist_ckpt_optim_fully_reshardable
    return not cfg.save_optim or is_described_alone(live.optimizer, fully_reshardable=fully)


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


def _generate(live: LiveObjects, captured: Captured, ranks: Ranks) -> Callable[[], dict[str, Any]]:
    """`generate_state_dict`, from what was captured. Collective; what is returned is local, as that of `exchange`."""
    cfg = live.state.cfg.checkpoint
    states = _random_states(live, captured, ranks)
    optimizer = attempted(
        "collecting the optimizer's state",
        lambda: optimizer_part(cfg, live.optimizer, live.scheduler, captured.model, captured.building),
    )

    def join() -> dict[str, Any]:
        sections, rng = optimizer(), None
        if states is not None and cfg.ckpt_format == FSDP_DTENSOR:
            rng = keyed_rng_state(states, pg_collection=live.groups)
        elif states is not None:
            rng = sharded_rng_state(states, pg_collection=live.groups, module_name=live.module_name)
        return joined(captured.model, sections, rng, live.state.train_state.step, captured.rerun_state)

    if cfg.ckpt_format == FSDP_DTENSOR:
        state_dict = preprocess_on_all_ranks(live.state.cfg, ranks.run("joining the state", join), live.model[0], ranks)
        return lambda: state_dict
    return join


def _random_states(live: LiveObjects, captured: Captured, ranks: Ranks) -> list[dict[str, Any]] | None:
    """The random states that this rank saves: those of its replicas too, if they have states of their own."""
    own = captured.random_state
    if own is None:
        return None
    apart = _are_apart(live)
    if not apart:
        return [own]
    return ranks.run("gathering the random states", lambda: gather_rng_states(own, apart, pg_collection=live.groups))


def _are_apart(live: LiveObjects) -> bool:
    """Whether replicas have random states of their own."""
    cfg = live.state.cfg
    return cfg.rng.data_parallel_random_init or has_states_of_replicas(cfg.checkpoint.ckpt_format, live.groups)


def _complete(
    live: LiveObjects, state_dict: dict[str, Any], metadata: dict[str, Any], sidecars: list[Sidecar]
) -> Contents:
    """Leave out what is not saved of an adapted model, and describe what is."""
    state = live.state
    if state.peft is not None:
        state_dict = apply_peft_adapter_filter_to_state_dict(state_dict, state.peft)
    if Ranks.current().is_first:
        has_optimizer, has_rng = OPTIMIZER in state_dict, RNG in state_dict
        sidecars = [*sidecars, run_config_sidecar(state.cfg, has_optimizer=has_optimizer, has_rng=has_rng)]
    return Contents(state_dict, metadata, tuple(sidecars))
