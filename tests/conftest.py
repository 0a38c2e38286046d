"""The table of the faults that were tried, whichever process tried them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.summary import Summary

_SUMMARY = pytest.StashKey[Summary]()


@pytest.fixture(scope="session")
def summary(pytestconfig: pytest.Config) -> Summary:
    """Counts what is tried."""
    return pytestconfig.stash.setdefault(_SUMMARY, Summary())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what it has counted."""
    if hasattr(session.config, "workeroutput") and _SUMMARY in session.config.stash:
        session.config.workeroutput["faults"] = session.config.stash[_SUMMARY].to_plain()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker has counted."""
    counted = getattr(node, "workeroutput", {}).get("faults")
    if counted is not None:
        node.config.stash.setdefault(_SUMMARY, Summary()).take(counted)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[_SUMMARY].lines() if _SUMMARY in config.stash else []
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)
