"""What is shown of long work: on a terminal, elsewhere, and when nothing is to be shown."""

from __future__ import annotations

import io
import sys

import pytest

from bridge.training.progress import Progress, bar_line, duration, progress_line

GIB = 2**30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def show(stream: io.StringIO, quiet: bool = False, unit: str = "bytes") -> str:
    """A minute of work, reported every tenth of a second."""
    clock = Clock()
    with Progress(stream, quiet=quiet, unit=unit, clock=clock) as progress:
        for tenth in range(600):
            clock.now = 100 + tenth / 10
            progress("reading", tenth * GIB // 100, 6 * GIB)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("converting", 0, 4 * GIB, 0.0), "converting 0.00 of 4.00 GiB"),
        (("comparing", GIB, 4 * GIB, 30.0), "comparing 1.00 of 4.00 GiB, 34 MiB/s, 1:30 left"),
        (("reading", 3 << 20, 12 << 20, 1.0), "reading 3.0 of 12.0 MiB, 3 MiB/s, 0:03 left"),
        (("reading", 30 << 20, 12 << 20, 1.0), "reading 30.0 of 12.0 MiB, 30 MiB/s, 0:00 left"),
        (("reading", 3 << 20, 0, 1.0), "reading 3.0 MiB, 3 MiB/s"),
        (("verifying", 3, 12, 1.0, "files"), "verifying 3 of 12 files, 3.0 files/s, 0:03 left"),
    ],
)
def test_a_line_says_how_far_how_fast_and_how_long(arguments: tuple[str, int, int, float], line: str) -> None:
    assert progress_line(*arguments) == line


def test_a_bar_fits_into_its_width_or_is_left_out() -> None:
    bar = "reading [######------------------]  25 % 1.00 of 4.00 GiB, 1024 MiB/s, 0:03 left"
    assert bar_line("reading", GIB, 4 * GIB, 1.0, 80) == bar
    assert bar_line("reading", GIB, 4 * GIB, 1.0, 60) == "reading 1.00 of 4.00 GiB, 1024 MiB/s, 0:03 left"
    assert bar_line("reading", GIB, 4 * GIB, 1.0, 7) == "reading"
    assert "[########################] 100 %" in bar_line("reading", 5 * GIB, 4 * GIB, 1.0, 80)


@pytest.mark.parametrize(("seconds", "shown"), [(0.9, "0:00"), (61, "1:01"), (3600, "1:00:00"), (36_061, "10:01:01")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_terminal_sees_a_bar_that_is_drawn_over_itself_and_taken_away() -> None:
    shown = show(Terminal())
    assert "\n" not in shown
    drawings = shown.split("\r\x1b[K")
    assert drawings[-1] == "" and drawings[0] == ""
    assert 250 < len(drawings) < 310
    assert all(drawing.startswith("reading ") for drawing in drawings[1:-1])


def test_elsewhere_a_line_comes_now_and_then() -> None:
    assert show(io.StringIO()).splitlines() == [
        "reading 1.00 of 6.00 GiB, 102 MiB/s, 0:50 left",
        "reading 4.00 of 6.00 GiB, 102 MiB/s, 0:20 left",
    ]


def test_quiet_shows_nothing_and_short_work_shows_nothing() -> None:
    assert show(Terminal(), quiet=True) == ""
    stream = Terminal()
    with Progress(stream) as progress:
        progress("reading", 1, 2)
    assert stream.getvalue() == ""


def test_each_step_begins_anew() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock=clock)
    for step in ("reading", "comparing"):
        progress(step, 0, 2 * GIB)
        clock.now += 10
        progress(step, GIB, 2 * GIB)
    assert stream.getvalue().splitlines() == [
        f"{step} 1.00 of 2.00 GiB, 102 MiB/s, 0:10 left" for step in ("reading", "comparing")
    ]


def test_nobody_to_show_it_to_is_no_error() -> None:
    show(Closed())


class Tee:
    """Stands for standard error, and knows nothing of terminals."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Tee()], ids=["none", "closed", "without isatty"])
def test_whatever_stands_for_standard_error_the_work_goes_on(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(), []
    monkeypatch.setattr(sys, "stderr", stream)
    shown, logged = Progress(clock=clock), Progress(say=said.append, clock=clock)
    for seconds in (0, 20):
        clock.now = 100.0 + seconds
        shown("reading", seconds, 100)
        logged("reading", seconds, 100)
    shown.clear()
    assert said == ["reading 0.0 of 0.0 MiB, 0 MiB/s, 1:20 left"]
    assert not isinstance(stream, Tee) or stream.text == said[0] + "\n"
