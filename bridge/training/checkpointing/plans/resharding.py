"""Under which layout and optimizer a saved optimizer state can be loaded. Pure functions of plain values.

Three kinds of optimizer keep Adam's moments and the fp32 main parameters under three names, but all of them
in the shape of the model's tensors, unless a distributed optimizer saves its flat buffers as they are
(`dp_reshardable`). State in the model's shape follows any change of layout. Flat buffers follow a change of
the data-parallel size only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.parallel import Layout

if TYPE_CHECKING:
    from bridge.training.checkpointing.plans.load_plan import Saved, Wanted

SHARDING_TYPE = "distrib_optim_sharding_type"
CONVERTED_FROM = "converted_from"
"""Of content metadata: the format of Megatron FSDP, in a checkpoint that was converted from it into another."""
MEMORY_EFFICIENT = "distrib_optim_fully_reshardable_mem_efficient"
DP_RESHARDABLE = "dp_reshardable"
FULLY_RESHARDABLE = "fully_reshardable"
FSDP_DTENSOR = "fsdp_dtensor"
"""DTensors of Megatron FSDP, in the shape of the model's tensors."""

_BUFFER_TYPES = (DP_RESHARDABLE, "dp_zero_gather_scatter")
"""Copies of the distributed optimizer's flat buffers, which follow from the model-parallel sizes."""

_MODEL_ONLY = "set checkpoint.load_optim: false to take only the model"
_SAVE_RESHARDABLE = (
    "start once more as it was saved, with checkpoint.dist_ckpt_optim_fully_reshardable: true, save, and load that"
)


@dataclass(frozen=True)
class OptimizerForm:
    """How an optimizer arranges its state."""

    distributed: bool
    """Whether data-parallel ranks share the state (`ddp.use_distributed_optimizer`)."""
    main_params: bool
    """Whether fp32 main parameters exist apart from the model's. Saved distributed state always has them."""
    parts: int = 1
    """Chained optimizers: two where experts are distributed over ranks, else one."""


def saved_form(section: Any) -> OptimizerForm | None:
    """The form of a checkpoint's optimizer, from the `optimizer` section of its `common.pt`.

    Returns:
        The form, or None if there is no such section or it has another structure than megatron-core's.
    """
    parts = parts_of(section)
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        return None
    if all("param_state_sharding_type" in part for part in parts):
        return OptimizerForm(distributed=True, main_params=True, parts=len(parts))
    if all("param_groups" in part for part in parts):
        return OptimizerForm(distributed=False, main_params=False, parts=len(parts))
    if all("param_groups" in (part.get("optimizer") or {}) for part in parts):
        return OptimizerForm(distributed=False, main_params=True, parts=len(parts))
    return None


def parts_of(section: Any) -> list[Any]:
    """The chained optimizers' sections: megatron-core numbers several and leaves a single one bare."""
    if isinstance(section, Mapping) and section and all(isinstance(key, int) for key in section):
        return [section[key] for key in sorted(section)]
    return [section] if isinstance(section, Mapping) and section else []


def is_adapted(content_metadata: Mapping[str, Any], saved: OptimizerForm | None, wanted: OptimizerForm | None) -> bool:
    """Whether loading has to translate between forms: the optimizer's own template would ask for other names."""
    if saved is None or wanted is None or content_metadata.get(SHARDING_TYPE) in _BUFFER_TYPES:
        return False
    same_names = saved.distributed == wanted.distributed and (
        saved.distributed or saved.main_params == wanted.main_params
    )
    return not same_names or saved.parts != wanted.parts


def require_same_wrapper(saved: Saved, wanted: Wanted) -> None:
    """Refuse a checkpoint of a model under Megatron FSDP for one that is not, and the other way round.

    Raises:
        CheckpointMismatchError: the message names the setting that decides.
    """
    content = saved.content_metadata or {}
    if CONVERTED_FROM in content:
        raise CheckpointMismatchError(
            f"the checkpoint was converted from the format {content[CONVERTED_FROM]} into another, for other programs, "
            "and no run can load it so; convert it back: bridge-ckpt convert SRC DST --format fsdp_dtensor"
        )
    was_sharded = content.get(SHARDING_TYPE) == FSDP_DTENSOR
    if was_sharded and not wanted.megatron_fsdp:
        raise CheckpointMismatchError(
            "the checkpoint is in the format fsdp_dtensor, which only a model under Megatron FSDP can load, and this "
            "run sets ddp.use_megatron_fsdp: false; set it to true, and checkpoint.ckpt_format: fsdp_dtensor"
        )
    if wanted.megatron_fsdp and not was_sharded:
        raise CheckpointMismatchError(
            "the checkpoint is not in the format fsdp_dtensor, the only one that a model under Megatron FSDP can load, "
            "and this run sets ddp.use_megatron_fsdp: true; set it to false, and checkpoint.ckpt_format as it was"
        )


def require_loadable(saved: Saved, wanted: Wanted) -> None:
    """Refuse optimizer state that this run cannot load, before anything of it is read.

    Raises:
        CheckpointMismatchError: the message names the setting with which it could have been loaded.
    """
    if saved.content_metadata is None:
        raise CheckpointMismatchError(
            "the checkpoint does not say how its optimizer state is sharded (it was written by megatron-core 0.14 "
            f"or older), and such state can no longer be loaded; {_MODEL_ONLY}"
        )
    sharding = saved.content_metadata.get(SHARDING_TYPE)
    if sharding == FSDP_DTENSOR:
        _require_same_names(saved, wanted)
    elif sharding in _BUFFER_TYPES:
        _require_same_buffers(saved, wanted, str(sharding))
    elif sharding not in (None, FULLY_RESHARDABLE):
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer state is {sharding}, which this version of megatron-core can no longer "
            f"read; {_MODEL_ONLY}"
        )
    else:
        _require_known_form(saved, wanted, was_distributed=sharding is not None)


def _require_same_names(saved: Saved, wanted: Wanted) -> None:
    """Megatron FSDP names the optimizer's state by the wrappers around the model, one of which is for bf16."""
    if saved.precision is not None and wanted.precision is not None and saved.precision != wanted.precision:
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer state is {FSDP_DTENSOR}: it can only be loaded with the model.precision that "
            f"it was saved with, {saved.precision}, and this run sets {wanted.precision}; keep it, or {_MODEL_ONLY}"
        )


def _require_same_buffers(saved: Saved, wanted: Wanted, sharding: str) -> None:
    if not wanted.uses_distributed_optimizer:
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer state is {sharding}, which only a distributed optimizer can load, and this "
            "run sets ddp.use_distributed_optimizer: false; set it to true, or "
            f"{_SAVE_RESHARDABLE}, or {_MODEL_ONLY}"
        )
    # A checkpoint of unknown layout is taken to fit; megatron-core compares the shapes of the buffers.
    changes = saved.layout_is_known and changed_sizes(saved.layout, wanted.layout, ("data", "context"))
    if changes:
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer state is {sharding}: it can be loaded with another data-parallel "
            f"size but not with other model-parallel sizes, and {changes}; keep the sizes, or "
            f"{_SAVE_RESHARDABLE}, or {_MODEL_ONLY}"
        )
    if saved.precision is not None and wanted.precision is not None and saved.precision != wanted.precision:
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer state is {sharding}: it can only be loaded with the model.precision that it "
            f"was saved with, {saved.precision}, and this run sets {wanted.precision}; keep it, or "
            f"{_SAVE_RESHARDABLE}, or {_MODEL_ONLY}"
        )


def _require_known_form(saved: Saved, wanted: Wanted, *, was_distributed: bool) -> None:
    form, own = saved.optimizer_form, wanted.optimizer_form
    if form is not None and form.distributed and not was_distributed:
        raise CheckpointMismatchError(
            "the checkpoint was saved with a distributed optimizer and does not say how its state is sharded; such "
            f"state cannot be loaded; {_MODEL_ONLY}"
        )
    if form is None or own is None:
        if was_distributed != wanted.uses_distributed_optimizer:
            kind = "a distributed optimizer" if was_distributed else "an optimizer that is not distributed"
            raise CheckpointMismatchError(
                f"the checkpoint was saved with {kind}, in a form that cannot be translated, and this run sets "
                f"ddp.use_distributed_optimizer: {_yaml(wanted.uses_distributed_optimizer)}; set it to "
                f"{_yaml(was_distributed)}, or {_MODEL_ONLY}"
            )
        return
    if own.main_params and not form.main_params:
        raise CheckpointMismatchError(
            "the checkpoint was saved with an optimizer whose main parameters are the model's own, in fp32, and this "
            f"run keeps them apart (model.precision: {wanted.precision}); set model.precision: fp32, or {_MODEL_ONLY}"
        )


def changed_sizes(saved: Layout, wanted: Layout, ignored: tuple[str, ...]) -> str:
    """`the tensor size was 2 and is 1`, for every size that differs; empty if none does."""
    if max(saved.expert, wanted.expert) == 1:
        ignored = (*ignored, "expert_tensor")
    changes = [
        f"the {item.name.replace('_', '-')} size was {getattr(saved, item.name)} and is {getattr(wanted, item.name)}"
        for item in fields(Layout)
        if item.name not in ignored and getattr(saved, item.name) != getattr(wanted, item.name)
    ]
    return ", ".join(changes)


def _yaml(flag: bool) -> str:
    return str(flag).lower()
