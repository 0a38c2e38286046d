"""Which parts of a checkpoint to restore, and why not the others. Pure functions of plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.parallel import Layout

_DP_RESHARDABLE = "dp_reshardable"
_SHARDING_TYPE = "distrib_optim_sharding_type"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says about itself."""

    iteration: int
    release: bool
    layout: Layout
    layout_is_known: bool
    """False where neither manifest nor configuration was saved; then only the model's shards can be trusted."""
    content_metadata: dict[str, Any] | None
    has_optimizer: bool
    has_rng: bool
    has_train_state: bool
    data_iterator_ranks: int
    """Data-parallel ranks whose data iterator state was saved."""


@dataclass(frozen=True)
class Wanted:
    """What the run asks for."""

    layout: Layout
    load_optim: bool
    load_rng: bool
    has_optimizer: bool
    uses_distributed_optimizer: bool
    data_parallel_random_init: bool = False


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: whether it is restored, and the reason."""

    restore: bool
    reason: str


@dataclass(frozen=True)
class LoadPlan:
    """What `load_checkpoint` restores."""

    model: Part
    optimizer: Part
    scheduler: Part
    rng: Part
    train_state: Part
    data_iterator: Part

    def table(self) -> str:
        """One line for each part, for the log."""
        lines = []
        for item in fields(self):
            part: Part = getattr(self, item.name)
            verb = "restored" if part.restore else "fresh"
            lines.append(f"  {item.name.replace('_', ' '):<14} {verb:<9} {part.reason}")
        return "\n".join(lines)


def plan_load(saved: Saved, wanted: Wanted) -> LoadPlan:
    """Decide what to restore.

    Raises:
        CheckpointMismatchError: the optimizer's state is wanted but cannot be resharded to this run's layout.
    """
    optimizer = _plan_optimizer(saved, wanted)
    return LoadPlan(
        model=Part(True, "always"),
        optimizer=optimizer,
        scheduler=Part(optimizer.restore, "with the optimizer"),
        rng=_plan_rng(saved, wanted),
        train_state=Part(
            saved.has_train_state and not saved.release,
            "it is a release checkpoint"
            if saved.release
            else "train_state.pt"
            if saved.has_train_state
            else "not saved",
        ),
        data_iterator=_plan_data_iterator(saved, wanted),
    )


def _plan_optimizer(saved: Saved, wanted: Wanted) -> Part:
    if not wanted.has_optimizer:
        return Part(False, "this run has no optimizer")
    if not wanted.load_optim:
        return Part(False, "checkpoint.load_optim is false")
    if saved.release:
        return Part(False, "it is a release checkpoint")
    if not saved.has_optimizer:
        return Part(False, "it was saved with checkpoint.save_optim: false")
    _require_loadable_optimizer(saved, wanted)
    return Part(True, "saved and wanted")


def _require_loadable_optimizer(saved: Saved, wanted: Wanted) -> None:
    remedy = "set checkpoint.load_optim: false to take only the model"
    if saved.content_metadata is None:
        raise CheckpointMismatchError(
            "the checkpoint does not say how its optimizer state is sharded (it was written by megatron-core 0.14 "
            f"or older), and such state can no longer be loaded; {remedy}"
        )
    sharding = saved.content_metadata.get(_SHARDING_TYPE)
    was_distributed = sharding is not None
    if was_distributed != wanted.uses_distributed_optimizer:
        kind = "a distributed optimizer" if was_distributed else "an optimizer that is not distributed"
        raise CheckpointMismatchError(
            f"the checkpoint was saved with {kind} and this run sets ddp.use_distributed_optimizer: "
            f"{_yaml(wanted.uses_distributed_optimizer)}; set it to {_yaml(was_distributed)}, or {remedy}"
        )
    if sharding == _DP_RESHARDABLE:
        changed = _changed_sizes(saved.layout, wanted.layout, ("data", "context"))
        if changed:
            raise CheckpointMismatchError(
                f"the checkpoint's optimizer state is {_DP_RESHARDABLE}: it can be loaded with another data-parallel "
                f"size but not with other model-parallel sizes, and {changed}; keep the sizes, or {remedy}"
            )


def _plan_rng(saved: Saved, wanted: Wanted) -> Part:
    if not wanted.load_rng:
        return Part(False, "checkpoint.load_rng is false")
    if saved.release:
        return Part(False, "it is a release checkpoint")
    if not saved.has_rng:
        return Part(False, "it was saved with checkpoint.save_rng: false")
    if not saved.layout_is_known:
        return Part(False, "the checkpoint does not say under which parallel sizes it was saved")
    # With expert parallelism or their own initialisation, data-parallel ranks have states of their own.
    per_data_rank = wanted.data_parallel_random_init or max(saved.layout.expert, wanted.layout.expert) > 1
    ignored = (
        ("virtual_pipeline", "expert_tensor")
        if per_data_rank
        else (
            "virtual_pipeline",
            "expert_tensor",
            "data",
            "context",
            "expert",
        )
    )
    changed = _changed_sizes(saved.layout, wanted.layout, ignored)
    if changed:
        return Part(False, f"{changed}; seeded from rng.seed instead")
    return Part(True, "saved and wanted")


def _plan_data_iterator(saved: Saved, wanted: Wanted) -> Part:
    if saved.data_iterator_ranks == 0:
        return Part(False, "not saved; the position follows from the consumed samples")
    if saved.data_iterator_ranks != wanted.layout.data:
        return Part(
            False,
            f"saved by {saved.data_iterator_ranks} data-parallel ranks, now there are {wanted.layout.data}; "
            "the position follows from the consumed samples",
        )
    return Part(True, "saved and wanted")


def _yaml(flag: bool) -> str:
    return str(flag).lower()


def _changed_sizes(saved: Layout, wanted: Layout, ignored: tuple[str, ...]) -> str:
    """`the tensor size was 2 and is 1`, for every size that differs; empty if none does."""
    if max(saved.expert, wanted.expert) == 1:
        ignored = (*ignored, "expert_tensor")
    changes = [
        f"the {item.name.replace('_', '-')} size was {getattr(saved, item.name)} and is {getattr(wanted, item.name)}"
        for item in fields(Layout)
        if item.name not in ignored and getattr(saved, item.name) != getattr(wanted, item.name)
    ]
    return ", ".join(changes)
