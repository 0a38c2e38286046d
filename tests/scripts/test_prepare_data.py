from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bridge.training.tokenizers import HuggingFaceTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def prepare_data(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
    )


def test_it_prepares_tells_the_settings_and_reuses(tmp_path: Path) -> None:
    output = tmp_path / "data"
    arguments = ("--stdlib", "--output", output, "--vocab-size", "500", "--max-mib", "0.5")
    first = prepare_data(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-2:] == [
        f"dataset.path={output}/text_document",
        f"tokenizer.tokenizer_model={output}/tokenizer",
    ]
    assert HuggingFaceTokenizer(output / "tokenizer").vocab_size == 500
    second = prepare_data(*arguments)
    assert second.returncode == 0
    assert f"{output} was prepared from the same files and settings: reused" in second.stdout
    assert second.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]


def test_options_reach_the_work(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("pass")
    (tmp_path / "two.rst").write_text("text")
    run = prepare_data(
        *("--input", tmp_path, "--pattern", "*.rst,*.md", "--no-append-eod"),
        *("--output", tmp_path / "out", "--vocab-size", "257"),
    )
    assert run.returncode == 0, run.stderr
    assert f"1 documents, 4 tokens in {tmp_path}/out" in run.stdout


def test_an_error_is_one_line_and_a_status(tmp_path: Path) -> None:
    run = prepare_data("--input", tmp_path, "--output", tmp_path / "out", "--vocab-size", "300")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: found no file to prepare: --input has nothing")
    assert not (tmp_path / "out").exists()


def test_options_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    run = prepare_data("--stdlib", "--input", tmp_path, "--output", tmp_path / "out", "--vocab-size", "300")
    assert run.returncode == 2
    assert "not allowed with argument" in run.stderr
