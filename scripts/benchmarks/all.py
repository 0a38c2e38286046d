"""All benchmarks of the goals, one after the other: `make bench`.

    .venv/bin/python -m scripts.benchmarks.all [--small] [--parts load,save] [--directory DIR]
        [--json docs/benchmarks.json] [--markdown docs/benchmarks.md] [--picture docs/images/benchmarks.svg] [--again]

Each part is a program of this directory in a process of its own. What they have measured goes into one JSON file; the
part of the page between its two marks, and the picture, are made of that. With `--small`, everything is tiny, takes a
few minutes, and says whether the parts work, not how fast anything is; it writes to `build/benchmarks`.

A part during which other programs keep more than a seventh of a processor busy counts as noisy, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks import _goals, _machine, _page

ROOT = Path(__file__).resolve().parents[2]
PART_SECONDS = 1800.0


@dataclass(frozen=True)
class Part:
    """One program and its arguments."""

    full: str
    small: str
    takes_directory: bool = True


PARTS = {
    "load": Part("--rounds 3", "--large 2x1MiB --small 40x1KiB --rounds 1"),
    "save": Part("--rounds 2", "--large 2x1MiB --small 40x1KiB --rounds 1"),
    "training": Part(
        "--layers 8 --rounds 5 --saves 100 --peer-saves 4",
        "--layers 2 --hidden-size 64 --rounds 1 --warm-up 0 --saves 2 --peer-saves 2",
    ),
    "gpt": Part("--layers 4 --rounds 3", "--layers 2 --hidden-size 64 --rounds 1 --warm-up 0 --ranks 2"),
    "resharding": Part("--rounds 5", "--large 2x1MiB --layers 2 --hidden-size 128 --rounds 1"),
    "checksums": Part("--rounds 5", "--mib 8 --rounds 1"),
    "repeat_save": Part("--tensors 20000 --ranks 1 --saves 5", "--tensors 100 --ranks 1 --saves 3", False),
    "scale": Part("--ranks 1024 --tensors 1000", "--ranks 64 --tensors 8", False),
    "start": Part("--rounds 5", "--rounds 1", False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write what they have measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS), help="the others stay as they are in the JSON file")
    parser.add_argument("--directory", type=Path, help="where the files go for the time; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--again", action="store_true", help="measure nothing; make the page of the JSON file again")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    small = ROOT / "build" / "benchmarks"
    results = options.json or (small / "results.json" if options.small else ROOT / "docs" / "benchmarks.json")
    page = options.markdown or (small / "benchmarks.md" if options.small else ROOT / "docs" / "benchmarks.md")
    picture = options.picture or (
        small / "benchmarks.svg" if options.small else ROOT / "docs" / "images" / "benchmarks.svg"
    )
    report: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"parts": {}}
    for path in (results, page, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    failed = [] if options.again else _run_parts(parts, options, report, results)
    results.write_text(json.dumps(report, indent=1) + "\n")
    goals = _goals.goals_of(report["parts"])
    page.write_text(_page.filled(page.read_text() if page.exists() else "", _page.markdown(report, goals)))
    picture.write_text(_page.picture(_page.bars_of(report["parts"])))
    print(_page.markdown(report, goals))
    for name in failed:
        print(f"{name} has failed", file=sys.stderr)
    return 1 if failed else 0


def _run_parts(parts: Sequence[str], options: argparse.Namespace, report: dict[str, Any], results: Path) -> list[str]:
    """Run parts, put into the report what they measure, and keep it after each; those that failed."""
    failed = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        report["machine"] = _machine.describe(Path(directory))
        report["small"] = options.small
        for name in parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            measured = _run_part(name, Path(directory), options.small)
            if measured is None:
                failed.append(name)
            else:
                report["parts"][name] = measured
                results.write_text(json.dumps(report, indent=1) + "\n")
    return failed


def _run_part(name: str, directory: Path, small: bool) -> dict[str, Any] | None:
    part, out, log = PARTS[name], directory / f"{name}.json", directory / f"{name}.log"
    command = [sys.executable, "-W", "ignore", "-m", f"scripts.benchmarks.{name}", "--json", str(out)]
    command += (part.small if small else part.full).split()
    if part.takes_directory:
        command += ["--directory", str(directory)]
    load, busy, begun = os.getloadavg()[0], _machine.Busy.now(), time.monotonic()
    # Into a file: a process that a library leaves running may keep a pipe open.
    with log.open("wb") as stream:
        try:
            code = subprocess.run(command, stdout=stream, stderr=stream, cwd=ROOT, timeout=PART_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.monotonic() - begun
    if code != 0:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        return None
    others = _machine.Busy.now().others_since(busy, seconds)
    return {
        "seconds": seconds,
        "load before": load,
        "busy with others": others,
        "noisy": others > _machine.QUIET,
        "report": json.loads(out.read_text()),
    }


if __name__ == "__main__":
    sys.exit(main())
