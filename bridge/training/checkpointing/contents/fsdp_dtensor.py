"""The state of a model under Megatron FSDP: DTensors, in the form that the format `fsdp_dtensor` stores.

The state dict is first made as the model and the optimizer give it (raw), and then preprocessed: the two halves of a
gated layer become tensors of their own, so that they can be resharded; experts get their global numbers; and every
DTensor learns which part of the whole its shard is, because shards of Megatron FSDP are uneven and may be empty. What
is preprocessed shares its memory with the live tensors, so reading into it restores them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
)
from torch.distributed.tensor import DTensor

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.plans.random_states import RngRequest
from bridge.training.checkpointing.plans.resharding import FSDP_DTENSOR, SHARDING_TYPE

MODEL = "model"
OPTIMIZER = "optimizer"
STATE = "state"
GROUPS = "param_to_group_meta"
"""Of the optimizer section: the settings of each parameter's group, by the parameter's name."""


def is_megatron_fsdp(chunk: Any) -> bool:
    """Whether a model chunk is wrapped in Megatron FSDP."""
    return bool(getattr(getattr(chunk, "ddp_config", None), "use_megatron_fsdp", False))


def model_section(chunk: Any) -> dict[str, Any]:
    """The raw state dict of a model under Megatron FSDP. Local.

    The model holds its sharded parameters from now on, until its next forward pass.
    """
    return dict(chunk.state_dict_for_save_checkpoint())


def optimizer_section(optimizer: Any) -> dict[str, Any]:
    """The raw state dict of the optimizer of a model under Megatron FSDP, after that of the model. Local.

    Megatron FSDP gives parameters no gradient where a rank's shard of them is empty, so some optimizers have no state
    for these there. All ranks must have the same keys in the same order: preprocessing talks about each.
    """
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    section = optimizer.sharded_state_dict({}, is_loading=False, metadata={SHARDING_TYPE: FSDP_DTENSOR})
    return {**section, STATE: dict(sorted(section[STATE].items()))}


def preprocess_fsdp_dtensor_state_dict(cfg: Any, raw_state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """The state dict that is stored. Collective, and every rank must have the same keys.

    Args:
        cfg: accepted for compatibility; what matters is in the model's own configuration.
        raw_state_dict: with the section `model`, and perhaps `optimizer`, as Megatron FSDP gives them. Left as it is.
        model: the model chunk.

    Returns:
        A new state dict, whose tensors share their memory with those given.
    """
    del cfg
    state_dict = dict(raw_state_dict)
    section = dict(state_dict[MODEL])
    handle_fp8_extra_state_case(section)
    parameters = _Parameters(model)
    config = parameters.config
    if config.gated_linear_unit and config.activation_func == F.silu:
        section, optimizer = handle_swiglu_in_state_dict(parameters, section, state_dict.get(OPTIMIZER))
        if optimizer is not None:
            state_dict[OPTIMIZER] = optimizer
    if config.num_moe_experts:
        section = handle_experts_in_state_dict(section, config.num_moe_experts)
    state_dict[MODEL] = section
    preprocess_state_dict_for_uneven_dtensor(state_dict)
    return state_dict


def preprocess_on_all_ranks(cfg: Any, raw_state_dict: dict[str, Any], model: Any, ranks: Ranks) -> dict[str, Any]:
    """As `preprocess_fsdp_dtensor_state_dict`, with agreement. Collective.

    Raises:
        CheckpointMismatchError: ranks that share tensors have different ones. Every rank raises.
        CheckpointError: the state cannot be preprocessed.
    """
    own = ranks.run("listing the sharded tensors", lambda: _fingerprints(raw_state_dict))
    everyone = ranks.gather_all("comparing the sharded tensors", own)
    ranks.run("comparing the sharded tensors", lambda: _require_same(own, everyone))
    return ranks.run(
        "preparing the sharded tensors", lambda: preprocess_fsdp_dtensor_state_dict(cfg, raw_state_dict, model)
    )


def template_on_all_ranks(cfg: Any, raw_state_dict: dict[str, Any], model: Any, ranks: Ranks) -> dict[str, Any]:
    """What to load into the tensors of a raw state dict, and instead of its small values. Collective.

    Raises:
        CheckpointError: as `preprocess_on_all_ranks`.
    """
    template = preprocess_on_all_ranks(cfg, raw_state_dict, model, ranks)
    small = {key for key, value in template.items() if key not in (MODEL, OPTIMIZER)}
    template |= dict.fromkeys(small)
    if OPTIMIZER in template:
        template[OPTIMIZER] = {**template[OPTIMIZER], GROUPS: None}
    template.pop("checkpoint_version", None)  # nothing depends on it
    return template


def rng_key(pipeline_rank: int, tensor_rank: int) -> str:
    """The key of a rank's random states inside their section."""
    return f"({pipeline_rank}, {tensor_rank})"


def rng_request(request: RngRequest) -> dict[str, Any]:
    """What to load for a request for random states: all that is stored under the key of one place."""
    return {rng_key(*request.offset[:2]): None}


def rng_states(section: Mapping[str, Any], request: RngRequest) -> list[dict[str, Any]]:
    """The random states that were loaded for `rng_request`, as a list in which the request's entry is the one wanted.

    Args:
        section: by the place's key, `<number of the replica>.<name of the generator>` to its state; the names of the
            tracker's have one more part.
        request: what this rank takes over.

    Raises:
        CheckpointMismatchError: the replica's states are not there.
    """
    # Experts have states of their own on every replica; the request then has the replica as its last offset.
    number = request.offset[2] if len(request.offset) > 2 else request.entry
    prefix = f"{number}."
    states: dict[str, Any] = {"rng_tracker_states": {}}
    for key, value in section[rng_key(*request.offset[:2])].items():
        if not key.startswith(prefix):
            continue
        name, _, tracker = key[len(prefix) :].partition(".")
        if tracker:
            states[name][tracker] = value
        else:
            states[name] = value
    if len(states) == 1:
        raise CheckpointMismatchError(
            f"the checkpoint holds no random states of replica {number}, which this rank needs; "
            "set checkpoint.load_rng: false to start with fresh ones"
        )
    return [{}] * request.entry + [states]


def load_groups(optimizer: Any, section: Mapping[str, Any]) -> None:
    """Give the optimizer's parameter groups the settings that were loaded. Local.

    Args:
        optimizer: Megatron-Core's, of a model under Megatron FSDP.
        section: `<parameter>.<setting>` to its value. Parameters that it lacks follow the others of their group.

    Raises:
        CheckpointMismatchError: parameters of one group had different settings.
    """
    by_parameter: dict[str, dict[str, Any]] = {}
    for key, value in section.items():
        name, _, setting = key.rpartition(".")
        by_parameter.setdefault(name, {})[setting] = value
    for group in optimizer.optimizer.param_groups:
        names = [optimizer._param_name(parameter) for parameter in group["params"]]
        saved = [(name, by_parameter[name]) for name in names if name in by_parameter]
        for name, settings in saved:
            if settings != saved[0][1]:
                raise CheckpointMismatchError(
                    f"the checkpoint's optimizer has {saved[0][0]} and {name} in groups with different settings, and "
                    "this run has them in one; set checkpoint.load_optim: false to take only the model"
                )
        if saved:
            group.update(saved[0][1])


def install_weights(model: list[Any]) -> None:
    """Let the model's own parameters follow the main parameters that were loaded. Local."""
    for chunk in model:
        chunk.module.install_optimized_model_weights()


def gather_weights(model: list[Any]) -> None:
    """Give every rank the parameters that it needs for a forward pass, as after an optimizer step. Collective."""
    for chunk in model:
        chunk.start_param_sync()


class _Parameters:
    """The model as megatron-core's preprocessing asks for it: parameters by their names, however it is wrapped.

    A wrapper for half precision adds a step to the names, and megatron-core's functions expect it to be there.
    """

    def __init__(self, model: Any) -> None:
        while hasattr(model, "module"):
            model = model.module
        self.config = model.config
        self._model = model

    def get_parameter(self, name: str) -> Any:
        while name.startswith("module."):
            name = name.removeprefix("module.")
        return self._model.get_parameter(name)


def _dtensors(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, DTensor]]:
    for key, value in tree.items():
        if isinstance(value, DTensor):
            yield f"{path}{key}", value
        elif isinstance(value, Mapping):
            yield from _dtensors(value, f"{path}{key}.")


def _fingerprints(state_dict: Mapping[str, Any]) -> dict[tuple[int, ...], tuple[str, int]]:
    """By the ranks of a device mesh: the digest and the number of the tensors that they share, in their order."""
    by_mesh: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in _dtensors(state_dict):
        mesh = tuple(int(rank) for rank in tensor.device_mesh.mesh.flatten())
        by_mesh.setdefault(mesh, []).append(f"{name} {tuple(tensor.shape)} {tensor.placements}")
    return {mesh: (hashlib.sha256("\n".join(rows).encode()).hexdigest(), len(rows)) for mesh, rows in by_mesh.items()}


def _require_same(own: Mapping[tuple[int, ...], Any], everyone: Sequence[Mapping[tuple[int, ...], Any]]) -> None:
    for mesh, fingerprint in own.items():
        for rank in mesh:
            other = everyone[rank].get(mesh)
            if other != fingerprint:
                raise CheckpointMismatchError(
                    f"this rank has {fingerprint[1]} tensors that it shares with rank {rank}, which has "
                    f"{other[1] if other else 0} or others; all ranks must save and load the same parameters"
                )
