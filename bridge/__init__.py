"""bridge: the checkpoint-manager layer of a Megatron-Core training framework."""

__version__ = "0.1.0"
