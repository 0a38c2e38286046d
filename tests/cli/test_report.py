"""The report: what it shows, by exact values; and that a browser shows it, without a network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bridge.cli.report import Reported, report
from bridge.training.checkpointing.errors import CheckpointNotFoundError
from bridge.training.checkpointing.events.file import EventFile
from bridge.training.checkpointing.events.kinds import (
    CheckpointDeleted,
    CheckpointLoaded,
    Event,
    FellBack,
    LoadResolved,
    RunStarted,
    SaveFailed,
    SaveStarted,
)
from bridge.training.checkpointing.events.report import charts, scales
from bridge.training.checkpointing.events.report.gathering import read_losses
from bridge.training.checkpointing.events.report.page import render
from bridge.training.checkpointing.events.report.view import (
    Found,
    LoadRow,
    LossPoint,
    SaveRow,
    Totals,
    Trouble,
    build_view,
)
from bridge.training.checkpointing.layout import EVENTS
from tests.cli.test_rescue import bridge_ckpt
from tests.training.checkpointing.events.samples import COMMON, committed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MADE = 2000.0


EVENTS_OF_A_RUN: list[Event] = [
    LoadResolved(time=1000.0, reason="there is no checkpoint in run"),
    RunStarted(time=1001.0, iteration=0, world_size=8),
    SaveStarted(time=1050.0, iteration=1, **COMMON),
    committed(1, 1060.0, since_seconds=None),
    SaveStarted(time=1100.0, iteration=2, **COMMON),
    committed(2, 1110.0),
    CheckpointDeleted(time=1111.0, iteration=1, tier="persistent", path="run/iter_0000001"),
    SaveStarted(time=1150.0, iteration=3, **COMMON),
    SaveFailed(time=1155.0, iteration=3, **COMMON, blocking_seconds=1.0, error="CheckpointSaveError", message="<full>"),
    SaveStarted(time=1200.0, iteration=4, **COMMON),
    LoadResolved(time=1300.0, iteration=3, path="run/iter_0000003", reason="it is the newest"),
    FellBack(time=1301.0, iteration=3, path="run/iter_0000003", to="run/iter_0000002", message="3 is damaged"),
    CheckpointLoaded(time=1310.0, iteration=2, path="run/iter_0000002", blocking_seconds=9.0, phases={"reading": 9.0}),
    RunStarted(time=1311.0, iteration=2, world_size=8),
    SaveStarted(time=1400.0, iteration=3, **COMMON),
    committed(3, 1410.0, blocking_seconds=4.0),
]
FOUND = [
    Found(2, "run/iter_0000002", 1110.0, 3_000_000_000, "torch_dist", 3.8),
    Found(3, "run/iter_0000003", 1410.0, 3_000_000_000, "torch_dist", 3.7),
    Found(9, "run/iter_0000009", 500.0, 7, "zarr", None),
]
VIEW = build_view("run & <co>", EVENTS_OF_A_RUN, FOUND, made=MADE)


def row(iteration: int, time: float, **values: Any) -> SaveRow:
    given = {
        "path": f"run/iter_{iteration:07d}",
        "total_bytes": 3_000_000_000,
        "blocking": 2.0,
        "background": 8.0,
        "since": 50.0,
        "gigabytes_per_second": 0.5,
        **values,
    }
    return SaveRow(time, iteration, "persistent", "published", checkpoint_format="torch_dist", **given)


def test_every_save_is_a_row_whatever_became_of_it() -> None:
    assert VIEW.saves == (
        SaveRow(
            500.0, 9, "persistent", "published", "run/iter_0000009", "zarr", total_bytes=7, is_there=True
        ),  # no event tells of it
        row(1, 1060.0, since=None, deleted=1111.0),
        row(2, 1110.0, is_there=True),
        SaveRow(
            1155.0,
            3,
            "persistent",
            "failed",
            checkpoint_format="torch_dist",
            blocking=1.0,
            error="CheckpointSaveError: <full>",
        ),
        SaveRow(1200.0, 4, "persistent", "unfinished", checkpoint_format="torch_dist"),
        row(3, 1410.0, blocking=4.0, is_there=True),
    )
    assert VIEW.totals == Totals(
        published=4,
        failed=1,
        unfinished=1,
        there=3,
        total_bytes=9_000_000_007,
        stall_seconds=8.0,
        median_stall=2.0,
        stall_share=0.06,
        median_rate=0.5,
        newest=9,
    )


def test_starts_and_troubles() -> None:
    assert VIEW.loads == (
        LoadRow(1000.0, None, None, "there is no checkpoint in run"),
        LoadRow(1300.0, 3, "run/iter_0000003", "it is the newest"),
        LoadRow(1301.0, 2, "run/iter_0000002", "run/iter_0000003 could not be loaded", 9.0, (("reading", 9.0),)),
    )
    unknown = "it began, and neither its end nor its failure is known: the run was killed, or is at it"
    assert VIEW.troubles == (
        Trouble(1155.0, 3, "save failed", "CheckpointSaveError: <full>"),
        Trouble(1200.0, 4, "save unfinished", unknown),
        Trouble(1301.0, 3, "fell back", "3 is damaged (went back to run/iter_0000002)"),
    )
    assert VIEW.resumes == (2,)


def test_losses_are_those_at_saves_or_those_of_every_iteration() -> None:
    assert VIEW.losses_are_of_saves
    assert VIEW.losses == (tuple(LossPoint(i, 4.0 - i / 10) for i in (1, 2, 3)),)
    points = [LossPoint(1, 4.0), LossPoint(2, 3.0), LossPoint(3, float("nan")), LossPoint(2, 2.9), LossPoint(3, 2.8)]
    view = build_view("run", EVENTS_OF_A_RUN, FOUND, points, made=MADE)
    assert not view.losses_are_of_saves
    assert view.losses == (tuple(points[:2]), tuple(points[3:]))
    manifests = build_view("run", [], FOUND, made=MADE)
    assert manifests.losses == ((LossPoint(2, 3.8), LossPoint(3, 3.7)),)
    assert build_view("run", [], [], made=MADE).losses == ()


def test_a_long_curve_keeps_its_spikes_and_its_ends() -> None:
    points = [LossPoint(i, 1000.0 if i == 50_001 else float(i % 7)) for i in range(1, 100_001)]
    (piece,) = build_view("run", [], [], points, made=MADE).losses
    assert 1000 < len(piece) <= 1502
    assert points[50_000] in piece
    assert (piece[0].iteration, piece[-1].iteration) == (1, 100_000)


def test_a_save_again_under_the_same_name_is_another_row() -> None:
    again = [committed(5, 10.0), committed(5, 20.0)]
    found = [Found(5, "run/iter_0000005", 20.0, 1, "torch_dist", None)]
    assert [(r.time, r.is_there) for r in build_view("run", again, found, made=MADE).saves] == [
        (10.0, False),
        (20.0, True),
    ]


class Page(HTMLParser):
    """What a page holds, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "circle", "line", "path", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "circle", "line", "path", "polyline"):
            return
        assert self.open.pop() == tag

    def tips(self) -> list[str]:
        return [attributes["data-tip"] or "" for _, attributes in self.tags if "data-tip" in attributes]


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    text = render(VIEW)
    page = Page(text)
    assert page.open == []
    assert "<full>" not in text and "&lt;full&gt;" in text
    assert "<co>" not in text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [a for _, a in page.tags if {"src", "href", "xlink:href", "action"} & a.keys()]
    assert "url(" not in text and "@import" not in text
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    labelled = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert labelled <= set(identities)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [drawing["id"] for drawing in drawings] == ["saves", "sizes", "rates", "loss", "retention"]
    assert all(d["role"] == "img" and d["tabindex"] == "0" and d["aria-label"] for d in drawings)


def test_the_drawings_say_what_they_show() -> None:
    tips = Page(charts.saves_chart(VIEW.saves)).tips()
    assert tips == [
        "iteration 1 (persistent), 1970-01-01 00:17:40, stall 2.00 s, background 8.00 s, 2.8 GiB, 0.50 GB/s",
        "iteration 2 (persistent), 1970-01-01 00:18:30, stall 2.00 s, background 8.00 s, 2.8 GiB, 0.50 GB/s, 4.00 % "
        "of the time since the save before",
        "iteration 3 (persistent), FAILED, 1970-01-01 00:19:15, stall 1.00 s, background -",
        "iteration 4 (persistent), UNFINISHED, 1970-01-01 00:20:00, stall -, background -",
        "iteration 3 (persistent), 1970-01-01 00:23:30, stall 4.00 s, background 8.00 s, 2.8 GiB, 0.50 GB/s, 8.00 % "
        "of the time since the save before",
    ]
    assert Page(charts.retention_chart(VIEW.saves, MADE)).tips()[:2] == [
        "iteration 9 (persistent), published 1970-01-01 00:08:20, is there",
        "iteration 1 (persistent), published 1970-01-01 00:17:40, deleted 1970-01-01 00:18:31",
    ]
    assert "start 2: went on from iteration 2" in Page(charts.loss_chart(VIEW)).tips()


def test_bars_are_as_high_as_what_they_stand_for() -> None:
    drawing = charts.saves_chart([row(1, 1.0, blocking=3.0, background=7.0), row(2, 2.0, blocking=5.0, background=0.0)])
    bars = re.findall(r'<rect class="(\w+)" x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', drawing)
    heights = [(kind, float(height)) for kind, height in bars]
    unit = heights[0][1] / 3
    assert [(kind, round(height / unit, 1)) for kind, height in heights] == [
        ("stall", 3.0),
        ("background", 7.0),
        ("stall", 5.0),
        ("background", 0.0),
    ]


def test_without_anything_the_page_says_so() -> None:
    text = render(build_view("run", [], [], made=MADE))
    assert "<svg" not in text
    for line in ("No save has been timed", "No loss is known", "No checkpoint has a time", "No start is known"):
        assert line in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.27, [0, 0.1, 0.2]),
        (3, 3, [3]),
        (2.06, 8.2, [4, 6, 8]),
        (0, 1e9, [0, 2e8, 4e8, 6e8, 8e8, 1e9]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert scales.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (scales.number(1200), "1,200"),
        (scales.number(0.25), "0.25"),
        (scales.number(0.0004), "0.0004"),
        (scales.seconds(0.256), "0.26 s"),
        (scales.seconds(65), "1 min 5 s"),
        (scales.seconds(7380), "2 h 3 min"),
        (scales.size(1536), "1.5 KiB"),
        (scales.size(12), "12 B"),
        (scales.percent(0.0123), "1.23 %"),
        (scales.moment(0.0), "1970-01-01 00:00:00"),
        (scales.moment(1e300), "-"),
    ],
)
def test_numbers_in_words(shown: str, expected: str) -> None:
    assert shown == expected


def write_run(directory: Path) -> Path:
    directory.mkdir()
    file = EventFile(directory)
    for event in EVENTS_OF_A_RUN:
        file.take(event)
    file.close()
    with (directory / EVENTS).open("a") as stream:
        stream.write('{"event":"save_comm')
    return directory


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    output = tmp_path / "report.html"
    status, out, errors = bridge_ckpt("report", directory, "-o", output, "--json")
    assert (status, errors) == (0, "")
    assert json.loads(out) == {
        "output": str(output),
        "events": len(EVENTS_OF_A_RUN),
        "unreadable": 1,
        "saves": 5,
        "failed": 2,
        "checkpoints": 0,
        "losses": 3,
    }
    assert "1 lines of the file of events could not be read" in output.read_text()


def test_a_directory_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="has neither events nor checkpoints"):
        report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_losses_are_read_from_regular_files_and_from_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1, "loss": 2.5}\nnot json\n[]\n{"iteration": 2, "loss": "x"}\n{"iteration": 3, "lo')
    assert read_losses(file) == [LossPoint(1, 2.5)]
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        assert read_losses(tmp_path / name) == []
    assert read_losses(Path("/dev/zero")) == []


SAVED = {
    "event": "save_committed",
    "time": 1.7e9,
    "iteration": 10,
    "tier": "persistent",
    "total_bytes": 1000,
    "blocking_seconds": 1.0,
    "background_seconds": 0.0,
    "write_seconds": 1.0,
    "path": "/x/iter_0000010",
}
IMPOSSIBLE: list[dict[str, Any]] = [
    {"iteration": 10**400},
    {"iteration": 10**400, "metrics": {"loss": 1.0}},
    {"time": 1e308},
    {"time": -1e308},
    {"total_bytes": 10**400},
    {"blocking_seconds": 1e308},
    {"blocking_seconds": -5.0},
    {"metrics": {"loss": 1e308}},
    {"metrics": {"loss": -1e308}},
]
ODD: list[dict[str, Any]] = [
    {},
    {"write_seconds": 5e-324},
    {"blocking_seconds": 5e-324, "since_seconds": 5e-324},
    {"metrics": {"loss": 1e-320}},
    {"metrics": {"loss": 2e-320}},
    {"time": 1.0},
    {"time": 1.0000001},
]


def test_what_no_run_can_have_written_spoils_no_page(tmp_path: Path) -> None:
    lines = [json.dumps({**SAVED, **change}) for change in (*IMPOSSIBLE, *ODD)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f'{{"iteration": 1, "loss": 1e308}}\n{{"iteration": 1{"0" * 400}, "loss": 1}}\n')
    for path in ("/x\0y", str(metrics)):
        lines.append(json.dumps({"event": "run_started", "time": 1.0, "iteration": 1, "metrics_path": path}))
    page = tmp_path / "report.html"

    def told(told_lines: list[str]) -> tuple[int, int]:
        (tmp_path / EVENTS).write_text("\n".join(told_lines))
        reported = report(tmp_path, page, made=MADE)
        assert not re.search(r"\b(nan|inf)\b", page.read_text())
        return reported.saves, reported.unreadable

    assert told(lines) == (len(ODD), len(IMPOSSIBLE))
    for change in ODD:  # each by itself, too: what is drawn depends on what else there is
        assert told([json.dumps({**SAVED, **change})]) == (1, 0)


def test_the_losses_of_a_run_come_from_its_metrics_file(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 1, "loss": 2.5}\n{"iteration": 2, "loss": 2.25}\n')
    directory = tmp_path / "run"
    directory.mkdir()
    file = EventFile(directory)
    file.take(RunStarted(time=1.0, iteration=0, metrics_path=str(metrics)))
    file.close()
    assert report(directory, tmp_path / "report.html", made=MADE) == Reported(
        output=str(tmp_path / "report.html"), events=1, unreadable=0, saves=0, failed=0, checkpoints=0, losses=2
    )


def browse(*arguments: str, cwd: Path) -> str:
    assert CHROMIUM is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={cwd / 'profile'}"]
    done = subprocess.run([CHROMIUM, *fixed, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_pixel(png: bytes) -> tuple[int, ...]:
    """Red, green and blue of a PNG's first pixel, which no filter of a row changes."""
    at, data = 8, b""
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    return tuple(zlib.decompress(data)[1:4])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (on Debian: apt-get install chromium)")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report(write_run(tmp_path / "run"), page, made=MADE)
    dom = browse("--dump-dom", page.as_uri(), cwd=tmp_path)
    # The script has run: it shows the button and names it.
    assert re.search(r'<button id="theme" type="button">(Dark|Light) colours</button>', dom)
    assert dom.count("<svg") == 5
    assert "CheckpointSaveError: &lt;full&gt;" in dom
    assert html.unescape(dom).count("iteration 3 (persistent), FAILED") == 2  # a tip and its title
    for theme, background in (("light", (0xF6, 0xF7, 0xF9)), ("dark", (0x0F, 0x14, 0x1B))):
        (tmp_path / "theme.html").write_text(page.read_text().replace("<html", f'<html data-theme="{theme}"', 1))
        shot = tmp_path / f"{theme}.png"
        uri = (tmp_path / "theme.html").as_uri()
        browse("--window-size=1120,1400", f"--screenshot={shot}", uri, cwd=tmp_path)
        assert first_pixel(shot.read_bytes()) == background
        assert shot.stat().st_size > 30_000
