"""Parameter-efficient fine-tuning: what is trained beside a frozen base model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge.training.config.schema import Violation, at_least, between, nearest

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers of a transformer layer, by their names in megatron-core."""


@dataclass(kw_only=True)
class LoRAConfig:
    """LoRA: to each targeted weight W is added (alpha / dim) * B A, and only A and B are trained."""

    kind: Literal["lora"] = "lora"
    """Method of fine-tuning."""

    dim: int = 16
    """Rank of the update: rows of A and columns of B."""

    alpha: float = 32.0
    """Weight of the update; it is scaled by alpha / dim."""

    dropout: float = 0.0
    """Dropout probability on what goes into A."""

    target_modules: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """Linear layers that get an update, by the last part of their names, in every transformer layer."""

    linear_in_init: Literal["kaiming", "xavier"] = "kaiming"
    """How A starts: uniform, within Kaiming's bound or Xavier's. B starts at zero."""


def peft_rules(peft: LoRAConfig | None, checkpoint: CheckpointConfig) -> Iterator[Violation]:
    """Ranges of the settings, and the base model that there must be, apart from where adapters are saved."""
    if peft is None:
        return
    yield from at_least("peft", peft, 1, "dim")
    if peft.alpha <= 0:
        yield Violation("peft.alpha", peft.alpha, "is too small", "set it to a number above 0")
    yield from between("peft", peft, 0, 1, "dropout")
    yield from _target_rules(peft.target_modules)
    base = checkpoint.pretrained_checkpoint
    if not base:
        yield Violation(
            "checkpoint.pretrained_checkpoint",
            base,
            "names no base model, and peft trains only what is added to one",
            "set it to the base model's directory of checkpoints, or peft to null",
        )
    elif checkpoint.save and Path(checkpoint.save).resolve() in (Path(base).resolve(), Path(base).resolve().parent):
        yield Violation(
            "checkpoint.save",
            checkpoint.save,
            "is where checkpoint.pretrained_checkpoint lies: adapters would take the place of the base model",
            "set it to another directory",
        )


def _target_rules(targets: list[str]) -> Iterator[Violation]:
    setting = "peft.target_modules"
    if not targets:
        yield Violation(setting, targets, "leaves nothing to train", f"name some of {', '.join(LORA_TARGETS)}")
    if len(set(targets)) < len(targets):
        yield Violation(setting, targets, "names a layer twice", "name each once")
    for target in targets:
        if target not in LORA_TARGETS:
            close = nearest(target, LORA_TARGETS)
            advice = f"did you mean {close!r}?" if close else f"the layers are {', '.join(LORA_TARGETS)}"
            yield Violation(setting, target, "is no linear layer of a transformer layer", advice)
