"""The command line of pre-training: its exit status and its words."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.distributed.launch import run_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain.py"

RECIPE = {
    "model": {"num_layers": 2, "hidden_size": 64, "seq_length": 32, "make_vocab_size_divisible_by": 16},
    "train": {"train_iters": 3, "micro_batch_size": 2},
    "dataset": {"mock": True},
    "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 255},
}

MANAGER = """
import os

class Manager:
    def __init__(self, config):
        os.write(1, b"custom manager made\\n")

    def save(self, ctx, callback_manager):
        os.write(1, b"custom manager saves %d\\n" % ctx.state.train_state.step)

    def load(self, ctx):
        return 0, 0

    def finalize_async_saves(self, state, blocking=False, terminate=False):
        pass
"""
"""It writes whole lines: what two ranks print may be mixed within one."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def _script() -> ModuleType:
    spec = util.spec_from_file_location("pretrain_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(arguments: list[str], stderr: Path) -> int:
    with stderr.open("a") as stream, contextlib.redirect_stderr(stream):
        status: int = _script().main(arguments)
    return status


def test_overlays_and_overrides_in_any_order_and_status_0_at_the_end(recipe: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("train: {train_iters: 2}\nlogger: {log_interval: 2}\n")
    metrics = tmp_path / "metrics.jsonl"
    arguments = ["train.train_iters=4", "--recipe", str(recipe), "--overlay", str(overlay)]
    arguments.append(f"logger.metrics_path={metrics}")
    assert run_ranks(_run, 1, arguments, tmp_path / "stderr") == [0]
    assert len(metrics.read_text().splitlines()) == 4
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    console = [line for line in (tmp_path / "stderr").read_text().splitlines() if "| loss " in line]
    assert len(console) == 2
    for iteration, line in zip((2, 4), console, strict=True):
        assert f" iteration {iteration}/4 | loss {losses[iteration - 1]!r} | grad norm " in line


def test_status_3_after_a_planned_exit(recipe: Path, tmp_path: Path) -> None:
    assert run_ranks(_run, 1, ["--recipe", str(recipe), "train.exit_interval=2"], tmp_path / "stderr") == [3]
    assert "training ended after iteration 2" in (tmp_path / "stderr").read_text()


def test_status_1_and_one_clear_line_after_an_error(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", str(recipe), "train.train_iter=4"]
    assert run_ranks(_run, 1, arguments, tmp_path / "stderr") == [1]
    text = (tmp_path / "stderr").read_text()
    assert text.startswith("error on rank 0: ConfigError: override 'train.train_iter=4': unknown setting")
    assert len(text.splitlines()) == 1


def test_a_missing_step_is_named_on_every_rank(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", str(recipe), f"checkpoint.load={tmp_path}", "checkpoint.ckpt_step=7"]
    assert run_ranks(_run, 2, arguments, tmp_path / "stderr") == [1, 1]
    lines = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("error")]
    assert sorted(line.split(" is not in ")[0] for line in lines) == [
        f"error on rank {rank}: CheckpointNotFoundError (a FileNotFoundError): checkpoint.ckpt_step: 7"
        for rank in (0, 1)
    ]


def test_torchrun_with_a_manager_from_the_working_directory(recipe: Path, tmp_path: Path) -> None:
    """A planned exit. torchrun itself answers any status but 0 with 1 and names the ranks' own status."""
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "checkpoint.py").write_text(MANAGER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(SCRIPT), "--recipe", str(recipe), "checkpoint.save=unused", "train.exit_interval=2"),
            "checkpoint.custom_manager_class=mypackage.checkpoint.Manager",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.count("custom manager made") == 2
    assert result.stdout.count("custom manager saves 2") == 2
    assert result.returncode == 1
    assert "exitcode  : 3" in result.stderr
