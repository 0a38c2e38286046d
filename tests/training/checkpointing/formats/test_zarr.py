"""The format zarr: every kind of shard, other numbers of ranks, both libraries, megatron-core's own functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, get_default_strategy

from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.formats import zarr_states as states

pytest.importorskip("tensorstore")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1, 2 and 4 ranks each, in both formats."""
    root = tmp_path_factory.mktemp("zarr")
    for world_size in (1, 2, 4):
        run_ranks(save_all, world_size, root)
    return root


def save_all(root: Path) -> None:
    init_ranks()
    n, rank = states.world()
    states.save(states.shards(n, rank), root / f"zarr{n}")
    states.save(states.shards(n, rank), root / f"torch_dist{n}", "torch_dist")
    # Replicas of everything on all ranks, which share the writing.
    kept = states.save(
        states.shards(n, rank, whole=True), root / f"shared{n}", group=dist.group.WORLD, assume_constant_structure=True
    )
    state = states.shards(n, rank, whole=True)
    states.save(state, root / f"again{n}", group=dist.group.WORLD, assume_constant_structure=True, strategy=kept)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_shard_comes_back_on_any_number_of_ranks(root: Path, world_size: int) -> None:
    run_ranks(load_all, world_size, root)


def load_all(root: Path) -> None:
    init_ranks()
    n, rank = states.world()
    for saved in (1, 2, 4):
        for name in (f"zarr{saved}", f"shared{saved}", f"again{saved}"):
            for whole in (False, True):
                for group in (None, dist.group.WORLD):
                    template = states.template(n, rank, whole=whole)
                    if saved != n:
                        del template["objects"]["each"]
                    loaded = states.load(template, root / name, group, "raise_unexpected").state_dict
                    if saved != n:
                        loaded["objects"]["each"] = [rank]
                    states.require_equal(loaded, n, rank, whole=whole)
                    assert loaded["content_metadata"] == {"kind": "test"}


def test_the_chunks_are_those_of_the_ranks(root: Path) -> None:
    for n in (1, 2, 4):
        shape = json.loads((root / f"zarr{n}" / "rows" / "zarr.json").read_text())["chunk_grid"]["configuration"]
        assert shape == {"chunk_shape": [8 // n, 6]}
        assert len(list((root / f"zarr{n}" / "rows" / "c").glob("*/0"))) == n
    assert states.files_in(root / "again4") == states.files_in(root / "shared4")
    assert json.loads((root / "zarr4" / "metadata.json").read_text()) == {
        "sharded_backend": "zarr",
        "sharded_backend_version": 2,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


def test_each_library_alone_reads_equal_values(root: Path) -> None:
    pytest.importorskip("zarr")
    run_ranks(read_with_both_libraries, 1, root)


def read_with_both_libraries(root: Path) -> None:
    import tensorstore
    import zarr

    from bridge.training.checkpointing.formats.names import key_of

    for checkpoint in ("zarr1", "zarr2", "zarr4", "shared4"):
        arrays = sorted(path.parent for path in (root / checkpoint).rglob("zarr.json"))
        assert sorted(key_of(path.name) for path in arrays) == sorted(states.values())
        for path in arrays:
            expected = states.values()[key_of(path.name)]
            opened = zarr.open_array(str(path), mode="r")
            assert opened.attrs["torch_dtype"] == str(expected.dtype).removeprefix("torch.")
            kvstore = {"driver": "file", "path": str(path)}
            by_tensorstore = (
                tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result().read().result()
            )
            for found in (opened[...], by_tensorstore):
                assert found.shape == tuple(expected.shape)
                assert torch.equal(torch.as_tensor(found).view(expected.dtype), expected)


def test_torch_dist_to_zarr_to_torch_dist_is_equal_for_stock_megatron_core(root: Path) -> None:
    run_ranks(convert, 2, root)


def convert(root: Path) -> None:
    init_ranks()
    n, rank = states.world()

    def again(source: str, name: str) -> None:
        template = states.template(n, rank)
        loaded = states.load(states.template(n, rank), root / source).state_dict
        _put(template, loaded)
        states.save(template, root / f"{source}-{name}", name)

    again("torch_dist2", "zarr")
    again("torch_dist2-zarr", "torch_dist")
    # Stock megatron-core reads both, the middle one through the strategy that is registered with it.
    for name in ("torch_dist2-zarr-torch_dist", "torch_dist2-zarr"):
        loaded = dist_checkpointing.load(states.template(n, rank), str(root / name))
        states.require_equal(loaded | {"iteration": 3}, n, rank)


def _put(template: Any, loaded: Any) -> None:
    children = template.items() if isinstance(template, dict) else enumerate(template)
    for key, item in children:
        if isinstance(item, ShardedTensor | ShardedObject):
            item.data = loaded[key]
        else:
            _put(item, loaded[key])


def test_stock_megatron_core_saves_and_describes_it(tmp_path: Path) -> None:
    run_ranks(save_with_stock, 2, tmp_path)


def save_with_stock(root: Path) -> None:
    from bridge.training.checkpointing.formats import zarr  # registers its strategies

    init_ranks()
    n, rank = states.world()
    directory = root / "stock"
    if rank == 0:
        directory.mkdir()
    dist.barrier()
    dist_checkpointing.save(states.shards(n, rank), str(directory), ("zarr", 2), content_metadata={"kind": "test"})
    states.require_equal(states.load(states.template(n, rank), directory).state_dict, n, rank)
    strategy = get_default_strategy(StrategyAction.LOAD_SHARDED, "zarr", 2)
    assert isinstance(strategy, zarr.ZarrLoadShardedStrategy)
    tensors = strategy.load_tensors_metadata(directory)
    assert {key: (t.dtype, t.global_shape) for key, t in tensors.items()} == {
        key: (t.dtype, tuple(t.shape)) for key, t in states.values().items()
    }
    described = strategy.load_sharded_metadata(directory)
    assert described.keys() - tensors.keys() == {"one/shard_0_1", "each/shard_0_2", "each/shard_1_2"}
    assert all(item.data is None for item in described.values())
    dist.barrier()
    if rank == 0:
        strategy.remove_sharded_tensors(str(directory), "e")
        assert described.keys() - strategy.load_sharded_metadata(directory).keys() == {"e4m3", "e5m2"}


def test_a_tensor_of_another_length_is_cut_or_padded_with_zeros(root: Path) -> None:
    run_ranks(load_padded, 2, root)


def load_padded(root: Path) -> None:
    init_ranks()
    n, rank = states.world()
    for rows in (7, 10, 13):
        for group in (None, dist.group.WORLD):
            loaded = states.load(states.template(n, rank, rows=rows), root / "zarr2", group).state_dict["padded"]
            stored = states.values()["padded"]
            assert torch.equal(loaded[:10], stored[:rows])
            assert torch.equal(loaded[10:], torch.zeros(max(rows - 10, 0), 3))
    # The second half of a tensor that begins where the stored one has ended.
    mine = torch.full((12, 3), 99.0)
    shard = ShardedTensor.from_rank_offsets("padded", mine, (0, rank, n), allow_shape_mismatch=True)
    loaded = states.load({"padded": shard}, root / "zarr2", strictness="assume_ok_unexpected").state_dict["padded"]
    assert torch.equal(loaded, torch.nn.functional.pad(stored, (0, 0, 0, 2)) if rank == 0 else torch.zeros(12, 3))


def test_values_are_converted_between_types_of_one_kind(root: Path) -> None:
    run_ranks(load_as_other_types, 2, root)


def load_as_other_types(root: Path) -> None:
    init_ranks()
    of = states.values()

    def wanted(key: str, dtype: torch.dtype) -> dict[str, Any]:
        data = torch.zeros(of[key].shape, dtype=dtype)
        return {key: ShardedTensor.from_rank_offsets(key, data, replica_id=dist.get_rank())}

    for key, dtype in (("rows", torch.bfloat16), ("columns", torch.float32), ("counts", torch.int32)):
        loaded = states.load(wanted(key, dtype), root / "zarr2", strictness="assume_ok_unexpected").state_dict
        assert torch.equal(loaded[key], of[key].to(dtype))


def test_what_is_read_at_a_time_is_limited_by_the_chunks_that_it_takes() -> None:
    run_ranks(divide_reads, 1)


def divide_reads() -> None:
    from bridge.training.checkpointing.formats.zarr_arrays import ArrayRead, read_batches
    from bridge.training.checkpointing.formats.zarr_grid import Box
    from bridge.training.checkpointing.formats.zarr_metadata import StoredArray

    array = StoredArray(Path("array"), (8, 4), torch.float32, 3, (4, 4), 64, ("c",), "/")

    def rows(start: int, count: int) -> ArrayRead:
        return ArrayRead(array, Box((start, 0), (count, 4)), torch.empty(count, 4))

    # One row takes a chunk of 64 bytes, and two that lie in different chunks take both.
    reads = [rows(0, 1), rows(1, 1), rows(3, 2), rows(0, 0), rows(7, 1), rows(0, 8)]
    assert [[read.size for read in batch] for batch in read_batches(reads, limit=128)] == [
        [64, 64],
        [128],
        [64],
        [128],
    ]
    assert list(read_batches([rows(8, 0)])) == []


def test_arrays_that_another_program_has_compressed_load(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    shutil.copytree(root / "zarr2", tmp_path / "zarr2")
    run_ranks(compress, 1, tmp_path / "zarr2")
    run_ranks(load_compressed, 2, tmp_path / "zarr2")


def compress(directory: Path) -> None:
    """Write each array anew as zarr-python does by default, in Zarr v3 and v2 in turn."""
    import zarr

    for number, path in enumerate(sorted(file.parent for file in directory.rglob("zarr.json"))):
        array = zarr.open_array(str(path), mode="r")
        values, attributes = array[...], dict(array.attrs)
        shutil.rmtree(path)
        # In Zarr v2 nothing says that bits are meant as something else.
        version = 3 if number % 2 or values.dtype.kind == "u" else 2
        made = zarr.create_array(
            str(path),
            shape=values.shape,
            dtype=values.dtype,
            zarr_format=version,
            fill_value=0,
            attributes=attributes,
            config={"write_empty_chunks": True},
        )
        made[...] = values


def load_compressed(directory: Path) -> None:
    init_ranks()
    n, rank = states.world()
    states.require_equal(states.load(states.template(n, rank), directory).state_dict, n, rank)


LEGACY = ("dtype_(torch.float32, torch.float32).param", "rows", "columns")


def test_a_checkpoint_of_megatron_core_0_8_loads(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    run_ranks(make_legacy, 1, tmp_path)
    run_ranks(load_legacy, 2, tmp_path)


def make_legacy(root: Path) -> None:
    """As its zarr backend wrote it: Zarr v2 without compression, bfloat16 by the name that only TensorStore knows."""
    import zarr

    directory = root / "legacy"
    directory.mkdir()
    of = states.values()
    for key in LEGACY:
        tensor = of.get(key, of["flat/buffer"])
        is_bf16 = tensor.dtype is torch.bfloat16
        data = tensor.view(torch.int16).numpy() if is_bf16 else tensor.numpy()
        array = zarr.create_array(
            str(directory / key),
            shape=data.shape,
            dtype="int16" if is_bf16 else data.dtype,
            chunks=tuple(-(-size // 2) for size in data.shape),
            compressors=None,
            zarr_format=2,
            fill_value=None,
            config={"write_empty_chunks": True},
        )
        array[...] = data
        (directory / key / ".zattrs").unlink(missing_ok=True)
        if is_bf16:
            file = directory / key / ".zarray"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    (directory / "rng_state").mkdir()
    torch.save([{"seed": 1}], directory / "rng_state" / "shard_0.0_1.1.pt")
    torch.save({"iteration": 3}, directory / "common.pt")
    (directory / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def load_legacy(root: Path) -> None:
    init_ranks()
    n, rank = states.world()
    of = states.values() | {LEGACY[0]: states.values()["flat/buffer"]}
    template: dict[str, Any] = {
        key: ShardedTensor.from_rank_offsets(key, torch.zeros_like(of[key].chunk(n)[rank]), (0, rank, n))
        for key in LEGACY[:2]
    }
    template["columns"] = ShardedTensor.from_rank_offsets(
        "columns", torch.zeros_like(of["columns"].chunk(n, 1)[rank]), (1, rank, n)
    )
    template["rng"] = ShardedObject("rng_state", None, (1, 1), (0, 0), replica_id=rank)
    loaded = states.load(template, root / "legacy").state_dict
    for key in LEGACY:
        assert torch.equal(loaded[key], of[key].chunk(n, 1 if key == "columns" else 0)[rank]), key
    assert loaded["rng"] == [{"seed": 1}]
    assert loaded["iteration"] == 3


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outside(path: Path) -> None:
    """A file, moved out of the checkpoint with a link in its place."""
    target = path.parents[4] / "outside"
    shutil.move(path, target)
    path.symlink_to(target)


class _Evil:
    """An object that would run code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never"),))


DAMAGE: dict[str, tuple[Any, str, str]] = {
    "a missing array": (
        lambda c: shutil.rmtree(c / "rows"),
        "CheckpointMismatchError",
        "has no tensor rows, which this run asks for",
    ),
    "missing metadata of an array": (
        lambda c: (c / "rows" / "zarr.json").unlink(),
        "CheckpointMismatchError",
        "has no tensor rows, which this run asks for",
    ),
    "a missing chunk": (
        lambda c: (c / "rows" / "c" / "1" / "0").unlink(),
        "CheckpointDamagedError",
        "rows/c/1/0 cannot be read: No such file or directory",
    ),
    "a truncated chunk": (
        lambda c: (c / "rows" / "c" / "1" / "0").write_bytes(b"1234"),
        "CheckpointDamagedError",
        "rows/c/1/0 has 4 bytes instead of 96",
    ),
    "another type": (
        lambda c: edited(c / "rows" / "zarr.json", data_type="int32", attributes={}),
        "CheckpointMismatchError",
        "rows has the type torch.float32 in this run, and torch.int32 in the checkpoint",
    ),
    "a type of another size": (
        lambda c: edited(c / "rows" / "zarr.json", data_type="float64", attributes={}),
        "CheckpointDamagedError",
        "rows/c/0/0 has 96 bytes instead of 192",
    ),
    "types that contradict one another": (
        lambda c: edited(c / "columns" / "zarr.json", data_type="uint8"),
        "CheckpointDamagedError",
        "its data type is 'uint8', and its attribute torch_dtype is 'bfloat16'",
    ),
    "another shape": (
        lambda c: edited(c / "rows" / "zarr.json", shape=[8, 5]),
        "CheckpointMismatchError",
        "rows has the shape (8, 6) in this run, and (8, 5) in the checkpoint",
    ),
    "a shape that is none": (
        lambda c: edited(c / "rows" / "zarr.json", shape=[8, -6]),
        "CheckpointDamagedError",
        "rows/zarr.json does not describe an array: it has the shape [8, -6]",
    ),
    "chunks of nothing": (
        lambda c: edited(
            c / "rows" / "zarr.json", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 6]}}
        ),
        "CheckpointDamagedError",
        "its shape is [8, 6], and that of its chunks [0, 6]",
    ),
    "torn metadata": (
        lambda c: (c / "rows" / "zarr.json").write_text('{"zarr_format": 3,'),
        "CheckpointDamagedError",
        "rows/zarr.json does not describe an array",
    ),
    "metadata without end": (
        lambda c: (c / "rows" / "zarr.json").write_text("[" * 100_000),
        "CheckpointDamagedError",
        "rows/zarr.json does not describe an array",
    ),
    "another version": (
        lambda c: edited(c / "metadata.json", sharded_backend_version=3),
        "CheckpointMismatchError",
        "is in version 3 of the format 'zarr', and this reads 1, 2",
    ),
    "another backend": (
        lambda c: edited(c / "metadata.json", sharded_backend="tar"),
        "CheckpointMismatchError",
        "is in the format 'tar', and this cannot be read: there is no format 'tar'",
    ),
    "a chunk that is a link to elsewhere": (
        lambda c: outside(c / "rows" / "c" / "0" / "0"),
        "UnsafeCheckpointError",
        "rows/c/0/0 is a link that leads out of the checkpoint",
    ),
    "a missing object": (
        lambda c: (c / "one" / "shard_0_1.pt").unlink(),
        "CheckpointMismatchError",
        "has no object one/shard_0_1, which this run asks for",
    ),
    "a torn object": (
        lambda c: (c / "one" / "shard_0_1.pt").write_bytes(b"PK\3\4"),
        "CheckpointDamagedError",
        "one/shard_0_1.pt",
    ),
    "an object that runs code": (
        lambda c: torch.save(_Evil(), c / "one" / "shard_0_1.pt"),
        "UnsafeCheckpointError",
        "one/shard_0_1.pt",
    ),
    "no common state": (
        lambda c: (c / "common.pt").unlink(),
        "CheckpointDamagedError",
        "common.pt does not exist",
    ),
}


def test_bad_input_is_the_same_typed_error_on_all_ranks(root: Path, tmp_path: Path) -> None:
    found = run_ranks(load_damaged, 2, root, tmp_path)
    assert found[0] == found[1]
    for case, (_, kind, message) in DAMAGE.items():
        for how in ("everywhere", "once"):
            error, text, untouched = found[0][case, how]
            assert error == kind, (case, text)
            assert message in text, case
            assert untouched, case


def load_damaged(root: Path, scratch: Path) -> dict[tuple[str, str], tuple[str, str, bool]]:
    init_ranks()
    n, rank = states.world()
    found = {}
    for number, (case, (inflict, _, _)) in enumerate(DAMAGE.items()):
        directory = scratch / str(number)
        if rank == 0:
            shutil.copytree(root / "zarr2", directory)
            inflict(directory)
        dist.barrier()
        for how, group in (("everywhere", None), ("once", dist.group.WORLD)):
            template = states.template(n, rank)
            try:
                states.load(template, directory, group, "assume_ok_unexpected")
            except Exception as error:
                untouched = all(bool((t.data.float() == 99).all()) for t in (template["rows"], template["half"]))
                found[case, how] = (type(error).__name__, str(error), untouched)
            else:
                found[case, how] = ("loaded", "", False)
    return found
