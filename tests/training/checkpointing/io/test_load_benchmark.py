"""The benchmark of loads runs all its ways and writes its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def test_the_benchmark_writes_every_way_and_ratio(tmp_path: Path) -> None:
    out, table = tmp_path / "load.json", tmp_path / "load.md"
    command = [sys.executable, "-m", "scripts.benchmarks.load", "--large", "2x1MiB", "--small", "40x1KiB"]
    command += ["--rounds", "1", "--directory", str(tmp_path), "--json", str(out), "--markdown", str(table)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=ROOT)
    workloads = json.loads(out.read_text())["workloads"]
    common = {"raw", "torch.load", "dcp", "dcp direct", "megatron", "direct", "manager", "own"}
    assert workloads["small"]["seconds"].keys() == common
    assert workloads["large"]["seconds"].keys() == common | {"slice", "slice direct"}
    assert workloads["large"]["ratios"].keys() == {
        *("direct / raw", "megatron / direct", "megatron / manager", "dcp / dcp direct", "torch.load / direct"),
        *("slice / slice direct", "megatron / own", "own / raw"),
    }
    assert "### large: 2 tensors of 1048576 bytes" in table.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"load.json", "load.md"}
