"""Many asynchronous saves with retention leave nothing behind. `scripts/benchmarks/soak.py` makes a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def soak(saves: int, tmp_path: Path) -> dict[tuple[int, str], dict[str, float]]:
    """Run the script; the trends by rank and measure."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "scripts.benchmarks.soak", "--saves", str(saves), "--json", str(result)]
    done = subprocess.run([*command, "--directory", str(tmp_path)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    assert (found["published"], found["damaged"], found["kept"]) == (saves, [], 3)
    return {(trend["rank"], trend["measure"]): trend for trend in found["trends"]}


def test_thirty_saves_leave_no_descriptors_and_no_processes(tmp_path: Path) -> None:
    trends = soak(30, tmp_path)
    for rank in (0, 1):
        # A rank has one process that writes, from its first save on. That which deletes is there now and then, with two
        # pipes, on rank 0 alone.
        assert trends[rank, "file descriptors"]["highest"] - trends[rank, "file descriptors"]["first"] <= 2
        assert trends[rank, "processes"]["highest"] <= (2 if rank == 0 else 1)


@pytest.mark.faults
def test_a_thousand_saves_leave_nothing(tmp_path: Path) -> None:
    trends = soak(1000, tmp_path)
    for rank in (0, 1):
        assert abs(trends[rank, "file descriptors"]["slope"]) < 1
        assert abs(trends[rank, "processes"]["slope"]) < 1
        assert trends[rank, "resident memory"]["slope"] < 20
