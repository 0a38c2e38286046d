"""`.metadata` made from columns is what torch makes of objects; the compact file says the same or is refused."""

from __future__ import annotations

import json
import pickle
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from bridge.training.checkpointing.formats.plan_files import stored_table
from bridge.training.checkpointing.formats.shard_table import Packed, ShardTable
from bridge.training.checkpointing.io.compact import read_compact
from bridge.training.checkpointing.io.metadata_file import metadata_bytes
from bridge.training.checkpointing.io.stored import StoredByMetadata, StoredByTable
from bridge.training.checkpointing.io.table import Spec, StoredTable, dtype_of
from bridge.training.checkpointing.safety.payload_metadata import payload_metadata

KEYS = ["w", "a.b", "ключ", "with space", "x" * 300, "\u0000", "o/shard_0_1"]
DTYPES = ["torch.float32", "torch.bfloat16", "torch.bool", "torch.int64", "torch.float8_e4m3fn"]


def table_of(seed: int) -> StoredTable:
    """Rows of two to four tensors and objects a rank, of all numbers of axes; nothing says that they are whole."""
    chance = random.Random(seed)
    told = []
    for rank in range(chance.choice([1, 3])):
        rows: list[tuple[str, Spec, tuple[int, ...]]] = []
        for number in range(chance.choice([0, 1, 9])):
            key = f"{chance.choice(KEYS)}.{rank}.{number}"
            if chance.random() < 0.3:
                rows.append((f"{key}/shard_{rank}_3", Spec(key, "", "", False, (3,), (), None), (rank,)))
                continue
            axes = chance.choice([0, 1, 2, 5])
            part = tuple(chance.choice([0, 1, 3, 1 << 33]) if axes == 1 else chance.choice([1, 4]) for _ in range(axes))
            for piece in range(chance.choice([1, 1, 3]) if axes else 1):
                whole = tuple(3 * n if axis == 0 else n for axis, n in enumerate(part))
                offset = tuple(piece * n if axis == 0 else 0 for axis, n in enumerate(part))
                if piece and not any(offset):
                    continue
                dtype, pinned = DTYPES[number % len(DTYPES)], number % 2 == 0
                rows.append((key, Spec("", dtype, "torch.strided", pinned, whole, part, None), offset))
        told.append(Packed.of_rows(rows, [True] * len(rows)))
    table = ShardTable.of(told)
    planned = stored_table(table, table.main, chance.choice([1, 2]), [f"{rank:064x}" for rank in range(len(told))])
    at = np.array([chance.choice([0, 7, 1 << 40]) + n for n in range(len(planned))], np.int64)
    return replace(planned, at=at, length=at + 5)


def as_torch_makes_it(table: StoredTable) -> Any:
    plans: list[list[WriteItem]] = [[] for _ in table.fingerprints]
    places = {}
    for row in range(len(table)):
        spec, key = table.specs[table.spec[row]], table.keys[table.key[row]]
        if spec.is_object:
            item = WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)
        else:
            offset = torch.Size(table.offset[row, : len(spec.whole)].tolist())
            properties = TensorProperties(dtype_of(spec.dtype), pin_memory=spec.pinned)
            data = TensorWriteData(
                ChunkStorageMetadata(offset, torch.Size(spec.part)), properties, torch.Size(spec.whole)
            )
            item = WriteItem(MetadataIndex(key, offset), WriteItemType.SHARD, tensor_data=data)
        plans[table.rank[row]].append(item)
        name = table.files[table.file[row]]
        places[item.index] = _StorageInfo(name, int(table.at[row]), int(table.length[row]))
    made = [SavePlan(items, planner_data={}) for items in plans]
    _, metadata = create_default_global_save_plan(made)
    metadata.storage_data = places
    metadata.all_local_plans = made  # type: ignore[attr-defined]
    return metadata


@pytest.mark.parametrize("seed", range(40))
def test_columns_become_what_torch_makes_of_objects(seed: int) -> None:
    table = table_of(seed)
    data = metadata_bytes(table, Path("/somewhere"))
    expected, found = as_torch_makes_it(table), pickle.loads(data)
    for field in ("state_dict_metadata", "planner_data", "storage_data", "all_local_plans"):
        assert getattr(found, field) == getattr(expected, field), field
    assert found.storage_meta.checkpoint_id == "/somewhere" and found.version == "1.0.0"
    assert payload_metadata(data, "it").storage_data == expected.storage_data

    again = StoredTable.from_bytes(table.to_bytes(data), data)
    for stored in (StoredByTable(again), StoredByMetadata(payload_metadata(data, "it"))):
        assert stored.metadata().state_dict_metadata == expected.state_dict_metadata
        assert stored.metadata().storage_data == expected.storage_data
        for key in table.keys:
            tensor, thing = stored.tensor(key), stored.thing(key)
            assert (tensor is None) != (thing is None)
            if tensor is not None:
                assert tensor.shape == expected.state_dict_metadata[key].size
                places = {(c.offset, c.shape, c.file, c.at, c.length) for c in tensor.chunks}
                assert len(places) == len(expected.state_dict_metadata[key].chunks)
        assert stored.tensor("nothing") is None and stored.thing("nothing") is None


def resealed(data: bytes, change: Any) -> bytes:
    """The compact file with a changed header, and the checksums that belong to it."""
    size = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + size])
    change(header)
    text = json.dumps(header).encode()
    body = data[:8] + len(text).to_bytes(8, "little") + text + data[16 + size : -8]
    return body + xxhash.xxh3_64_digest(body)


def with_column(table: StoredTable, metadata: bytes, **columns: Any) -> bytes:
    return replace(table, **columns).to_bytes(metadata)


def refusals(table: StoredTable, metadata: bytes) -> dict[str, tuple[bytes, str]]:
    good = table.to_bytes(metadata)
    count = len(table)

    def changed(name: str, value: Any) -> bytes:
        return resealed(good, lambda header: header.update({name: value}))

    big = [[name, size, 1 << 40] for name, size, _ in json.loads(good[16 : 16 + good[8] + 256 * good[9]])["columns"]]
    columns = json.loads(good[16 : 16 + good[8] + 256 * good[9]])["columns"]
    deep = [spec._replace(whole=(1,) * 9) if spec.is_object else spec for spec in table.specs]
    assert deep != table.specs
    return {
        "a column twice": (changed("columns", [*columns, columns[0]]), "it has other columns"),
        "a column less": (changed("columns", columns[1:]), "it has other columns"),
        "a column of less than nothing": (
            changed("columns", [[columns[0][0], -1, 0], *columns[1:]]),
            "a column has a size that is none",
        ),
        "columns that overlap the checksum": (
            changed("columns", [*columns[:-1], [columns[-1][0], columns[-1][1] + 8, columns[-1][2]]]),
            "do not fill the file",
        ),
        "more keys than shards": (changed("keys", count + 1), "keys for"),
        "files that are no list": (changed("files", dict.fromkeys(table.files, 1)), "where a list belongs"),
        "fingerprints that are no list": (changed("fingerprints", {"a": 1}), "where a list belongs"),
        "ranks of files that are none": (
            changed("file_ranks", [0.5] * len(table.files)),
            "a length that is none",
        ),
        "a key twice": (with_column(table, metadata, keys=[table.keys[0]] * len(table.keys)), "a key twice"),
        "a file twice": (with_column(table, metadata, files=["x"] * len(table.files)), "a file twice"),
        "an object of more axes": (with_column(table, metadata, specs=deep), "fewer axes"),
        "nothing": (b"", "cut short"),
        "a cut": (good[:-1], "cut short or garbled"),
        "a bit": (good[:40] + bytes([good[40] ^ 1]) + good[41:], "cut short or garbled"),
        "another version": (changed("version", 2), "it is of version 2"),
        "another .metadata": (table.to_bytes(metadata + b"x"), "belongs to another .metadata"),
        "too many shards": (changed("shards", 1 << 40), "more than a .metadata of"),
        "columns that are too large": (changed("columns", big), "has 1099511627776 bytes"),
        "a file outside": (changed("files", ["../x"] * len(table.files)), "leaves the checkpoint"),
        "a kind that is none": (changed("kinds", [[1, 2]]), "not enough values"),
        "a type that is none": (
            changed("kinds", [["", "torch.nn", "torch.strided", False, [], [], None]] * len(table.specs)),
            "is no type of a tensor",
        ),
        "a key that is none": (with_column(table, metadata, key=table.key + 1000), "leads to nothing"),
        "a place before the file": (with_column(table, metadata, at=np.full(count, -1)), "none"),
        "a shard outside": (with_column(table, metadata, offset=table.offset + (1 << 50)), "outside of its tensor"),
    }


@pytest.mark.parametrize("case", refusals(table_of(1), b"x" * 10_000))
def test_a_compact_file_that_is_wrong_is_refused_in_words(case: str) -> None:
    metadata = b"x" * 10_000
    data, words = refusals(table_of(1), metadata)[case]
    with pytest.raises(ValueError, match=words):
        StoredTable.from_bytes(data, metadata)


def test_a_column_that_grows_when_it_is_unpacked_is_refused() -> None:
    metadata = b"x" * 10_000
    good = table_of(1).to_bytes(metadata)
    size = int.from_bytes(good[8:16], "little")
    header = json.loads(good[16 : 16 + size])
    bomb = zlib.compress(b"\0" * (64 << 20))
    header["columns"] = [[name, len(bomb), stated] for name, _, stated in header["columns"]]
    text = json.dumps(header).encode()
    body = good[:8] + len(text).to_bytes(8, "little") + text + bomb * len(header["columns"])
    with pytest.raises(ValueError, match="another size than it says"):
        StoredTable.from_bytes(body + xxhash.xxh3_64_digest(body), metadata)


def test_a_compact_file_that_does_not_serve_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = table_of(1)
    metadata = metadata_bytes(table, tmp_path)
    (tmp_path / ".metadata").write_bytes(metadata)
    assert read_compact(tmp_path) is None and not caplog.records
    (tmp_path / ".metadata.bridge").write_bytes(table.to_bytes(metadata))
    found = read_compact(tmp_path)
    assert found is not None and found.keys == table.keys
    (tmp_path / ".metadata").write_bytes(metadata[:-1] + b" ")
    assert read_compact(tmp_path) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / '.metadata.bridge'} is passed over, and .metadata read: it belongs to another .metadata"
    ]
