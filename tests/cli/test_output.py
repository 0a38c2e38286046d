"""What commands print: plain where nobody looks, and the same words on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from bridge.cli.application import one_line
from bridge.cli.ls import layout_text
from bridge.cli.output import Output, age_text, count_text, fitting, plain, size_text
from bridge.training.checkpointing.parallel import Layout

COLUMNS = ("NAME", "SIZE")
ROWS = [("a", "1 B"), ("a longer name than the terminal is wide " * 4, "20.5 MiB")]


class Terminal(io.StringIO):
    """Somebody is looking."""

    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO, output: Output) -> str:
    with contextlib.redirect_stdout(stream):
        output.table(COLUMNS, ROWS, frozenset({"SIZE"}))
        output.hint("a hint")
        output.result({"rows": len(ROWS)})
    return stream.getvalue()


def test_a_table_is_aligned_and_never_cut() -> None:
    header, first, second, hint = printed(io.StringIO(), Output()).splitlines()
    assert header.split() == ["NAME", "SIZE"]
    assert len(header) == len(first) == len(second)
    assert first.endswith("      1 B")
    assert second == f"{ROWS[1][0]}  20.5 MiB"
    assert hint == "a hint"


def test_a_terminal_gets_the_same_words() -> None:
    shown = printed(Terminal(), Output())
    assert "".join(ROWS[1][0].split()) in "".join(shown.replace("20.5 MiB", "").split())
    assert "20.5 MiB" in shown


def test_a_narrow_terminal_does_without_some_columns() -> None:
    columns, rows = ("NAME", "LAYOUT", "FILES", "STATE"), [("iter_0000002", "TP2 PP10 DP16", "12", "committed")]
    spare = ("LAYOUT", "FILES")
    whole = len("iter_0000002  TP2 PP10 DP16  FILES  committed")
    assert fitting(columns, rows, spare, whole) == [0, 1, 2, 3]
    assert fitting(columns, rows, spare, whole - 1) == [0, 2, 3]
    assert fitting(columns, rows, spare, 20) == [0, 3]
    assert fitting(columns, rows, (), 20) == [0, 1, 2, 3]


def test_json_is_alone_and_quiet_has_no_hints() -> None:
    assert json.loads(printed(io.StringIO(), Output(as_json=True))) == {"rows": 2}
    assert "a hint" not in printed(io.StringIO(), Output(is_quiet=True))


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes(size: int | None, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (90_000, "1 d"), (4e7, "1 y")]
)
def test_ages(seconds: float, text: str) -> None:
    assert age_text(1000.0, 1000.0 + seconds) == text
    assert age_text(None) == "-"


def test_words() -> None:
    assert (count_text(1, "file"), count_text(2000, "file")) == ("1 file", "2,000 files")
    assert layout_text(Layout(tensor=2, data=16, pipeline=10)) == "TP2 PP10 DP16"
    assert layout_text(Layout()) == "-"
    assert one_line("one thing") == "one thing"
    assert one_line("2 problems:\n  - this\n  - that\n") == "2 problems: this; that"


def test_values_that_json_has_no_form_for() -> None:
    assert plain({"a": Path("b"), 1: (float("nan"), 2.0, {3})}) == {"a": "b", "1": [None, 2.0, [3]]}
