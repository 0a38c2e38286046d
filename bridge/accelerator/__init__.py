"""The one place that knows CUDA from CPU.

Everything else in `bridge` asks this module for the device, its random state, the process-group backend and
synchronization, and runs unchanged on CUDA with NCCL and on the CPU with gloo.

Importing this module is cheap in effect: it patches nothing and imports nothing of Megatron-Core.
"""

from __future__ import annotations

import os

import torch

__all__ = [
    "device",
    "device_name",
    "enable",
    "enable_sharding",
    "get_rng_state",
    "is_cuda",
    "process_group_backend",
    "seed",
    "set_device",
    "set_rng_state",
    "synchronize",
]

_enabled = False


def enable() -> bool:
    """Prepare this process to run Megatron-Core on the hardware it has; True if that took any patching.

    Call it once at the start of a process, before Megatron-Core is used; further calls return at once.
    A spawned process inherits nothing from its parent and calls `enable()` itself; a forked one inherits all.

    What Megatron-Core misses for lack of TransformerEngine is not a matter of the device, and is supplied
    where the model and the optimizer are built.

    Where CUDA is available this does nothing at all. Where it is not, Megatron-Core still asks for CUDA by
    name, and `enable` lets the CPU answer:

    - `torch.cuda.current_device`, `device_count`, `set_device`, `synchronize`, `Stream`, `Event`, `stream`
      and `current_stream` describe one device, the CPU, on which all work is done when a call returns.
    - `torch.cuda.get_rng_state`, `set_rng_state` and `manual_seed`, and the names under which
      `megatron.core.tensor_parallel.random` uses them, act on torch's default generator: on the CPU it is
      the device's generator, so Megatron-Core's RNG tracker and activation recomputation work as on a GPU.
    - `torch.tensor`, `empty`, `empty_like`, `zeros` and `ones` take `device="cuda"` to mean the CPU,
      `Tensor.cuda()` returns the tensor itself, and `Tensor.type()` reports the CUDA name of the type, by
      which Megatron-Core's optimizers recognise the parameters that they manage.
    - `TORCHDYNAMO_DISABLE=1` is set unless the variable has a value: compiling the few functions that
      Megatron-Core decorates takes longer than they ever run on a CPU.

    Why this is safe: each replaced function either fails without CUDA or has no device to act on, with the
    exception of the factories and of `Tensor.type()`. The factories keep their behaviour for every argument
    that works without CUDA. Only the name that `Tensor.type()` returns is different, and nothing in torch
    itself reads it. `torch.cuda.is_available()` stays False: code that asks first is not misled.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from bridge.accelerator import cpu

        cpu.install()
        _enabled = True
    return True


def enable_sharding() -> None:
    """Prepare this process, beyond `enable`, to shard a model fully on the hardware it has.

    Where CUDA is not available, the device meshes that Megatron-Core's wrappers ask for on CUDA are made of the CPU.
    """
    # Imported where it is needed: it brings much that nothing else does.
    from torch.distributed.tensor import debug

    # What torch remembers of an earlier model in this process would name that one's groups: it compares ranks alone.
    debug._clear_sharding_prop_cache()
    if not torch.cuda.is_available():
        from bridge.accelerator import cpu

        cpu.install_sharding()


def is_cuda() -> bool:
    """True where tensors live on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else torch.device("cpu")


def device_name() -> str:
    """The device in words for a log line, such as "NVIDIA H200" or "CPU"."""
    return str(torch.cuda.get_device_name()) if is_cuda() else "CPU"


def set_device(local_rank: int) -> None:
    """Make the `local_rank`-th CUDA device of this node current; nothing to choose on the CPU."""
    if is_cuda():
        torch.cuda.set_device(local_rank)


def process_group_backend() -> str:
    """The `torch.distributed` backend for this device: "nccl" for CUDA, "gloo" for the CPU."""
    return "nccl" if is_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has done all queued work; on the CPU that is always so."""
    if is_cuda():
        torch.cuda.synchronize()


def get_rng_state() -> torch.Tensor:
    """State of the device's default random generator, a uint8 tensor on the host."""
    return torch.cuda.get_rng_state() if is_cuda() else torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Set the device's default random generator to a state from `get_rng_state`."""
    if is_cuda():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def seed(value: int) -> None:
    """Seed the device's default random generator."""
    if is_cuda():
        torch.cuda.manual_seed(value)
    else:
        torch.manual_seed(value)
