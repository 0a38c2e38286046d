"""The page of the report: what is shown, as HTML that needs nothing but itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from bridge.training.checkpointing.events.report import charts, scales
from bridge.training.checkpointing.events.report.assets import SCRIPT, STYLE
from bridge.training.checkpointing.events.report.view import LoadRow, SaveRow, Totals, Trouble, View

ROWS = 1000
"""Rows of a table: its newest."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(view: View) -> str:
    """The whole page."""
    title = f"Checkpoints of {view.directory}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><div><h1>{escape(title)}</h1><p>As of {_time(view.made)} UTC. All times are UTC.</p></div>"
        '<button id="theme" type="button" hidden>Colours</button></header>\n'
        f"<main>\n{_tiles(view.totals)}\n{_body(view)}\n</main>\n{_footer(view)}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _body(view: View) -> str:
    saves = view.saves
    untimed = "No save has been timed: there are no events of saves in this directory."
    unknown = "No loss is known: there is neither a metrics file (logger.metrics_path) nor a loss in a checkpoint."
    source = ", only at saves (logger.metrics_path keeps it for every iteration)" if view.losses_are_of_saves else ""
    return "\n".join(
        [
            _section(
                "What saves cost",
                "Seconds for which training stood still, and seconds in which a save went on in the background.",
                [("stall", "training stood still"), ("background", "in the background"), ("failed", "no checkpoint")],
                "saves",
                charts.saves_chart(saves),
                untimed,
                _saves_table(saves),
            ),
            '<div class="pair">',
            _section(
                "Sizes", "Of the published checkpoints.", [], "sizes", charts.sizes_chart(saves), "No size is known."
            ),
            _section(
                "Throughput",
                "Bytes of a checkpoint by the time of its slowest rank.",
                [],
                "rates",
                charts.rates_chart(saves),
                "No save has been timed.",
            ),
            "</div>",
            _section(
                "Loss and resume points",
                f"By iteration{source}. Marks below it are checkpoints.",
                [("loss", "loss"), ("resume", "a run went on from here"), ("kept", "checkpoint that is there")],
                "loss",
                charts.loss_chart(view),
                unknown,
            ),
            _section(
                "What is kept",
                "Each checkpoint from its publication to its deletion.",
                [("kept", "is there"), ("deleted", "deleted by retention"), ("replaced", "replaced or removed since")],
                "retention",
                charts.retention_chart(saves, view.made),
                "No checkpoint has a time.",
            ),
            _section_of("Failures and fallbacks", _troubles_table(view.troubles)),
            _section_of("Starts", _loads_table(view.loads)),
        ]
    )


def _tiles(totals: Totals) -> str:
    share = "" if totals.stall_share is None else f"{scales.percent(totals.stall_share)} of the time between saves"
    newest = "none" if totals.newest is None else str(totals.newest)
    bad = totals.failed + totals.unfinished
    tiles = [
        ("Newest checkpoint", newest, f"{totals.there} are there", ""),
        ("Saves", f"{totals.published:,}", f"{scales.size(totals.total_bytes)} written", ""),
        (
            "Failed or unfinished",
            str(bad),
            f"{totals.failed} failed, {totals.unfinished} unfinished",
            "bad" * (bad > 0),
        ),
        ("Training stood still", scales.seconds(totals.stall_seconds), share, ""),
        ("Stall of a save", scales.seconds(totals.median_stall), "median", ""),
        ("Throughput", scales.rate(totals.median_rate), "median", ""),
    ]
    items = (
        f'<li class="{kind}"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<small>{escape(note) or '&nbsp;'}</small></li>"
        for name, value, note, kind in tiles
    )
    return f'<ul class="tiles" aria-label="Totals">{"".join(items)}</ul>'


def _section(
    title: str,
    text: str,
    legend: Iterable[tuple[str, str]],
    name: str,
    chart: str,
    absent: str,
    table: str = "",
) -> str:
    head = f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>'
    if not chart:
        return f'{head}<p class="empty">{escape(absent)}</p>{table}</section>'
    entries = "".join(f'<li><i class="{kind}"></i>{escape(label)}</li>' for kind, label in legend)
    listed = f'<ul class="legend" aria-label="Colours">{entries}</ul>' if entries else ""
    told = f'<output id="{name}-tip" aria-live="polite"></output>'
    return f'{head}<p>{escape(text)}</p>{listed}<div class="scroll">{chart}</div>{told}{table}</section>'


def _section_of(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _saves_table(saves: Sequence[SaveRow]) -> str:
    if not saves:
        return ""
    rows = [
        [
            _number(save.iteration),
            _cell(save.tier),
            _cell(save.status, f"status-{save.status}"),
            _cell(scales.moment(save.time), "no"),
            _number(scales.seconds(save.blocking)),
            _number(scales.seconds(save.background)),
            _number(scales.size(save.total_bytes)),
            _number(scales.rate(save.gigabytes_per_second)),
            _number(scales.percent(save.share)),
            _cell(_became_of(save)),
        ]
        for save in reversed(saves[-ROWS:])
    ]
    names = ["Iteration", "Tier", "Outcome", "Time", "Stall", "Background", "Size", "Throughput", "Share", "Now"]
    left = {"Tier", "Outcome", "Time", "Now"}
    head = f"<summary>All saves as a table ({len(saves)})</summary>"
    return f"<details>{head}{_table(names, rows, left, 'All saves, the newest first')}</details>"


def _became_of(save: SaveRow) -> str:
    if save.status != "published":
        return ""
    if save.deleted is not None:
        return f"deleted {scales.moment(save.deleted)}"
    if save.tier != "persistent":
        return ""
    return "is there" if save.is_there else "is gone"


def _troubles_table(troubles: Sequence[Trouble]) -> str:
    if not troubles:
        return '<p class="empty">There are none.</p>'
    rows = [
        [
            _cell(scales.moment(trouble.time), "no"),
            _cell(trouble.what, "what no"),
            _number("-" if trouble.iteration is None else trouble.iteration),
            _cell(trouble.text, "path"),
        ]
        for trouble in reversed(troubles[-ROWS:])
    ]
    return _table(["Time", "What", "Iteration", "Why"], rows, {"Time", "What", "Why"}, "Failures, the newest first")


def _loads_table(loads: Sequence[LoadRow]) -> str:
    if not loads:
        return '<p class="empty">No start is known.</p>'
    rows = [
        [
            _cell(scales.moment(load.time), "no"),
            _cell("from scratch" if load.path is None else load.path, "path"),
            _cell(load.reason, "path"),
            _number(scales.seconds(load.seconds) if load.path is not None else "-"),
            _cell(", ".join(f"{name} {scales.seconds(value)}" for name, value in load.phases)),
        ]
        for load in reversed(loads[-ROWS:])
    ]
    names = ["Time", "Started from", "Because", "Loading", "Phases"]
    return _table(names, rows, {"Time", "Started from", "Because", "Phases"}, "Starts, the newest first")


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], left: set[str], caption: str) -> str:
    right = ' class="right"'
    head = "".join(f'<th scope="col"{"" if name in left else right}>{escape(name)}</th>' for name in names)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}</td>"


def _number(value: object) -> str:
    return f'<td class="right no">{escape(str(value))}</td>'


def _time(value: float) -> str:
    return f"<time>{escape(scales.moment(value))}</time>"


def _footer(view: View) -> str:
    parts = ["Made by bridge-ckpt report from the file of events and the manifests of this directory."]
    if len(view.saves) > charts.BARS:
        parts.append(f"The drawings show the last {charts.BARS} saves.")
    if view.unreadable:
        parts.append(f"{view.unreadable} lines of the file of events could not be read.")
    return f"<footer>{escape(' '.join(parts))}</footer>"
