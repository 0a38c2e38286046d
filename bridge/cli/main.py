"""The entry point: what is missing is said in one line; everything else is in `application`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; None are those of the process.

    Returns:
        The exit status: 0; 1 after an error, which is one line on standard error, or where a command's answer is no;
        2 if the command line is wrong; 130 if it was interrupted.
    """
    try:
        from bridge.cli.application import run
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(
            f"error: bridge-ckpt needs the package {error.name}, which is not installed; install it with: "
            "pip install 'bridge[cli]'",
            file=sys.stderr,
        )
        return 1
    return run(arguments)
