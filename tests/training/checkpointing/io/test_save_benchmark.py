"""The benchmark of saves runs all its ways and writes its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def test_the_benchmark_writes_every_way_and_ratio(tmp_path: Path) -> None:
    out, table = tmp_path / "save.json", tmp_path / "save.md"
    command = [sys.executable, "-m", "scripts.benchmarks.save", "--large", "2x1MiB", "--small", "40x1KiB"]
    command += ["--rounds", "1", "--directory", str(tmp_path), "--json", str(out), "--markdown", str(table)]
    # Not captured: a process of megatron-core's may keep the pipe open.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300, cwd=ROOT)
    workloads = json.loads(out.read_text())["workloads"]
    for workload in ("large", "small"):
        assert workloads[workload]["seconds"].keys() == {
            *("copy", "raw", "raw direct", "torch.save", "dcp", "megatron", "direct", "manager"),
            *("dcp async", "megatron async", "direct async", "manager async"),
        }
        assert workloads[workload]["ratios"].keys() == {
            *("direct / raw", "direct / raw direct", "manager / raw", "megatron / manager", "dcp / manager"),
            *("megatron / direct", "dcp / direct", "torch.save / direct"),
            *("direct async / copy", "manager async / copy"),
            *("megatron async / direct async", "megatron async / manager async", "dcp async / manager async"),
        }
    assert workloads["large"]["kept memory / state"] == 2.0, "it is made in pieces of 2 MiB"
    assert "### large: 2 tensors of 1048576 bytes" in table.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"save.json", "save.md"}
