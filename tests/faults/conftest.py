"""What the fault suite shares: a text, undisturbed runs to compare with, seeds, and planted bugs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import launch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", metavar="BUG", help="plant a bug in every job of the fault suite, which then fails")


@pytest.fixture(scope="session")
def planted(pytestconfig: pytest.Config) -> Callable[[], None] | None:
    """The bug that `--mutate` names."""
    from tests.faults.mutations import MUTATIONS

    name = pytestconfig.getoption("--mutate", None)
    if name is None:
        return None
    if name not in MUTATIONS:
        raise pytest.UsageError(f"--mutate: there is no bug {name!r}; there are {', '.join(MUTATIONS)}")
    return MUTATIONS[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A text and what undisturbed runs on it look like."""
    assert launch  # imported first: it prepares the process that all jobs are forked from
    from tests.faults import cases, job
    from tests.faults.tracer import Refused

    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip(
            f"faults are injected by ptrace on Linux and x86-64, and this is {sys.platform} on {platform.machine()}"
        )
    directory = tmp_path_factory.mktemp("faults")
    data = job.write_text(directory / "text")
    undisturbed = {}
    for ranks in (1, 2):
        settings = {"save": None, "load": None, "save_interval": None}
        run = job.Job(directory / f"undisturbed-{ranks}", data, 6, ranks, settings, with_digests=True)
        ran = _allowed(lambda run=run: job.run(run), Refused)
        assert all(ended is not None and ended.error is None for ended in ran.ranks), ran.output
        undisturbed[ranks] = [ended.by_iteration for ended in ran.ranks]
    return cases.World(data, undisturbed)


def _allowed(work: Callable[[], Any], refused: type[Exception]) -> Any:
    from tests.faults import cases

    def attempt() -> Any:
        try:
            return work()
        except refused as error:
            return str(error)

    found = cases.in_process(attempt)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def seeds(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save directories to begin with: see `tests.faults.situations`."""
    from tests.faults.situations import make_seeds

    directory = tmp_path_factory.mktemp("seeds")
    make_seeds(directory, world)
    return directory
