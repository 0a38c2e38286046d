"""Signals are remembered while they are caught, and the handlers given back."""

from __future__ import annotations

import os
import signal

from bridge.training.signals import CaughtSignals


def test_signals_are_remembered_until_they_are_forgotten() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with CaughtSignals(["SIGTERM", "SIGUSR1"]) as caught:
        assert not caught.received("SIGTERM") and not caught.received("SIGUSR1")
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert caught.received("SIGUSR1") and not caught.received("SIGTERM")
        caught.forget("SIGUSR1")
        caught.forget("SIGTERM")
        assert not caught.received("SIGUSR1")
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught.received("SIGTERM")
    assert {number: signal.getsignal(number) for number in before} == before


def test_other_signals_are_left_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with CaughtSignals([]):
        assert {number: signal.getsignal(number) for number in before} == before
