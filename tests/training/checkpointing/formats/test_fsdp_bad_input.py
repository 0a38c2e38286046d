"""`fsdp_dtensor` checkpoints that are damaged or do not fit: one typed error on all ranks, and nothing half loaded."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata

from bridge.training.checkpointing import (
    get_rng_state,
    get_save_and_finalize_callbacks,
    load_fsdp_dtensor_checkpoint,
    save_fsdp_dtensor_checkpoint,
)
from bridge.training.checkpointing.contents.state_dict import generate_state_dict
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.setup import setup
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.fsdp import SWIGLU, digests, fsdp_config, run_to_end

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, **SWIGLU}
FC2 = "model.module.decoder.layers.0.mlp.linear_fc2.weight"


def edit_metadata(path: Path, change: Callable[[Metadata], None]) -> None:
    """Change what `.metadata` says, as another program might have written it, without a manifest that knows better."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    (path / "manifest.json").unlink()
    config = path / "run_config.yaml"
    config.write_text(config.read_text().replace("_target_: bridge.", "_target_: other.", 1))


def truncate(path: Path) -> None:
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])


def truncate_unnoticed(path: Path) -> None:
    edit_metadata(path, lambda metadata: None)
    truncate(path)


def garble(path: Path) -> None:
    edit_metadata(path, lambda metadata: None)
    file = path / "__0_0.distcp"
    file.write_bytes(b"\xff" * file.stat().st_size)


def other_shape(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata[FC2]
    entry.size = torch.Size([entry.size[0] + 2, *entry.size[1:]])


def other_type(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata[FC2]
    entry.properties.dtype = torch.float64


def without_a_chunk(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata[FC2]
    del entry.chunks[-1]


def without_a_tensor(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[FC2]


def with_a_class(path: Path) -> None:
    edit_metadata(path, lambda metadata: None)
    (path / ".metadata").write_bytes(pickle.dumps(Exploit()))


class Exploit:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


STRICT = {"strict_fsdp_dtensor_load": True}

BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str, str]] = {
    "a file is missing": (
        lambda path: (path / "__1_0.distcp").unlink(),
        {},
        "CheckpointDamagedError",
        "__1_0.distcp is missing",
    ),
    "a file is truncated": (truncate, {}, "CheckpointDamagedError", "__1_0.distcp has 1000 bytes"),
    "a file is missing, unnoticed": (
        lambda path: (edit_metadata(path, lambda metadata: None), (path / "__1_0.distcp").unlink()),
        {},
        "CheckpointDamagedError",
        "__1_0.distcp",
    ),
    "a file is truncated, unnoticed": (truncate_unnoticed, {}, "CheckpointDamagedError", "which has 1000"),
    "a file is garbled": (garble, {}, "CheckpointDamagedError", "__0_0.distcp"),
    "another shape": (
        lambda path: edit_metadata(path, other_shape),
        {},
        "CheckpointMismatchError",
        f"'{FC2}' has the shape [34, 128] in the checkpoint and [32, 128] in this run",
    ),
    "another type": (
        lambda path: edit_metadata(path, other_type),
        {},
        "CheckpointMismatchError",
        f"'{FC2}' has the type torch.float64 in the checkpoint and torch.float32 in this run",
    ),
    "a chunk is missing": (
        lambda path: edit_metadata(path, without_a_chunk),
        {},
        "CheckpointDamagedError",
        f"elements of '{FC2}' that this rank needs",
    ),
    "a key is missing, strict": (
        lambda path: edit_metadata(path, without_a_tensor),
        STRICT,
        "CheckpointMismatchError",
        f"does not fit this run: it has no {FC2}",
    ),
    "code in the metadata": (with_a_class, {}, "UnsafeCheckpointError", "builtins.print"),
}
"""What is done to a checkpoint, settings, and the error of every rank."""


def meet_bad_input(root: Path, good: Path, changing: list[str]) -> dict[str, Any]:
    init_ranks()
    found: dict[str, Any] = {}
    for number, (name, (_, settings, _, _)) in enumerate(BAD.items()):
        run = setup(fsdp_config(model=MODEL))
        before = digests(run)
        run.cfg.checkpoint.load = str(root / str(number))
        run.cfg.checkpoint.strict_fsdp_dtensor_load = bool(settings)
        try:
            run.manager.load(_context(run))
            found[name] = "loaded", ""
        except CheckpointError as error:
            # The zero moments that a load needs to read into are no change.
            unchanged = before.items() <= digests(run).items()
            found[name] = type(error).__name__, str(error), unchanged or name in changing
    found["a key is missing"] = run_to_end(fsdp_config(model=MODEL, load=str(root / "partial")))["started at"]
    found["by hand"] = save_and_load_by_hand(root / "by hand", good)
    return found


def _context(run: Any) -> Any:
    from bridge.training.checkpointing import CheckpointLoadContext

    return CheckpointLoadContext(
        run.state, run.model, run.optimizer, run.scheduler, strict=True, pg_collection=run.pg_collection
    )


def save_and_load_by_hand(path: Path, good: Path) -> tuple[bool, bool, int]:
    """The documented functions, as a program with a training loop of its own calls them."""
    run = setup(fsdp_config(model=MODEL, load=str(good)))
    wanted, cfg = digests(run), run.cfg
    state = generate_state_dict(cfg.checkpoint, run.model, run.optimizer, run.scheduler, None, 2)
    saved = save_fsdp_dtensor_checkpoint(path, state, cfg=cfg, model=run.model[0])
    other = setup(fsdp_config(model=MODEL))
    template = generate_state_dict(cfg.checkpoint, other.model, other.optimizer, other.scheduler, None, 0)
    loaded, place, release, kind = load_fsdp_dtensor_checkpoint(
        "",
        cfg.checkpoint,
        False,
        {**template, "_model": other.model},
        None,
        checkpoint_path_override=str(path),
        cfg=cfg,
    )
    assert (place, release, kind.name, saved is not None) == (str(path), False, "FSDP_DTENSOR", True)
    other.model[0].load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(loaded["optimizer"])
    now = digests(other)
    tensors = [key for key in wanted if key.startswith(("module.", "optimizer.0", "optimizer.1"))]
    return bool(tensors), all(now[key] == wanted[key] for key in tensors), int(loaded["iteration"])


def write_with_megatron_cores_writer(path: Path) -> tuple[list[str], list[str], float]:
    """A save by way of the request; and the keys of a rank's random states."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan

    init_ranks()
    run = setup(fsdp_config(model=MODEL))
    path.mkdir(exist_ok=True)
    writer = FileSystemWriterAsync(path, thread_count=1)
    value = torch.full((2,), 3.0)
    planned = save_state_dict_async_plan({"value": value}, writer, None, 0, planner=DefaultSavePlanner())
    request = get_save_and_finalize_callbacks(writer, planned[0])
    request.execute_sync()
    loaded = {"value": torch.zeros(2)}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    states = get_rng_state(False, "fsdp_dtensor", pg_collection=run.pg_collection)
    return sorted(file.name for file in path.iterdir()), sorted(states), float(loaded["value"].sum())


def test_the_request_of_an_asynchronous_save_writes_and_finalizes(tmp_path: Path) -> None:
    (outcome,) = run_ranks(write_with_megatron_cores_writer, 1, tmp_path / "dcp")
    assert outcome == ([".metadata", "__0_0.distcp"], ["(0, 0)"], 6.0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("bad")
    good = root / "good"

    def save() -> None:
        init_ranks()
        run_to_end(fsdp_config(train_iters=2, model=MODEL, save=str(good)))

    run_ranks(save, 2)
    cases = {str(number): damage for number, (damage, *_) in enumerate(BAD.values())}
    for name, damage in {**cases, "partial": lambda path: edit_metadata(path, without_a_tensor)}.items():
        shutil.copytree(good, root / name)
        damage(root / name / "iter_0000002")
    # What is noticed only while tensors are read has changed some of them.
    return run_ranks(meet_bad_input, 2, root, good, ["a file is garbled"], timeout=300)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_typed_error_on_all_ranks_before_anything_is_loaded(name: str, outcomes: Any) -> None:
    _, _, kind, message = BAD[name]
    for rank in outcomes:
        assert rank[name][0] == kind, rank[name]
        assert message in rank[name][1]
        assert rank[name][2]


def test_without_strictness_a_missing_key_stays_as_it_is_and_the_rest_is_loaded(outcomes: Any) -> None:
    assert [rank["a key is missing"] for rank in outcomes] == [2, 2]


def test_the_documented_functions_save_and_load_every_tensor(outcomes: Any) -> None:
    assert [rank["by hand"] for rank in outcomes] == [(True, True, 2)] * 2
