"""All benchmarks in their small form, and the tables and the picture that are made of what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.benchmarks import _goals, _machine, _page
from scripts.benchmarks import all as everything

ROOT = Path(__file__).resolve().parents[2]


def seconds(*values: float) -> dict[str, list[float]]:
    return {"wall": list(values), "processor": list(values)}


def workload(ways: dict[str, float], ratios: dict[str, float]) -> dict[str, Any]:
    return {
        "tensors": 1000,
        "bytes": 32 << 20,
        "seconds": {way: seconds(value) for way, value in ways.items()},
        "ratios": {pair: {"wall": ratio, "processor": ratio} for pair, ratio in ratios.items()},
    }


def part(report: dict[str, Any], noisy: bool = False) -> dict[str, Any]:
    return {"seconds": 1.0, "load before": 0.5, "busy with others": 0.25, "noisy": noisy, "report": report}


LOAD = part(
    {
        "workloads": {
            "large": workload(
                {"raw": 0.1, "own": 0.12, "megatron": 0.9, "dcp": 0.8},
                {"megatron / own": 7.5, "dcp / dcp direct": 5.9, "own / raw": 1.2},
            ),
            "small": workload(
                {"raw": 0.001, "own": 0.01, "megatron": 1.0, "dcp": 0.9},
                {"megatron / own": 100.0, "dcp / dcp direct": 41.0, "own / raw": 10.0},
            ),
        }
    },
    noisy=True,
)
SCALE = part(
    {
        "jobs": [
            {
                "ranks": 1024,
                "items": 1_024_000,
                "first_plan_seconds": 6.0,
                "metadata_seconds": 2.5,
                "bytes": {"compact file": 700_000, "repeat, each rank": 24},
            }
        ]
    }
)
MACHINE = {
    **{"processor": "Some <processor>", "cores": 2, "memory": 24 << 30, "kernel": "6.1", "file system": "ext4"},
    **{"python": "3.11", "torch": "2.13", "megatron-core": "0.16.1"},
}


def test_goals_stand_beside_what_was_measured() -> None:
    found = [(goal.wanted, goal.measured, goal.met, goal.noisy) for goal in _goals.goals_of({"load": LOAD})]
    assert found == [
        ("≥ 6 times as fast", "7.5 times", True, True),
        ("≥ 40 times as fast", "100.0 times", True, True),
        ("≥ 6 times as fast", "5.9 times", False, True),
        ("≤ 1.4 times the time", "1.20 times", True, True),
        ("< 12 µs", "10.0 µs", True, True),
    ]
    assert [goal.met for goal in _goals.goals_of({"scale": SCALE})] == [False, True, True]


def test_the_page_is_made_again_between_its_marks() -> None:
    report = {"machine": MACHINE, "parts": {"load": LOAD, "scale": SCALE}}
    made = _page.markdown(report, _goals.goals_of(report["parts"]))
    assert "| ≥ 6 times as fast | 5.9 times | **not met**, noisy |" in made
    assert "Processors that other programs kept busy meanwhile, on average: `load` 0.25, `scale` 0.25." in made
    page = _page.filled("# Title\n\nWords.\n", "old")
    assert page == f"# Title\n\nWords.\n\n{_page.BEGIN}\n\nold\n\n{_page.END}\n"
    page = _page.filled(page + "\nMore words.\n", made)
    assert "old" not in page and page.startswith("# Title") and page.endswith(f"{_page.END}\n\nMore words.\n")
    assert _page.filled(page, made) == page


def test_the_picture_has_a_bar_for_each_way_within_its_bounds() -> None:
    groups = [*_page.bars_of({"load": LOAD}), _page.Group("Less & nothing", (("direct", 0.0), ("copy", -0.1)))]
    root = ElementTree.fromstring(_page.picture(groups))
    space = "{http://www.w3.org/2000/svg}"
    bars = [element for element in root.iter(space + "rect") if "bar" in element.get("class", "")]
    width, height = (float(number) for number in root.get("viewBox", "").split()[2:])
    assert len(bars) == 4 + 4 + 2
    assert [float(bar.get("width", 0)) for bar in bars[-2:]] == [1.0, 1.0]
    assert float(bars[1].get("width", 0)) < float(bars[2].get("width", 0))
    assert all(float(bar.get("x", 0)) + float(bar.get("width", 0)) < width for bar in bars)
    assert all(float(bar.get("y", 0)) + float(bar.get("height", 0)) < height for bar in bars)


def test_what_others_do_on_the_machine_is_told_from_what_the_benchmark_does() -> None:
    begun, ended = _machine.Busy(machine=100.0, own=10.0), _machine.Busy(machine=112.0, own=19.0)
    assert ended.others_since(begun, 10.0) == pytest.approx(0.3)
    assert _machine.Busy(112.0, 25.0).others_since(begun, 10.0) == 0.0


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        everything.main(["--parts", "load,nothing"])
    assert "'nothing' is none of load, save, training" in capsys.readouterr().err


def run_small(tmp_path: Path, parts: str) -> dict[str, Any]:
    """Run parts in their small form; what they report."""
    files = {"--json": tmp_path / "results.json", "--markdown": tmp_path / "page.md", "--picture": tmp_path / "p.svg"}
    command = [sys.executable, "-W", "ignore", "-m", "scripts.benchmarks.all", "--small", "--parts", parts]
    for option, path in files.items():
        command += [option, str(path)]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=600, cwd=ROOT)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    report = json.loads(files["--json"].read_text())
    page = files["--markdown"].read_text()
    assert all(goal.measured in page for goal in _goals.goals_of(report["parts"]))
    ElementTree.fromstring(files["--picture"].read_text())
    return {name: part["report"] for name, part in report["parts"].items()}


def test_training_time_gpts_and_resharding_are_measured_and_what_is_saved_is_right(tmp_path: Path) -> None:
    found = run_small(tmp_path, "training,resharding,gpt")
    ways = found["training"]["ways"]
    assert ways.keys() == {"copy", "copy and write", "direct", "stock", "megatron", "dcp thread", "dcp process"}
    assert {way: made["is what it was"] for way, made in ways.items()} == dict.fromkeys(ways, True)
    expected = {"stall", "looks", "lost", "complete", "processor", "page faults"}
    assert all(made["first"].keys() == made["rounds"][0].keys() == expected for made in ways.values())
    assert found["training"]["ratios"].keys() == {
        *("direct / copy", "direct / copy and write", "stock / direct", "megatron / direct"),
        *("dcp thread / direct", "dcp process / direct"),
    }
    loads = found["resharding"]["loads"]
    assert loads.keys() == {"rows", "columns", "TP2 to TP1"}
    assert all(load["is what it was"] for load in loads.values())
    assert loads["rows"]["ways"]["direct"]["amplification"] < loads["rows"]["ways"]["megatron"]["amplification"]
    cases = found["gpt"]["cases"]
    assert cases.keys() == {"dense, TP2", "MoE, EP2"}
    for case in cases.values():
        assert case["is what it was"]
        assert case["ratios"].keys() == case["seconds"].keys() == {"save", "stall", "load"}
        assert all(ways.keys() == {"raw", "direct", "stock", "megatron"} for ways in case["seconds"].values())


@pytest.mark.slow
def test_all_parts_make_one_page(tmp_path: Path) -> None:
    assert run_small(tmp_path, ",".join(everything.PARTS)).keys() == everything.PARTS.keys()
