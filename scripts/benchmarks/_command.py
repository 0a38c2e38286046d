"""What the commands of the larger benchmarks have in common: options, and a report as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def command(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options `--json` and `--markdown`, to which a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    return parser


def add_directory(parser: argparse.ArgumentParser) -> None:
    """`--directory`, for a benchmark that writes files."""
    parser.add_argument("--directory", type=Path, help="where the files go for the time; a temporary one by default")


def hand_out(report: dict[str, Any], table: str, options: argparse.Namespace) -> None:
    """Print the tables, and write what is asked for."""
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(table)
    print(table)
