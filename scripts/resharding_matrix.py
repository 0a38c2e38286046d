"""Run every cell of the resharding matrix and write its tables into docs/resharding.md. Takes some 20 minutes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Write the tables, or with --check say whether they are up to date; 1 if they are not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page says something else")
    arguments = parser.parse_args()

    from tests.training.resharding import BEGIN, DOCUMENT, END, generate

    with tempfile.TemporaryDirectory(prefix="resharding-") as directory:
        tables = generate(Path(directory))
    page = DOCUMENT.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    updated = f"{before}{BEGIN}\n{tables}\n{END}{after}"
    if arguments.check:
        return int(page != updated)
    DOCUMENT.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
