"""What commands print: tables and lines for people, one object for programs, and nothing that was not asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from bridge.training.object_url import ObjectUrl, is_url

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SPANS = ((365 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Output:
    """Where a command's results go."""

    as_json: bool = False
    """Print one JSON object, and nothing else, on standard output."""
    is_quiet: bool = False
    """Leave out progress and hints."""

    @property
    def is_terminal(self) -> bool:
        """Whether somebody is looking."""
        return sys.stdout.isatty()

    def line(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json:
            print(text)

    def hint(self, text: str) -> None:
        """A line that helps and is not part of the result."""
        if not self.is_quiet:
            self.line(text)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Set[str] = frozenset(),
        spare: Sequence[str] = (),
    ) -> None:
        """A table: with colours on a terminal, aligned by spaces and cut nowhere otherwise.

        Args:
            columns: headings.
            rows: cells, as many in each as there are columns.
            right: headings of the columns that are aligned at their right.
            spare: headings of columns that a narrow terminal does without, in the order in which they go.
        """
        if self.as_json:
            return
        if self.is_terminal:
            _print_rich(columns, rows, right, spare)
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (
                cell.rjust(width) if name in right else cell.ljust(width)
                for cell, width, name in zip(row, widths, columns, strict=True)
            )
            print("  ".join(cells).rstrip())

    def result(self, value: Any) -> None:
        """The one object, if it is wanted."""
        if self.as_json:
            print(json.dumps(plain(value), indent=1, allow_nan=False))


def fitting(columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], width: int) -> list[int]:
    """The columns that a table in so many characters has, by number: `spare` ones go until the rest has room."""
    widths = {name: max(map(len, cells)) for name, cells in zip(columns, zip(columns, *rows, strict=True), strict=True)}
    gone: set[str] = set()
    for name in spare:
        if sum(widths[left] + 2 for left in columns if left not in gone) <= width + 2:
            break
        gone.add(name)
    return [number for number, name in enumerate(columns) if name not in gone]


def _print_rich(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Set[str], spare: Sequence[str] = ()
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    console = Console(file=sys.stdout)
    shown = fitting(columns, rows, spare, console.width)
    for name in (columns[number] for number in shown):
        is_short = bool(spare) and name != columns[-1]
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=is_short)
    for row in rows:
        table.add_row(*(Text(row[number]) for number in shown))
    console.print(table)


def json_option(command: F) -> F:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="print one JSON object")(command)


def output_options(command: F) -> F:
    """Adds `--json` and `--quiet`, which a command takes as `as_json` and `quiet`."""
    option = click.option("--quiet", is_flag=True, help="no progress and no hints")
    return json_option(option(command))


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, paths as text, numbers that are not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Set):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def size_text(size: int | None) -> str:
    """Bytes as people read them: `12.3 MiB`."""
    if size is None:
        return "-"
    if size < 1024:
        return f"{size} B"
    exponent = min(len(_UNITS), (size.bit_length() - 1) // 10)
    return f"{size / 1024**exponent:.1f} {_UNITS[exponent - 1]}"


def age_text(created: float | None, now: float | None = None) -> str:
    """How long ago: `3 h`. `created` is Unix time in seconds."""
    if created is None:
        return "-"
    return duration_text(max(0.0, (time.time() if now is None else now) - created))


def duration_text(seconds: float) -> str:
    """A span of time in its largest unit: `3 h`."""
    for length, unit in _SPANS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def count_text(count: int, noun: str, many: str = "") -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


COPY_FIRST = "copy it to a directory, as with: aws s3 sync {url} DIR"
"""What to do about a place in object storage where only a directory will do."""


UPLOAD_AFTERWARDS = "name a directory, and copy it afterwards, as with: aws s3 sync DIR {url}"
"""The same, where something is to be written."""


def directory_argument(
    name: str = "directory", metavar: str = "DIR", *, otherwise: str = COPY_FIRST
) -> Callable[[F], F]:
    """An argument that names a directory; `~` is expanded. It need not exist: the command says what is missing.

    Args:
        name: the parameter that takes it, a Path.
        metavar: what the help calls it.
        otherwise: what to do with a place in object storage, `{url}`, which is refused.
    """

    def expanded(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
        if value is None:
            return None
        if is_url(value):  # as a path it would lose one of its slashes, and lead nowhere
            raise click.BadParameter(
                f"{value} is a place in object storage, and {context.command.name} works with directories: "
                f"{otherwise.format(url=value)}",
                context,
                parameter,
            )
        return Path(value).expanduser()

    return click.argument(name, metavar=metavar, type=click.Path(), callback=expanded)


def place_argument(name: str = "directory", metavar: str = "DIR") -> Callable[[F], F]:
    """An argument that names a directory, as `directory_argument`, or a place in object storage.

    Args:
        name: the parameter that takes it, a Path or an ObjectUrl.
        metavar: what the help calls it.
    """
    return click.argument(name, metavar=metavar, type=click.Path(), callback=_place)


def _place(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | ObjectUrl | None:
    if value is None or not is_url(value):
        return None if value is None else Path(value).expanduser()
    try:
        return ObjectUrl.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"a URL {error}.", context, parameter) from None  # it may hold credentials


safe_global_option = click.option(
    "--safe-global",
    "safe_globals",
    metavar="CLASS",
    multiple=True,
    help="module.Class of the run's checkpoint.safe_globals; may be given several times",
)

sure_option = click.option(
    "--no-run-saves-here",
    "is_sure",
    is_flag=True,
    help="go on where nobody can say whether a run saves, as without locks: you know that none does",
)


class PositiveFloat(click.ParamType[float]):
    """A number above 0 that is finite: neither `nan` nor `inf`, which compare in unexpected ways."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not math.isfinite(number) or number <= 0:
            self.fail(f"{value} is not a finite number above 0.", param, ctx)
        return number
