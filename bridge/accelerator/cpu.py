"""What Megatron-Core asks of `torch.cuda`, answered by the CPU. See `bridge.accelerator.enable`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _coalescing_manager

_FACTORIES = ("tensor", "empty", "empty_like", "zeros", "ones")


class Event:
    """A `torch.cuda.Event` of a device that has no queue: whatever was recorded has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Mark this point of the stream; it lies in the past at once."""

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait for the event."""

    def synchronize(self) -> None:
        """Let the host wait for the event."""

    def query(self) -> bool:
        """True: the event has happened."""
        return True


class Stream:
    """A `torch.cuda.Stream` of a device that runs every operation when it is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        """Let this stream wait for another one."""

    def wait_event(self, event: Event) -> None:
        """Let this stream wait for an event."""

    def record_event(self, event: Event | None = None) -> Event:
        """The event given, or a new one, at the present point of this stream."""
        return event if event is not None else Event()

    def synchronize(self) -> None:
        """Let the host wait for this stream."""


_only_stream = Stream()


# Distinct functions rather than aliases of torch.cpu.*: torch._dynamo refuses one object under two names.


def _current_device() -> str:
    return "cpu"


def _device_count() -> int:
    return 1


def _set_device(device: Any) -> None:
    pass


def _synchronize(device: Any = None) -> None:
    pass


def _current_stream(device: Any = None) -> Stream:
    return _only_stream


@contextlib.contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    yield


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed_all in its turn.
    torch.default_generator.manual_seed(int(seed))


def _cuda_means_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory`, with `device="cuda"` read as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _stay_on_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _reports_cuda_types(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, with a type's name reported as that of the CUDA type; conversions are unchanged."""

    @functools.wraps(original)
    def tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return tensor_type


def _replace(owner: Any, **replacements: Any) -> None:
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def install() -> None:
    """Put the CPU in the place of CUDA, in `torch` and in Megatron-Core. Once, and only without CUDA."""
    _replace(
        torch.cuda,
        current_device=_current_device,
        device_count=_device_count,
        set_device=_set_device,
        synchronize=_synchronize,
        Stream=Stream,
        Event=Event,
        stream=_stream,
        current_stream=_current_stream,
    )
    random = {"get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state, "manual_seed": _manual_seed}
    _replace(torch.cuda, **random)
    _replace(torch.cuda.random, **random)
    for name in _FACTORIES:
        setattr(torch, name, _cuda_means_cpu(getattr(torch, name)))
    _replace(torch.Tensor, cuda=_stay_on_cpu, type=_reports_cuda_types(torch.Tensor.type))

    # Megatron-Core reaches the CUDA generators below torch.cuda's public functions.
    from megatron.core.tensor_parallel import random as megatron_random

    _replace(megatron_random, _get_cuda_rng_state=_get_rng_state, _set_cuda_rng_state=_set_rng_state)


def install_sharding() -> None:
    """Let Megatron-Core's wrappers for fully sharded data parallelism make their device meshes of the CPU.

    The meshes, and names made of the current device's number, are their only references to CUDA that no function of
    `install` answers. torch's own DeviceMesh stays as it is.
    """
    from megatron.core.distributed import torch_fully_sharded_data_parallel
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer

    _replace(torch.cuda, current_device=_numbered_device)
    _replace(param_and_grad_buffer, _coalescing_manager=_coalescing_at_once)
    _replace(mcore_fsdp_adapter, DeviceMesh=_CpuMesh)
    _replace(torch_fully_sharded_data_parallel, DeviceMesh=_CpuMesh)


def _coalescing_at_once(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
    """torch's manager of collectives that are made in one, which here have ended when it is left.

    Without CUDA's streams nothing else keeps memory from being freed that a collective is still writing. Synchronous
    ones are made each by itself, because gloo's coalesced reduce-scatter (torch 2.13) now and then corrupts the heap.
    """
    return _coalescing_manager(group, device, async_ops=False) if async_ops else contextlib.nullcontext()


class _DeviceName(str):
    """The CPU as a current device: a device by this name, and number 0 where the number becomes part of a name."""

    def __format__(self, spec: str) -> str:
        return format(0, spec)


def _numbered_device() -> str:
    return _DeviceName("cpu")


class _CpuMesh:
    """`DeviceMesh.from_group`, with CUDA read as the CPU."""

    @staticmethod
    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return DeviceMesh.from_group(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)
