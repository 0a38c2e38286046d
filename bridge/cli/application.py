"""The commands together, and how each of them ends: one line for an error, and the exit status."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from bridge.cli import (
    average,
    convert,
    diff,
    doctor,
    estimate,
    export,
    inspect,
    ls,
    memory,
    prune,
    repair,
    report,
    rescue,
    verify,
)
from bridge.training.logs import configure_logging, quiet_library_warnings

COMMANDS: tuple[click.Command, ...] = (
    ls.command,
    verify.command,
    doctor.command,
    inspect.command,
    diff.command,
    estimate.command,
    repair.command,
    prune.command,
    convert.command,
    export.command,
    average.command,
    rescue.command,
    memory.command,
    report.command,
)
"""In the order in which `--help` shows them. To add one, add it here."""

PROGRAM = "bridge-ckpt"
INTERRUPTED = 130


class _InOrder(click.Group):
    """Lists commands as they were added: click would sort them by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    PROGRAM,
    cls=_InOrder,
    help="Look at checkpoints, check them and work with them, from a shell.\n\n"
    "Which checkpoint will a run resume from? ls. Is it sound? verify. Why does a run not resume? doctor.",
    context_settings={"help_option_names": ["--help"], "max_content_width": 110},
)
def application() -> None:
    """The group of all commands."""


for _command in COMMANDS:
    application.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the arguments and the result are those of `main.main`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be in the encoding of the terminal
            stream.reconfigure(errors="backslashreplace")
    configure_logging("WARNING", rank=0, world_size=1)
    quiet_library_warnings()
    try:
        given = None if arguments is None else list(arguments)
        status = application.main(given, PROGRAM, standalone_mode=False)
    except click.UsageError as error:
        command = PROGRAM if error.ctx is None else error.ctx.command_path
        return _fail(f"{error.format_message()} See: {command} --help", status=2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", status=INTERRUPTED)
    except OSError as error:
        return _fail(_of_system(error))
    except Exception as error:
        # What is not ours is not foreseen: its traceback is what helps.
        if not type(error).__module__.startswith("bridge."):
            raise
        return _fail(str(error))
    return status if isinstance(status, int) else 0


def parse(arguments: Sequence[str]) -> None:
    """Check a command line without carrying it out.

    Raises:
        click.UsageError: it is wrong.
    """
    name, command, rest = application.resolve_command(click.Context(application), list(arguments))
    if command is not None:
        command.make_context(name, rest)


def _fail(message: str, status: int = 1) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """A message without its line breaks: what it lists stands one after the other."""
    first, *rest = [part.strip() for part in message.splitlines() if part.strip()] or [""]
    listed = "; ".join(part.removeprefix("- ") for part in rest)
    return f"{first}{' ' if first.endswith(':') else '; '}{listed}" if listed else first


def _of_system(error: OSError) -> str:
    """An error of the operating system or of ours, which some are both."""
    if type(error).__module__.startswith("bridge.") or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; check the path, and whether it may be read and written"
