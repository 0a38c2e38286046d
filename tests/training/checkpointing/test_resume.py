"""A run that was stopped and resumed ends bit for bit where one that never stopped ends."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.training.tiny_run import LAYOUTS, run_to_end, tiny_config


def losses(path: Path) -> dict[int, str]:
    """Loss by iteration, exactly as written."""
    return {entry["iteration"]: repr(entry["loss"]) for entry in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bitwise(tmp_path: Path, layout: str, mode: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    save = tmp_path / "save"
    common = [*overrides, f"checkpoint.save={save}", f"checkpoint.async_save={str(mode == 'async').lower()}"]
    never_stopped = tiny_config(
        tmp_path, *common, "checkpoint.save_interval=2", f"logger.metrics_path={tmp_path / 'a.jsonl'}"
    )
    resumed = tiny_config(
        tmp_path,
        *common,
        f"checkpoint.load={save}",
        "checkpoint.ckpt_step=4",
        f"logger.metrics_path={tmp_path / 'b.jsonl'}",
    )
    expected = run_ranks(run_to_end, world_size, never_stopped)
    found = run_ranks(run_to_end, world_size, resumed)
    for rank in range(world_size):
        assert expected[rank]["saved"] == [(f"iter_{n:07d}", n, "persistent") for n in (2, 4, 6)]
        assert found[rank]["started at"] == 4
        assert found[rank]["loaded from"] == str(save / "iter_0000004")
        assert found[rank]["digests"] == expected[rank]["digests"]
    assert losses(tmp_path / "b.jsonl") == {n: losses(tmp_path / "a.jsonl")[n] for n in (5, 6)}
