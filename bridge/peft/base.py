"""`PEFT`: what every method of parameter-efficient fine-tuning does to a model, and which parameters are its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from bridge.training.config import ConfigError


@dataclass(kw_only=True)
class PEFT(ABC):
    """A method of fine-tuning: freezes a model and adds parameters that are trained in its place.

    A method is a dataclass of its settings that implements `transform`. Apply it to the chunks of a model
    after the base weights are loaded and before DDP and the optimizer are made, for they look at
    `requires_grad` when they are made.
    """

    params_to_save: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Names, inside a model chunk, of the parameters that this method trains; filled when it is applied."""

    @abstractmethod
    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """What takes the place of a module of the model: the module itself if this method leaves it alone.

        Every parameter of the module is frozen by then; new ones that require gradients are what is trained.

        Args:
            module: any module of the model.
            name: last part of its name, `linear_qkv`.
            prefix: what comes before that, `decoder.layers.0.self_attention`.

        Raises:
            ConfigError: the module is one to transform, and this method cannot.
        """

    def __call__(self, model: Sequence[Any], training: bool = True) -> Sequence[Any]:
        """Apply this method to all chunks of a model, in place.

        Args:
            model: the model chunks of this rank, with nothing but Float16Module around them.
            training: False freezes the new parameters too and switches to evaluation.

        Returns:
            `model`.

        Raises:
            ConfigError: a chunk has no module to transform, or one that cannot be.
        """
        chunks = unwrap_model(list(model))
        for index, chunk in enumerate(chunks):
            chunk.requires_grad_(False)
            self._transform_modules(chunk)
            if not any(parameter.requires_grad for parameter in chunk.parameters()):
                raise ConfigError(
                    f"peft: {self!r} finds nothing to train in model chunk {index} of this rank; choose target "
                    "modules that every pipeline stage has"
                )
        self.set_params_to_save(chunks)
        for chunk in chunks:
            _let_gradients_pass_recomputation(chunk)
            chunk.train(training)
            if not training:
                chunk.requires_grad_(False)
        return model

    def _transform_modules(self, chunk: torch.nn.Module) -> None:
        for path, module in list(chunk.named_modules()):
            prefix, _, name = path.rpartition(".")
            if not name:
                continue
            replacement = self.transform(module, name, prefix)
            if replacement is not module:
                setattr(chunk.get_submodule(prefix), name, replacement)

    def set_params_to_save(self, model: Sequence[Any]) -> None:
        """Take the parameters that now require gradients for those that this method trains.

        Args:
            model: the model chunks of this rank, wrapped or not.
        """
        self.params_to_save = {
            name
            for chunk in unwrap_model(list(model))
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        }

    def adapter_key_filter(self, key: str | tuple[str, torch.Tensor]) -> bool:
        """Whether a parameter is this method's own, and no part of the base model.

        Args:
            key: its name inside a model chunk, or a pair of the name and the parameter.
        """
        if isinstance(key, tuple):
            return key[1].requires_grad
        return key in self.params_to_save or ".adapter." in key or key.endswith(".adapters")


def _let_gradients_pass_recomputation(chunk: Any) -> None:
    """Let the output of a frozen embedding require gradients.

    Where layers are recomputed in the backward pass, autograd reaches the parameters inside only through an
    input that requires gradients. On later pipeline stages Megatron-Core sees to that.
    """
    embedding = getattr(chunk, "embedding", None)
    if embedding is not None and chunk.config.recompute_granularity == "full":
        embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
