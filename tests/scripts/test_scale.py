"""The simulator of large jobs runs the code of a real save, in a small form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.benchmarks import scale


def test_a_small_job_is_simulated_from_its_plan_to_its_retention(tmp_path: Path) -> None:
    cost = scale.simulate(128, 6, writers=2, checkpoints=20)
    # Of each pair of replicas one writes the three weights; the optimizer's three tensors are everybody's own.
    assert (cost.ranks, cost.items, cost.written) == (128, 768, 64 * 3 + 128 * 3)
    assert cost.bytes["repeat, each rank"] == 24 and cost.bytes["scattered"] == 128
    assert cost.bytes["compact file"] < cost.bytes[".metadata"] / 5
    assert set(cost.seconds) >= {"unpack", "share out", "validate", "lay out", ".metadata", "compact file", "retention"}


def test_what_is_gathered_grows_with_the_shards_and_a_repeat_does_not(tmp_path: Path) -> None:
    one, two = scale.simulate(64, 20), scale.simulate(64, 40)
    assert one.bytes["gathered"] < two.bytes["gathered"] < 2.5 * one.bytes["gathered"]
    assert one.bytes["repeat, each rank"] == two.bytes["repeat, each rank"]


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "scale.json", tmp_path / "scale.md"
    arguments = ["--ranks", "64,128", "--tensors", "4", "--json", str(files[0]), "--markdown", str(files[1])]
    assert scale.main(arguments) == 0
    jobs = json.loads(files[0].read_text())["jobs"]
    assert [job["ranks"] for job in jobs] == [64, 128]
    assert all(job["first_plan_seconds"] > 0 for job in jobs)
    assert files[1].read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scale.main(["--ranks", "100"])
