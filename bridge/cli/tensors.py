"""Options that the commands which read and write tensors have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bridge.cli.output import PositiveFloat

if TYPE_CHECKING:
    from bridge.training.checkpointing.export.exporting import Options

F = TypeVar("F", bound=Callable[..., Any])

_MOST = 1 << 62
"""Bytes; what is more is no limit."""
WRITTEN = ("dtype", "hf_layout", "include", "shard_gb")
"""The parameters that are about safetensors files alone."""


@dataclass(frozen=True)
class Written:
    """How tensors are to be written, as it was asked for."""

    dtype: str | None
    hf_layout: bool
    include: tuple[str, ...]
    shard_gb: float
    force: bool

    def options(self) -> Options:
        """The same for the code that writes them, which takes long to import."""
        from bridge.training.checkpointing.export.exporting import Options

        return Options(self.dtype, self.hf_layout, self.include, bytes_of(self.shard_gb, 10**9), self.force)


def bytes_of(number: float, unit: int) -> int:
    """An amount in bytes. One that no memory and no storage has is the most that can be counted."""
    return int(min(number * unit, _MOST))


def export_options(command: F) -> F:
    """Adds the options that say how tensors are written; the command gets them as `written`."""

    @functools.wraps(command)
    def with_written(
        *arguments: Any,
        dtype: str | None,
        hf_layout: bool,
        include: tuple[str, ...],
        shard_gb: float,
        force: bool,
        **others: Any,
    ) -> Any:
        return command(*arguments, written=Written(dtype, hf_layout, include, shard_gb, force), **others)

    options = (
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="of all floating-point values (default: as they are stored)",
        ),
        click.option(
            "--hf-layout",
            is_flag=True,
            help="names, shapes and config.json as Hugging Face's transformers has them, with the tokenizer's files",
        ),
        click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="keys to write, as in '*.weight', instead of the model's; may be given several times",
        ),
        click.option(
            "--shard-gb",
            type=PositiveFloat(),
            default=5.0,
            metavar="GB",
            help="10^9 bytes of values in a file; more go into several files with an index (default: 5)",
        ),
        click.option("--force", is_flag=True, help="replace what an earlier command has written to DST"),
    )
    wrapped: Any = with_written
    for option in reversed(options):
        wrapped = option(wrapped)
    found: F = wrapped
    return found


def memory_option(default: float = 1.0, help_text: str = "what is held at most") -> Callable[[F], F]:
    """Adds `--memory-gib`; the command gets it as `memory`, in bytes."""
    return click.option(
        "--memory-gib",
        "memory",
        type=PositiveFloat(),
        default=default,
        metavar="GIB",
        callback=lambda context, parameter, value: bytes_of(value, 2**30),
        help=f"{help_text} (default: {default:g})",
    )


def verify_option(command: F) -> F:
    """Adds `--no-verify`."""
    option = click.option("--verify/--no-verify", default=True, help="check the files of SRC first (default: yes)")
    return option(command)
