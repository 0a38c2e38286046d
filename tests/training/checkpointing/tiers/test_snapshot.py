"""The bytes of a rank's snapshot: what goes in comes out bit for bit, and nothing that comes in can run code."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

from bridge.training.checkpointing.errors import CheckpointDamagedError, UnsafeCheckpointError
from bridge.training.checkpointing.sidecar import torch_bytes
from bridge.training.checkpointing.tiers.local import read_snapshot, write_snapshot
from bridge.training.checkpointing.tiers.snapshot import (
    ALIGNMENT,
    Packed,
    chunks,
    fill,
    layout,
    pack,
    unpack,
    unpack_buffer,
)

sharded = ShardedTensor.from_rank_offsets


def example() -> MCoreTensorAwareStateDict:
    """Every kind of value that a state dict of a run has."""
    torch.manual_seed(7)
    states = [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    return MCoreTensorAwareStateDict(
        common={"iteration": 3, "scheduler": {"lr": 0.1, "steps": [1, 2]}, "scale": torch.tensor(2.0)},
        sharded_state_dict={
            "bf16": sharded("bf16", torch.randn(3, 5, dtype=torch.bfloat16), (0, 1, 2)),
            "list": [sharded("strided", torch.arange(8.0)[::2]), ShardedObject("rng", states, (2,), (1,))],
            "empty": sharded("empty", torch.zeros(0, 3)),
            "scalar": sharded("scalar", torch.tensor(3)),
            "bool": sharded("bool", torch.tensor([True, False, True])),
            "fp8": sharded("fp8", torch.randn(4).to(torch.float8_e4m3fn)),
            "transposed": sharded("transposed", torch.randn(4, 6).t()),
            "kept by another rank": sharded("absent", torch.ones(2), replica_id=1).without_data(),
        },
    )


def tensors_of(state: MCoreTensorAwareStateDict) -> dict[str, torch.Tensor]:
    return {item.key: item.data for item in state._sharded_tensors}


def assert_same(found: MCoreTensorAwareStateDict, expected: MCoreTensorAwareStateDict) -> None:
    assert not found.is_hollow
    mine, theirs = tensors_of(found), tensors_of(expected)
    assert list(mine) == list(theirs)
    for key, tensor in theirs.items():
        assert mine[key].dtype == tensor.dtype
        assert mine[key].shape == tensor.shape
        assert torch.equal(mine[key].contiguous().view(-1).view(torch.uint8), _raw(tensor)), key
    assert found.common["iteration"] == 3
    assert found.common["scheduler"] == {"lr": 0.1, "steps": [1, 2]}
    assert torch.equal(found.common["scale"], torch.tensor(2.0))
    assert repr(found.sharded_state_dict["bf16"]) == repr(expected.sharded_state_dict["bf16"])
    assert found.sharded_state_dict["kept by another rank"].data is None
    (states,), (expected_states,) = (s.sharded_state_dict["list"][1].data for s in (found, expected))
    assert states["python"] == expected_states["python"]
    assert torch.equal(states["torch"], expected_states["torch"])
    assert np.array_equal(states["numpy"][1], expected_states["numpy"][1])


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def in_a_buffer(packed: Packed) -> torch.Tensor:
    buffer = torch.full((layout(packed.tensors)[1],), 255, dtype=torch.uint8)
    fill(buffer, packed.tensors)
    return buffer


def test_a_snapshot_is_the_same_after_a_buffer() -> None:
    state = example()
    packed = pack(state)
    assert_same(unpack_buffer(packed.header, in_a_buffer(packed)), state)


def test_a_snapshot_is_the_same_after_a_list_of_tensors() -> None:
    state = example()
    packed = pack(state)
    assert_same(unpack(packed.header, [tensor.clone() for tensor in packed.tensors]), state)


def test_a_snapshot_is_the_same_after_a_file(tmp_path: Path) -> None:
    state, path = example(), tmp_path / "snapshot"
    with path.open("wb", buffering=0) as stream:
        write_snapshot(stream, state)
    assert_same(read_snapshot(path), state)


def test_packing_copies_nothing_and_leaves_the_state_as_it_is() -> None:
    state = example()
    before = {key: tensor.data_ptr() for key, tensor in tensors_of(state).items()}
    packed = pack(state)
    assert [tensor.data_ptr() for tensor in packed.tensors] == list(before.values())
    assert {key: tensor.data_ptr() for key, tensor in tensors_of(state).items()} == before
    assert not any(hasattr(item, "orig_device") for item in state._sharded_tensors)


def test_the_device_that_a_tensor_belongs_to_is_remembered() -> None:
    state = example()
    state.sharded_state_dict["bf16"].orig_device = "cuda"  # as NVRx marks what it has copied to the host
    packed = pack(state)
    found = unpack(packed.header, packed.tensors)
    assert found.sharded_state_dict["bf16"].orig_device == "cuda"
    assert not hasattr(found.sharded_state_dict["bool"], "orig_device")


@pytest.mark.parametrize(
    ("sizes", "offsets", "total"),
    [
        ([], [], 0),
        ([0], [0], 0),
        ([1], [0], 64),
        ([64, 64], [0, 64], 128),
        ([65, 1], [0, 128], 192),
        ([1, 0, 3], [0, 64, 64], 128),
    ],
)
def test_tensors_lie_at_multiples_of_the_alignment(sizes: list[int], offsets: list[int], total: int) -> None:
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    assert ALIGNMENT == 64
    assert layout(tensors) == (offsets, total)


def test_the_pieces_for_a_file_are_the_bytes_of_the_buffer() -> None:
    packed = pack(example())
    assert b"".join(chunks(packed.tensors)) == in_a_buffer(packed).numpy().tobytes()


class Runs:
    """Runs code where it is unpickled carelessly."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (os.system, r"tries to run code when it is loaded \(posix.system\); delete it"),
        (eval, r"tries to run code when it is loaded"),
        (Path.touch, "getattr"),
    ],
)
@pytest.mark.parametrize("place", ["common", "object", "tensor record"])
def test_a_header_cannot_run_code(tmp_path: Path, function: Any, message: str, place: str) -> None:
    trap = tmp_path / "trap"
    arguments = {os.system: f"touch {trap}", eval: f"open({str(trap)!r}, 'w')", Path.touch: trap}
    evil: Any = Runs(function, arguments[function])
    content: dict[str, Any] = {"version": 1, "common": {}, "sharded": {}, "tensors": []}
    if place == "common":
        content["common"] = {"x": evil}
    elif place == "object":
        content["sharded"] = {"x": ShardedObject("x", evil, (1,), (0,))}
    else:
        content["tensors"] = [evil]
    with pytest.raises(UnsafeCheckpointError, match=message):
        unpack(torch_bytes(content), [], "the file")
    assert not trap.exists()


HEADER = {"version": 1, "common": {}, "sharded": {"x": sharded("x", torch.zeros(2)).without_data()}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**HEADER, "version": 2, "tensors": []}, "its version is 2, and this version of bridge reads 1"),
        ({**HEADER, "sharded": [], "tensors": []}, "it holds no state dict"),
        ({**HEADER, "tensors": [(0, torch.float32)]}, "no readable header"),
        ({**HEADER, "tensors": [(0, torch.float32, (-2,), "cpu")]}, "no proper place or shape"),
        ({**HEADER, "tensors": [(0, "float32", (2,), "cpu")]}, "no readable header"),
        ({**HEADER, "tensors": [(1, torch.float32, (2,), "cpu")]}, "a tensor that belongs nowhere: number 1"),
        ({**HEADER, "tensors": [(0, torch.float32, (3,), "cpu")]}, "holds other tensors than its header says"),
        ({**HEADER, "tensors": []}, "holds other tensors than its header says"),
        ("nothing of the kind", "no readable header"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(content: Any, message: str) -> None:
    with pytest.raises(CheckpointDamagedError, match=message):
        unpack(torch_bytes(content), [torch.zeros(2)], "the file")


def test_a_header_cut_short_is_damage() -> None:
    packed = pack(example())
    with pytest.raises(CheckpointDamagedError, match="the file is not a readable header of a snapshot"):
        unpack(packed.header[:-50], packed.tensors, "the file")


def test_a_buffer_of_another_size_is_damage() -> None:
    packed = pack(example())
    with pytest.raises(CheckpointDamagedError, match=r"the file holds 64 bytes of tensors, and its header says \d+"):
        unpack_buffer(packed.header, torch.zeros(64, dtype=torch.uint8), "the file")
