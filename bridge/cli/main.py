"""The command line: subcommands, and errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bridge.cli import convert, memory, rescue
from bridge.training.logs import configure_logging, quiet_library_warnings

COMMANDS = (rescue, memory, convert)
"""Modules with `add_to(subparsers)`. What that adds sets the default `run`: options in, exit status out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit status: 0, or 1 after an error, which is one line on standard error. Wrong arguments end the process
        with status 2.
    """
    options = make_parser().parse_args(arguments)
    configure_logging("WARNING", rank=0, world_size=1)
    quiet_library_warnings()
    try:
        from bridge import accelerator

        accelerator.enable()
        status: int = options.run(options)
    except Exception as error:
        # What is not ours is not foreseen: its traceback is what helps.
        if not type(error).__module__.startswith("bridge."):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def make_parser() -> argparse.ArgumentParser:
    """What understands the command line; its options have `run`, which carries the command out."""
    parser = argparse.ArgumentParser(prog="bridge-ckpt", description="Work with checkpoints from a shell.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser
