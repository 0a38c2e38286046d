"""The suite finds bugs that are planted in the commit; otherwise its silence would mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import job as jobs
from tests.faults.cases import World, in_process, verdict_of
from tests.faults.mutations import MUTATIONS
from tests.faults.order import violations
from tests.faults.situations import situations
from tests.faults.tracer import Fault

ORDER = {
    "tracker-before-manifest": "moves the tracker though no checkpoint was published",
    "retention-before-commit": "puts a checkpoint away while a save is under way",
    "manifest-without-fsync": "comes before the fsync of .saving-iter_0000001-*/manifest.json",
    "tracker-without-fsync": "comes before the fsync of .latest_train_state.pt.bridge-tmp",
    "publication-without-fsync": "moves a tracker before the names are synced of iter_0000001",
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_order_of_the_calls_gives_a_bug_away(name: str, world: World, seeds: Path, tmp_path: Path) -> None:
    job = situations(seeds)["save"].job(tmp_path / "run", world.data, MUTATIONS[name])
    found = in_process(lambda: violations(jobs.run(job).traced.calls))
    before, _, after = ORDER[name].partition("*")
    assert any(before in problem and after in problem for problem in found), found


@pytest.mark.parametrize("name", ["tracker-before-manifest", "retention-before-commit"])
def test_a_kill_gives_a_bug_away(name: str, world: World, seeds: Path, tmp_path: Path) -> None:
    situation = situations(seeds)["save"]
    job = situation.job(tmp_path / "run", world.data, MUTATIONS[name])
    calls = in_process(lambda: jobs.run(job)).traced.calls
    publishing = next(call.number for call in calls if call.name == "rename" and call.files[1] == "iter_0000002")
    verdict = in_process(lambda: verdict_of(situation, world, Fault(publishing), name, MUTATIONS[name]))
    assert any("the tracker names" in problem for problem in verdict.problems), verdict.problems


@pytest.mark.faults
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_fails_with_a_bug(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "tests/faults/test_every_call.py", "--mutate", name, "-W", "ignore"]
    done = subprocess.run([*command, "-k", "sample_of_kills and save-1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "failed" in done.stdout.splitlines()[-1], done.stdout
