"""docs/layout.md describes what is on disk: every name, every field of a manifest, and how to verify one without us."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.checkpointing import layout
from bridge.training.checkpointing.checksums import SAMPLED_BYTES
from bridge.training.checkpointing.integrity import FORMAT_VERSION, FileRecord, Manifest, write_manifest
from bridge.training.checkpointing.ownership import owner_of
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.starts import STARTS
from bridge.training.checkpointing.tiers.session import SESSION
from bridge.training.setup import setup
from bridge.training.state import TrainState
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/layout.md").read_text()
ITERATION = 2


def rows(heading: str, which: int = 0) -> list[list[str]]:
    """Cells of a table below a heading; of several, number `which`."""
    section = re.split(rf"^#+ {re.escape(heading)}$", PAGE, flags=re.MULTILINE)[1].split("\n#", 1)[0]
    table = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[which]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def first_column(heading: str, which: int = 0) -> set[str]:
    return {name.rstrip("/") for row in rows(heading, which) for name in re.findall(r"`([^`]+)`", row[0])}


EXPRESSIONS = {row[0].strip("`"): row[1].strip("`") for row in rows("Names")}


def problems_of(checkpoint: Path) -> list[str]:
    """What the program on the page finds."""
    found = re.search(r"<!-- file: verify_manifest.py -->\n```python\n(.*?)\n```", PAGE, re.DOTALL)
    assert found is not None
    assert "bridge" not in found[1].replace("manifest", "")
    namespace: dict[str, Any] = {}
    exec(found[1], namespace)
    problems: list[str] = namespace["problems_of"](checkpoint)
    return problems


def save_twice(directory: Path) -> None:
    """One persistent checkpoint, and after it local ones."""
    checkpoint = {
        "save": str(directory / "save"),
        "save_interval": ITERATION,
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": str(directory / "local"),
        "non_persistent_save_interval": ITERATION + 1,
    }
    train(setup(tiny_config(train_iters=2 * ITERATION, checkpoint=checkpoint)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(save_twice, 2, directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(saved: Path) -> Path:
    return saved / "save" / layout.iteration_name(ITERATION)


def test_every_field_of_a_manifest_is_documented_and_no_other(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert first_column("manifest.json", 0) == {*manifest, "averaged"}  # which only a mean of checkpoints has
    entries = {field for entry in manifest["files"].values() for field in entry}
    assert entries <= first_column("manifest.json", 1) == set(FileRecord("", 0, "", sample="x").to_entry())
    text = {row[0].strip("`"): row[2] for row in rows("manifest.json")}
    assert f": {FORMAT_VERSION}." in text["format_version"]
    assert set(re.findall(r"`(\w+)`", text["parallel_sizes"])) == {f.name for f in dataclasses.fields(Layout)}
    assert set(re.findall(r"`([\w-]+)`", text["versions"])) == set(manifest["versions"])


def test_every_name_of_ours_is_documented() -> None:
    constants = {name: value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    assert len(constants) > 15
    for name in (*constants.values(), STARTS, SESSION):
        assert name in PAGE, name


def test_what_lies_in_a_save_directory_is_documented(saved: Path, checkpoint: Path) -> None:
    beside = first_column("Beside the checkpoints")
    for path in (saved / "save").iterdir():
        assert path.name in beside or is_like(path.name, "iter_N"), path.name
    inside = first_column("In a checkpoint")
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        assert name in inside or is_like(name, "__RANK_I.distcp", "dataloader_state/…"), name


def is_like(name: str, *documented: str) -> bool:
    return any(re.fullmatch(EXPRESSIONS[key], name) for key in documented)


@pytest.mark.parametrize(
    ("documented", "name"),
    [
        ("iter_N", layout.iteration_name(10)),
        ("iter_N", layout.iteration_name(12_345_678)),
        (".saving-iter_N-TOKEN", layout.new_saving_name(10)),
        (".trash-NAME-TOKEN", layout.new_trash_name(layout.iteration_name(10))),
        (".trash-NAME-TOKEN", layout.new_trash_name(layout.new_saving_name(10))),
        (".NAME.bridge-tmp", f".{layout.TRACKER}{layout.TEMPORARY_SUFFIX}"),
        ("dataloader_state/…", layout.dataloader_state_name(1234)),
    ],
    ids=range(7),
)
def test_the_grammar_is_that_of_the_names_that_are_made(documented: str, name: str) -> None:
    assert is_like(name, documented)
    others = set(EXPRESSIONS) - {documented, ".NAME.bridge-tmp" if name.startswith(".trash") else ""}
    assert not is_like(name, *others)


def test_a_program_that_knows_only_the_page_verifies_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert problems_of(checkpoint) == []
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    for name in ("common.pt", "__1_0.distcp"):
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 2', '"world_size": 3'))
    damaged = [f"{name} is not what was written" for name in ("__1_0.distcp", "common.pt")]
    found = [problem for problem in problems_of(copy) if "sample" not in problem]
    assert found == ["manifest.json was changed", *damaged]


@pytest.mark.parametrize("kind", ["xxh3", "crc32", "sha256"])
def test_it_verifies_every_kind_of_checksum_samples_and_odd_values(tmp_path: Path, kind: str) -> None:
    (tmp_path / "large").write_bytes(bytes(range(251)) * 400)
    (tmp_path / "größe").write_bytes(b"")
    records = tuple(FileRecord.of(tmp_path, name, kind) for name in ("large", "größe"))
    assert records[0].size > SAMPLED_BYTES and records[0].sample
    metrics = {"loss": 0.1 + 0.2, "tiny": 1e-300, "größe": 3.0}
    write_manifest(tmp_path, Manifest(7, "torch_dist", 1, {}, {}, records, created=1e9 + 0.1, metrics=metrics))
    assert problems_of(tmp_path) == []


def test_the_torch_files_are_as_described(checkpoint: Path) -> None:
    described = {row[0].strip("`"): row[1] for row in rows("Torch files")}
    state = torch.load(checkpoint / "train_state.pt", weights_only=True)
    text = described["train_state.pt"]
    for names, dtype in re.findall(r"((?:`\w+`(?:, )?)+) \((\w+)\)", text):
        for name in re.findall(r"`(\w+)`", names):
            assert state.pop(name).dtype == getattr(torch, dtype), name
    assert state == {}
    assert len(dataclasses.fields(TrainState)) == len(re.findall(r"`(\w+)`", text))
    common = torch.load(checkpoint / "common.pt", weights_only=True)
    assert set(common) <= set(re.findall(r"`(\w+)`", described["common.pt"]))
    content = PAGE.split("`content_metadata` says", 1)[1].split("\n#", 1)[0]
    assert set(common["content_metadata"]) <= set(re.findall(r"`(\w+)`", content))
    position = torch.load(checkpoint / layout.dataloader_state_name(1), weights_only=True)
    assert set(position) == {"dataloader_state_dict"}
    assert (checkpoint.parent / layout.TRACKER).read_bytes() == (
        checkpoint.parent / layout.iteration_name(2 * ITERATION) / layout.TRAIN_STATE
    ).read_bytes()


def test_the_hidden_files_are_as_described(saved: Path) -> None:
    described = {row[0].strip("`"): row[1] for row in rows("Hidden files")}
    save = saved / "save"
    writer = json.loads((save / layout.WRITER).read_text())
    assert list(writer) == re.findall(r"`(\w+)`", described[layout.WRITER])[:3]
    assert writer["host"] in owner_of(save)
    assert re.fullmatch(r"[0-9a-f]{32}", (save / SESSION).read_text())
    assert all(len(start) == 3 for start in json.loads((save / STARTS).read_text()))
    assert set(described) == {layout.WRITER, SESSION, STARTS, layout.EVENTS, layout.DAMAGED}


def test_a_local_snapshot_has_the_bytes_that_the_page_says(saved: Path) -> None:
    (path,) = (saved / "local").glob("*/0/iter_*_0_local.pt")
    data = path.read_bytes()
    widths = [row[0] for row in rows("Local snapshots")]
    assert widths == ["8", "4", "8", "8", "H", "T", "4"]
    magic, version, header, tensors = struct.unpack_from("<8sIQQ", data)
    assert magic == bytes.fromhex(rows("Local snapshots")[0][1].strip("`"))
    assert f"version, {version}" == rows("Local snapshots")[1][1]
    assert len(data) == 8 + 4 + 8 + 8 + header + tensors + 4
