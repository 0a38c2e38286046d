"""Checkpoints that Megatron-LM wrote: what its `args` say, in the terms of a run configuration and a train state.

Megatron-LM saves neither `run_config.yaml` nor `train_state.pt`. Its command line, parsed into an
`argparse.Namespace`, is in `common.pt` under `args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge.training.checkpointing.errors import CheckpointDamagedError

if TYPE_CHECKING:
    from bridge.training.state import TrainState

ARGS = "args"
FLOPS = "num_floating_point_operations_so_far"

_MODEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
_OPTIONAL_MODEL_SETTINGS = ("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size")


def extract_megatron_lm_args(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that loading needs, from Megatron-LM's arguments.

    Args:
        state_dict: the common part of the checkpoint.

    Returns:
        Sections `model`, `checkpoint`, `ddp`, `rng` of a run configuration, as `run_config.yaml` would hold them;
        in `model` also `data_parallel_size` where the arguments tell it.

    Raises:
        CheckpointDamagedError: there are no arguments (a RuntimeError).
    """
    args = state_dict.get(ARGS)
    if args is None:
        raise CheckpointDamagedError(f"Legacy checkpoint missing '{ARGS}' field in state_dict")
    model: dict[str, Any] = {name: getattr(args, name, None) or 1 for name in _MODEL_SIZES}
    optional = (*_OPTIONAL_MODEL_SETTINGS, "data_parallel_size")
    model.update({name: getattr(args, name) for name in optional if getattr(args, name, None)})
    model["precision"] = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "fp32")
    return {
        "model": model,
        "checkpoint": {
            "save_optim": not getattr(args, "no_save_optim", None),
            "save_rng": not getattr(args, "no_save_rng", None),
            "fully_parallel_save": bool(getattr(args, "ckpt_fully_parallel_save", False)),
        },
        "ddp": {"use_distributed_optimizer": bool(getattr(args, "use_distributed_optimizer", False))},
        "rng": {"data_parallel_random_init": bool(getattr(args, "data_parallel_random_init", False))},
    }


def counters_of(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """How far training was, by the field names of TrainState: from the common part of a checkpoint.

    Without arguments only the iteration is known, and the sample counts are 0.
    """
    args = state_dict.get(ARGS)

    def count(name: str) -> int:
        return int(getattr(args, name, None) or 0)

    return {
        "step": int(state_dict.get("iteration") or 0),
        "consumed_train_samples": count("consumed_train_samples"),
        "skipped_train_samples": count("skipped_train_samples"),
        "consumed_valid_samples": count("consumed_valid_samples"),
        "floating_point_operations_so_far": int(state_dict.get(FLOPS) or 0),
    }


def get_train_state(state_dict: Mapping[str, Any]) -> TrainState:
    """The train state that Megatron-LM's checkpoint describes; its `do_*` flags are False.

    Args:
        state_dict: the common part of the checkpoint: `iteration`, the FLOPs, and the samples in `args`.
    """
    from bridge.training.state import TrainState  # imports this package

    return TrainState(**counters_of(state_dict), do_train=False, do_valid=False, do_test=False)


def content_metadata_of(common: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the optimizer's state is sharded; None where the checkpoint does not tell.

    Megatron-LM did not always save `content_metadata`. Without it, an optimizer that was not distributed needs
    none.
    """
    metadata: dict[str, Any] | None = common.get("content_metadata")
    if metadata is None and ARGS in common and not getattr(common[ARGS], "use_distributed_optimizer", False):
        return {}
    return metadata
