"""What commands that read tensors do first."""

from __future__ import annotations


def enable() -> None:
    """Prepare the process for torch and megatron-core, on a machine with or without accelerators."""
    from bridge import accelerator

    accelerator.enable()
