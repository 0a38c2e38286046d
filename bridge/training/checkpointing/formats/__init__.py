"""How sharded state reaches disk, one module a format. `registry` finds a format by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.formats.apart import State
from bridge.training.checkpointing.formats.options import LoadOptions, SaveOptions
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.sidecar import Sidecar

if TYPE_CHECKING:
    from bridge.training.checkpointing.formats.direct import DirectWrite


@dataclass(frozen=True)
class PayloadWrite:
    """A planned write of this rank's shards. Planning is collective; what follows is not.

    `write` runs on every rank, perhaps in a background process: it is given a kind of checksum, writes and syncs this
    rank's files, and returns their records and a small result. A name in the place of a record stands for a file that
    is to be read again for its checksum. When all ranks have written, `finish` runs on rank 0
    with their results, by rank, and returns the names of the files that it added. Both may be run again after
    they have failed half-way: they begin their files anew.
    """

    write: Callable[[str], tuple[list[FileRecord | str], Any]]
    finish: Callable[[list[Any]], list[str]]
    sidecars: tuple[Sidecar, ...] = ()
    """Small files that belong to the format; this rank writes them with its others."""
    direct: DirectWrite | None = None
    """What `write` writes, where it can also be copied and written by another process."""
    seconds: float = 0.0
    """For which this rank has written already, while it planned."""
    bequest: Callable[[Any], bytes | None] | None = None
    """Makes of this rank's result what `Format.inherit` needs of it, where the files are written and nobody is left to
    call `finish`; None where the format cannot do without, or cannot yet."""


@dataclass(frozen=True)
class Loaded:
    """What a load returned."""

    state_dict: dict[str, Any]
    dropped: bool
    """Whether requested keys that the checkpoint lacks may have been left out of `state_dict`."""
    missing: frozenset[str] | None = None
    """Keys of the checkpoint that no rank requested; None where the strictness does not return them."""
    unexpected: frozenset[str] | None = None
    """Keys that were requested and are not in the checkpoint; None likewise."""


_DROPPING = ("log_", "return_", "ignore_")
"""How the strictness values begin under which megatron-core leaves out keys that the checkpoint lacks."""


def may_drop(strictness: str) -> bool:
    """Whether keys that the checkpoint lacks may be left out under a value of `dist_ckpt_strictness`."""
    return strictness.startswith(_DROPPING)


class PlanSave(Protocol):
    """Plans a save. Collective."""

    def __call__(
        self, state_dict: State, directory: Path, content_metadata: dict[str, Any], ranks: Ranks, options: SaveOptions
    ) -> tuple[PayloadWrite, Any]:
        """Plan a save of `state_dict` into `directory` and write nothing that a later failure could leave behind.

        Args:
            state_dict: sharded state dict; consumed.
            directory: an existing directory that only this save uses.
            content_metadata: what `read_common` is to return under that key.
            ranks: all ranks.
            options: how.

        Returns:
            The planned write, and the `strategy` of the next save's options.

        Raises:
            CheckpointSaveError: the shards cannot be saved. Every rank raises.
        """


class Load(Protocol):
    """Loads from a checkpoint. Collective."""

    def __call__(self, template: dict[str, Any], directory: Path, ranks: Ranks, options: LoadOptions) -> Loaded:
        """Load the parts of a checkpoint that `template` asks for.

        Args:
            template: sharded state dict of this rank.
            directory: the checkpoint.
            ranks: all ranks.
            options: how.

        Raises:
            CheckpointError: it is damaged, or does not fit. Every rank raises.
        """


@dataclass(frozen=True)
class Format:
    """One format: what a module of this package provides under the name `FORMAT`."""

    name: str
    """As in `checkpoint.ckpt_format`."""
    plan_save: PlanSave
    load: Load
    read_common: Callable[[Path], dict[str, Any]]
    """Reads what of a checkpoint's state dict is not sharded. Local; raises CheckpointError."""
    files: tuple[str, ...]
    """Names of the files that every whole checkpoint of the format has."""
    is_shard: Callable[[str], bool]
    """Whether a file, by its path inside the checkpoint, holds values: as a rule too large to read it only to check."""
    inherit: Callable[[Path, list[bytes]], list[str]] | None = None
    """What `PayloadWrite.finish` does, for a directory and the bequests of all ranks, by rank. Local; raises ValueError
    where they do not make up a whole, and OSError."""
    saves_while_planning: bool = False
    """Whether planning a save writes its values already."""
    reads_elsewhere: bool = False
    """Whether it can read shards that are not in the checkpoint's directory."""
