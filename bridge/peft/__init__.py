"""Parameter-efficient fine-tuning: adapters beside the weights of a frozen base model."""

from bridge.peft.base import PEFT
from bridge.peft.lora import LoRA, build_peft

__all__ = ["PEFT", "LoRA", "build_peft"]
