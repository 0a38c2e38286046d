"""The bytes of one rank's snapshot: a header that describes it, and the tensors' raw bytes one after the other.

megatron-core's tensor-aware state dict is divided into the tensors that this rank keeps and all the rest. The rest
is small; it is written as a torch file, and read like every other file of a checkpoint: with `weights_only` and a
closed list of classes, so it cannot run code. The tensors need no description beside their types and shapes, which
the header holds.

    snapshot = pack(state)                          # nothing is copied
    offsets, size = layout(snapshot.tensors)        # where each tensor's bytes go in a buffer of `size` bytes
    fill(buffer, snapshot.tensors)
    state = unpack_buffer(snapshot.header, buffer)  # its tensors are views of the buffer
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.safety.safe_globals import load_torch_bytes

ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple, which fits every type and a cache line."""
VERSION = 1

_CLASSES = (ShardedTensor, ShardedObject, slice)
"""What a header holds beside what files of a checkpoint may hold anyway."""
_DEVICE = "orig_device"
"""Attribute by which megatron-core's state dict remembers where a tensor that is now on the CPU belongs."""


@dataclass(frozen=True)
class Packed:
    """A state dict in two parts."""

    header: bytes
    """Everything but the tensors."""
    tensors: list[torch.Tensor]
    """The tensors as the state dict holds them, on whatever device, in the header's order."""


@dataclass(frozen=True)
class _TensorRecord:
    """One tensor that was taken out of the state dict."""

    position: int
    """Among the sharded values of the state dict, in their order."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str
    """Type of the device that it belongs to."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pack(state: MCoreTensorAwareStateDict) -> Packed:
    """Divide a state dict into its header and its tensors. The state dict itself stays as it is."""
    records: list[tuple[Any, ...]] = []
    tensors = []
    for position, value in enumerate(nested_values(state.sharded_state_dict)):
        if isinstance(value, ShardedTensor) and value.data is not None:
            data = value.data.detach()
            tensors.append(data)
            records.append((position, data.dtype, tuple(data.shape), getattr(value, _DEVICE, data.device.type)))
    content = {
        "version": VERSION,
        "common": state.common,
        "sharded": dict_list_map_outplace(_without_tensor, state.sharded_state_dict),
        "tensors": records,
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    return Packed(stream.getvalue(), tensors)


def unpack(header: bytes, tensors: Sequence[torch.Tensor], place: str = "the snapshot") -> MCoreTensorAwareStateDict:
    """Put a state dict together again.

    Args:
        header: as `pack` made it.
        tensors: in the order of `pack`.
        place: where they come from, for messages.

    Raises:
        UnsafeCheckpointError: the header holds an object of a class that is not allowed.
        CheckpointDamagedError: the header is unreadable, or the tensors are not those that it describes.
    """
    return _joined(*_read(header, place), tensors, place)


def unpack_buffer(header: bytes, buffer: torch.Tensor, place: str = "the snapshot") -> MCoreTensorAwareStateDict:
    """Put a state dict together from the buffer that holds its tensors' bytes where `layout` says.

    Args:
        header: as `pack` made it.
        buffer: bytes (`torch.uint8`), one dimension, beginning at a multiple of `ALIGNMENT` in memory; the state
            dict's tensors are views of it.
        place: where they come from, for messages.

    Raises:
        UnsafeCheckpointError: the header holds an object of a class that is not allowed.
        CheckpointDamagedError: the header is unreadable, or the buffer is not of the size that it describes.
    """
    content, records = _read(header, place)
    tensors = views(buffer, [(record.dtype, record.shape) for record in records])
    if tensors is None:
        _, total = _layout([record.size for record in records])
        raise CheckpointDamagedError(f"{place} holds {buffer.numel()} bytes of tensors, and its header says {total}")
    return _joined(content, records, tensors, place)


def common_of(header: bytes, place: str = "the snapshot") -> dict[str, Any]:
    """What is not sharded of the state dict that a header describes. Arguments and errors are those of `unpack`."""
    common: dict[str, Any] = _read(header, place)[0]["common"]
    return common


def layout(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where the bytes of each tensor go.

    Returns:
        The offset of each, a multiple of `ALIGNMENT`; and the bytes of all together, padding included.
    """
    return _layout([tensor.numel() * tensor.element_size() for tensor in tensors])


def views(buffer: torch.Tensor, described: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[torch.Tensor] | None:
    """The tensors of these types and shapes that lie in a buffer where `layout` says; None if it is of another size."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in described]
    offsets, total = _layout(sizes)
    if buffer.numel() != total:
        return None
    places = zip(offsets, sizes, described, strict=True)
    return [buffer[begin : begin + size].view(dtype).view(shape) for begin, size, (dtype, shape) in places]


def fill(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy tensors, from whatever device, into a buffer of bytes where `layout` says; padding becomes zero."""
    offsets, total = layout(tensors)
    end = 0
    for offset, tensor in zip(offsets, tensors, strict=True):
        buffer[end:offset].zero_()
        end = offset + tensor.numel() * tensor.element_size()
        if tensor.numel():
            buffer[offset:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    buffer[end:total].zero_()


def chunks(tensors: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes that `fill` would write, piece by piece. Tensors are on the CPU; contiguous ones are not copied."""
    offsets, total = layout(tensors)
    end = 0
    for offset, tensor in zip(offsets, tensors, strict=True):
        yield memoryview(bytes(offset - end))
        end = offset + tensor.numel() * tensor.element_size()
        if tensor.numel():
            yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    yield memoryview(bytes(total - end))


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end = -(-(end + size) // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _without_tensor(value: Any) -> Any:
    return value.without_data() if isinstance(value, ShardedTensor) else value


def _read(header: bytes, place: str) -> tuple[dict[str, Any], list[_TensorRecord]]:
    content = load_torch_bytes(header, place, "header of a snapshot", _CLASSES)
    try:
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']!r}, and this version of bridge reads {VERSION}")
        if not isinstance(content["common"], dict) or not isinstance(content["sharded"], dict):
            raise ValueError("it holds no state dict")
        records = [_TensorRecord(*record) for record in content["tensors"]]
        if any(type(n) is not int or n < 0 for record in records for n in (record.position, *record.shape)):
            raise ValueError("a tensor has no proper place or shape")
        _ = [record.size for record in records]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointDamagedError(f"{place} has no readable header: {error!r}") from error
    return content, records


def _joined(
    content: dict[str, Any], records: list[_TensorRecord], tensors: Sequence[torch.Tensor], place: str
) -> MCoreTensorAwareStateDict:
    values = list(nested_values(content["sharded"]))
    described = [(record.dtype, record.shape) for record in records]
    if described != [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]:
        raise CheckpointDamagedError(f"{place} holds other tensors than its header says")
    for record, tensor in zip(records, tensors, strict=True):
        value = values[record.position] if record.position < len(values) else None
        if not isinstance(value, ShardedTensor) or value.data is not None:
            raise CheckpointDamagedError(f"{place} has a tensor that belongs nowhere: number {record.position}")
        value.data = tensor
        if tensor.device.type != record.device:
            setattr(value, _DEVICE, record.device)
    return MCoreTensorAwareStateDict(common=content["common"], sharded_state_dict=content["sharded"])
