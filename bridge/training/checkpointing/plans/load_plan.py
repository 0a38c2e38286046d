"""Which parts of a checkpoint to restore, and why not the others. Pure functions of plain values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from bridge.training.checkpointing.contents.vocabulary import VOCABULARY
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans import resharding
from bridge.training.checkpointing.plans.adapters import Adapters
from bridge.training.checkpointing.plans.random_states import RngLayout, describe_changes, keeps_every_state
from bridge.training.checkpointing.plans.resharding import OptimizerForm


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
    data_parallel_random_init: bool = False
    optimizer_form: OptimizerForm | None = None
    """None where the checkpoint does not tell."""
    precision: str | None = None
    """`model.precision`; None where the checkpoint does not tell."""
    adapters: Adapters | None = None
    """None where the checkpoint holds a whole model."""
    counters: dict[str, int] = field(default_factory=dict)
    """Where there is no train_state.pt, its fields as far as the checkpoint tells them otherwise."""
    has_rerun_state: bool = False
    """Whether it was saved to run a step again."""
    start: int = 0
    """Number of the run's start that saved it; 0 where nobody counts."""
    checkpoint_format: str | None = None
    """As its manifest says it, for the log."""
    total_bytes: int | None = None
    """Of all its files; None where no manifest says it."""

    @property
    def rng(self) -> RngLayout:
        """Who had random states of its own."""
        return RngLayout(self.layout, self.data_parallel_random_init)


@dataclass(frozen=True)
class Wanted:
    """What the run asks for."""

    layout: Layout
    load_optim: bool
    load_rng: bool
    has_optimizer: bool
    uses_distributed_optimizer: bool
    data_parallel_random_init: bool = False
    load_dataloader_state: str = "auto"
    """`auto`, `require` or `ignore`."""
    vocabulary_size: int | None = None
    """Ids before padding; None if unknown."""
    model_only: str = ""
    """Why nothing but the model is wanted; empty where everything is."""
    optimizer_form: OptimizerForm | None = None
    precision: str | None = None
    adapters: Adapters | None = None
    """None where a whole model is loaded."""
    megatron_fsdp: bool = False
    """Whether the model is under Megatron FSDP."""
    reruns: bool = False
    """Whether the rerun state machine is enabled."""

    @property
    def rng(self) -> RngLayout:
        """Who has random states of its own."""
        return RngLayout(self.layout, self.data_parallel_random_init)


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: whether it is restored, and the reason."""

    restore: bool
    reason: str
    partly: bool = False
    """Whether only some of it is restored; `reason` says what."""


@dataclass(frozen=True)
class LoadPlan:
    """What `load_checkpoint` restores."""

    model: Part
    optimizer: Part
    scheduler: Part
    rng: Part
    train_state: Part
    data_iterator: Part
    rerun: Part | None = None
    """None where no step was to be run again."""
    reseed_rng: bool = False
    """Whether random states were asked for and some do not apply, so that those are seeded anew."""

    def table(self) -> str:
        """One line for each part, for the log."""
        lines = []
        for item in fields(self):
            part = getattr(self, item.name)
            if not isinstance(part, Part):
                continue
            verb = "partly" if part.partly else "restored" if part.restore else "fresh"
            lines.append(f"  {item.name.replace('_', ' '):<14} {verb:<9} {part.reason}")
        return "\n".join(lines)


def plan_load(saved: Saved, wanted: Wanted) -> LoadPlan:
    """Decide what to restore.

    Raises:
        CheckpointMismatchError: only one of checkpoint and run is of Megatron FSDP, the vocabulary is of another size,
            the optimizer's state is wanted but cannot be
            resharded to this run's layout, or the data iterator's state is required and was not saved.
    """
    resharding.require_same_wrapper(saved, wanted)
    _require_same_vocabulary(saved, wanted)
    optimizer = _plan_optimizer(saved, wanted)
    rng = _plan_rng(saved, wanted)
    return LoadPlan(
        model=Part(True, "always" if wanted.adapters is None else "its adapters; the rest is the pretrained model"),
        optimizer=optimizer,
        scheduler=Part(optimizer.restore, "with the optimizer"),
        rng=rng,
        train_state=_plan_train_state(saved, wanted),
        data_iterator=_plan_data_iterator(saved, wanted),
        rerun=_plan_rerun(saved, wanted) if saved.has_rerun_state else None,
        reseed_rng=_rng_is_asked_for(saved, wanted) and not keeps_every_state(saved.rng, wanted.rng),
    )


def _require_same_vocabulary(saved: Saved, wanted: Wanted) -> None:
    size = (saved.content_metadata or {}).get(VOCABULARY)
    if size is not None and wanted.vocabulary_size is not None and size != wanted.vocabulary_size:
        raise CheckpointMismatchError(
            f"the checkpoint's vocabulary has {size} ids and this run's has {wanted.vocabulary_size}; use the "
            "tokenizer that is in the checkpoint, or set model.vocab_size as it was"
        )


def _plan_optimizer(saved: Saved, wanted: Wanted) -> Part:
    if not wanted.has_optimizer:
        return Part(False, "this run has no optimizer")
    if wanted.model_only:
        return Part(False, wanted.model_only)
    if not wanted.load_optim:
        return Part(False, "checkpoint.load_optim is false")
    if saved.release:
        return Part(False, "it is a release checkpoint")
    if not saved.has_optimizer:
        return Part(False, "it was saved with checkpoint.save_optim: false")
    resharding.require_loadable(saved, wanted)
    return Part(True, "saved and wanted")


def _plan_train_state(saved: Saved, wanted: Wanted) -> Part:
    if wanted.model_only:
        return Part(False, wanted.model_only)
    if saved.release:
        return Part(True, "a release checkpoint: counters without the iteration, which starts at 0", partly=True)
    return Part(True, "saved and wanted")


def _rng_is_asked_for(saved: Saved, wanted: Wanted) -> bool:
    return wanted.load_rng and saved.has_rng and saved.layout_is_known and not (wanted.model_only or saved.release)


def _plan_rng(saved: Saved, wanted: Wanted) -> Part:
    if wanted.model_only:
        return Part(False, wanted.model_only)
    if not wanted.load_rng:
        return Part(False, "checkpoint.load_rng is false")
    if saved.release:
        return Part(False, "it is a release checkpoint")
    if not saved.has_rng:
        return Part(False, "it was saved with checkpoint.save_rng: false")
    if not saved.layout_is_known:
        return Part(False, "the checkpoint does not say under which parallel sizes it was saved")
    if keeps_every_state(saved.rng, wanted.rng):
        return Part(True, "saved and wanted")
    restores_some = saved.layout.pipeline == wanted.layout.pipeline
    return Part(restores_some, describe_changes(saved.rng, wanted.rng), partly=restores_some)


def _plan_rerun(saved: Saved, wanted: Wanted) -> Part:
    if wanted.model_only:
        return Part(False, wanted.model_only)
    if saved.release:
        return Part(False, "it is a release checkpoint")
    if not wanted.reruns:
        return Part(False, "rerun_state_machine.rerun_mode is disabled")
    if not saved.layout_is_known:
        return Part(False, "the checkpoint does not say under which parallel sizes it was saved")
    changes = resharding.changed_sizes(saved.layout, wanted.layout, ())
    if changes:
        return Part(False, f"every rank has a state of its own, and {changes}")
    return Part(True, "saved and wanted")


def _plan_data_iterator(saved: Saved, wanted: Wanted) -> Part:
    if wanted.model_only:
        return Part(False, wanted.model_only)
    if wanted.load_dataloader_state == "ignore":
        return Part(False, "checkpoint.load_dataloader_state is ignore; the position follows from the consumed samples")
    if saved.data_iterator_ranks == 0:
        if wanted.load_dataloader_state == "require":
            raise CheckpointMismatchError(
                "checkpoint.load_dataloader_state is require, and the checkpoint holds no state of a data iterator; "
                "set it to auto to go on after the samples that the train state counts"
            )
        return Part(False, "not saved; the position follows from the consumed samples")
    if saved.data_iterator_ranks != wanted.layout.data:
        return Part(
            True,
            f"saved by {saved.data_iterator_ranks} data-parallel ranks and divided anew among {wanted.layout.data}",
        )
    return Part(True, "saved and wanted")
