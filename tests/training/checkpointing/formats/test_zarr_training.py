"""Runs that save in the format zarr: resumed bit for bit, resharded, mixed with torch_dist, and out of space."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.errors import CheckpointSaveError, storage_error
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.formats import zarr_states as states
from tests.training.resharding import DENSE, MODELS, MOE, SAVED_AT, Cell, Saved, run_matrix
from tests.training.tiny import LAYOUTS, run_to_end, tiny_config

pytest.importorskip("tensorstore")


@pytest.mark.parametrize("case", ["one rank", "DP2", "TP2 x PP2"])
def test_a_run_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    world_size, model = LAYOUTS[case]
    for whole, *others in run_ranks(train_and_resume, world_size, tmp_path, model):
        assert whole["saved"] == [("iter_0000002", 2, "persistent"), ("iter_0000004", 4, "persistent")]
        for other in others:
            assert other["started at"] == 2
            assert other["digests"] == whole["digests"]
    manifest = json.loads((tmp_path / "zarr" / "iter_0000002" / "manifest.json").read_text())
    assert manifest["checkpoint_format"] == "zarr"
    assert {*manifest["files"], "manifest.json"} == set(states.files_in(tmp_path / "zarr" / "iter_0000002"))


def train_and_resume(root: Path, model: dict[str, Any]) -> list[dict[str, Any]]:
    init_ranks()

    def run(**checkpoint: Any) -> dict[str, Any]:
        return run_to_end(tiny_config(model=model, checkpoint=checkpoint))

    zarr, torch_dist = str(root / "zarr"), str(root / "torch_dist")
    saving = {"save": zarr, "save_interval": 2, "ckpt_format": "zarr"}
    whole = run(**saving, storage_writers_per_rank=2, ckpt_assume_constant_structure=True)
    from_two = {"load": zarr, "ckpt_step": 2}
    return [
        whole,
        run(**from_two, ckpt_format="zarr"),
        run(**from_two, fully_parallel_load=True),
        # A background writer is forked from a process in which TensorStore has run.
        run(**from_two, save=torch_dist, save_interval=1, async_save=True),
    ]


_TP2, _PP2, _DP2 = (next(layout for layout in DENSE if layout.name == name) for name in ("TP2", "PP2", "DP2"))
_ONE, _FOUR = DENSE[0], next(layout for layout in DENSE if layout.name == "TP2 PP2")
_DP4 = next(layout for layout in DENSE if layout.name == "DP4")
_EP2 = next(layout for layout in MOE if layout.name == "EP2")

CELLS = [
    *(("fully_reshardable", "tied bf16", _FOUR, loaded) for loaded in (_ONE, _TP2, _PP2, _DP2)),
    ("fully_reshardable", "tied bf16", _DP2, _FOUR),
    *(("dp_reshardable", "tied bf16", _DP2, loaded) for loaded in (_ONE, _DP4)),
    *(("plain", "untied bf16", _TP2, loaded) for loaded in (_DP2, _PP2)),
    ("fully_reshardable", "MoE bf16", _EP2, _ONE),
]


def test_it_loads_under_other_parallel_sizes(tmp_path: Path) -> None:
    cells = [
        Cell(Saved(MODELS[model], saved, optimizer, "zarr"), loaded, optimizer, more={"ckpt_step": SAVED_AT})
        for optimizer, model, saved, loaded in CELLS
    ]
    assert run_matrix(cells, tmp_path) == [""] * len(cells)
    formats = {json.loads(path.read_text())["checkpoint_format"] for path in tmp_path.rglob("manifest.json")}
    assert formats == {"zarr"}


def test_a_write_that_storage_refuses_is_an_error_and_may_be_tried_again(tmp_path: Path) -> None:
    failed, cause = run_ranks(save_with_a_limit, 2, tmp_path)[1]
    assert failed.startswith(f"writing arrays in {tmp_path / 'full'} failed: ")
    assert cause == errno.EFBIG


def save_with_a_limit(root: Path) -> tuple[str, int | None]:
    init_ranks()
    n, rank = states.world()
    found: tuple[str, int | None] = ("", None)

    def failing(write: Any) -> Any:
        """Fail once on rank 1, part of the way, then write."""
        nonlocal found
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointSaveError) as raised:
                write()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            cause = storage_error(raised.value)
            found = str(raised.value), None if cause is None else cause.errno
        return write()

    states.save(states.shards(n, rank), root / "full", around_write=failing)
    states.require_equal(states.load(states.template(n, rank), root / "full").state_dict, n, rank)
    return found
