"""LoRA (Hu et al., 2021, arXiv:2106.09685) on the linear layers of Megatron-Core's transformer layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.utils import unwrap_model

from bridge.peft.base import PEFT
from bridge.peft.linear import ADAPTED, LinearAdapter, adapt, merge
from bridge.training.config import ConfigError, LoRAConfig

_INTERLEAVING = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")


@dataclass(kw_only=True)
class LoRA(LoRAConfig, PEFT):
    """Low-rank adapters: y = W x + (alpha / dim) * B A x, with W frozen.

    Works on ColumnParallelLinear and RowParallelLinear of `megatron.core.tensor_parallel` under tensor,
    sequence, pipeline and expert parallelism.
    """

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """Put an adapter into a linear layer that `target_modules` names; leave every other module alone.

        Raises:
            ConfigError: the layer is of a class, or split in a way, that LoRA has no adapter for.
        """
        if name not in self.target_modules:
            return module
        _require_adaptable(module, f"{prefix}.{name}" if prefix else name)
        layer: Any = module
        adapter = LinearAdapter(
            layer,
            dim=self.dim,
            scale=self.alpha / self.dim,
            dropout=self.dropout,
            linear_in_init=self.linear_in_init,
            is_gated=name == "linear_fc1" and layer.config.gated_linear_unit,
        )
        adapt(layer, adapter)
        return module

    def merge(self, model: Sequence[Any]) -> None:
        """Turn an adapted model into a plain one that computes the same: add each adapter to its weight, in place.

        Optimizers and DDP wrappers made before know nothing of it: merge to evaluate, or to save the model whole.

        Args:
            model: the model chunks of this rank, wrapped or not.
        """
        for chunk in unwrap_model(list(model)):
            for module in list(chunk.modules()):
                if type(module) in ADAPTED.values():
                    merge(module)
        self.params_to_save = set()


def _require_adaptable(module: torch.nn.Module, path: str) -> None:
    kind = type(module)
    if kind in ADAPTED.values():
        raise ConfigError(f"peft: {path} has an adapter already; apply LoRA to a model only once")
    if kind not in ADAPTED:
        raise ConfigError(
            f"peft.target_modules: {path} is a {kind.__module__}.{kind.__name__}, and LoRA adapts the layers "
            f"{' and '.join(layer.__name__ for layer in ADAPTED)} of Megatron-Core itself; "
            "set model.transformer_layer_spec: local"
        )
    layer: Any = module
    if layer.is_expert and layer.tp_group.size() > 1:
        raise ConfigError(
            f"peft.target_modules: the experts of {path} are split over {layer.tp_group.size()} ranks each, and LoRA "
            "adapts whole experts only; set model.expert_tensor_parallel_size: 1"
        )
    interleaved = [name for name in _INTERLEAVING if getattr(layer.config, name, None) is not None]
    if layer.config.gated_linear_unit and interleaved:
        raise ConfigError(
            f"peft.target_modules: {path} may be an interleaved gated layer ({', '.join(interleaved)}), and adapters "
            "of such a layer could not be loaded under other tensor-parallel sizes; leave the setting out"
        )
    expects_whole = layer.gather_output if isinstance(layer, ColumnParallelLinear) else not layer.input_is_parallel
    if expects_whole:
        raise ConfigError(
            f"peft.target_modules: {path} gathers or scatters by itself, and LoRA has no adapter for that"
        )


def build_peft(config: LoRAConfig | None) -> PEFT | None:
    """The method of fine-tuning that the section `peft` describes; None where there is none."""
    if config is None:
        return None
    return LoRA(**{item.name: getattr(config, item.name) for item in dataclasses.fields(LoRAConfig)})
