"""How sharded state reaches disk, one module a format. `registry` finds a format by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.formats.apart import State
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io.elsewhere import Shards
from bridge.training.checkpointing.io.strategy import IoBackend
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
        self,
        state_dict: State,
        directory: Path,
        content_metadata: dict[str, Any],
        ranks: Ranks,
        *,
        strategy: Any | None = None,
        writers_per_rank: int = 1,
        parallelization_group: Any | None = None,
        preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        assume_constant_structure: bool = False,
        io_backend: IoBackend = "direct",
    ) -> tuple[PayloadWrite, Any]:
        """Plan a save of `state_dict` into `directory` and write nothing that a later failure could leave behind.

        Args:
            state_dict: sharded state dict; consumed.
            directory: an existing directory that only this save uses.
            content_metadata: what `read_common` is to return under that key.
            ranks: all ranks.
            strategy: the second value returned by an earlier call, of the same format.
            writers_per_rank: files that each rank writes at the same time, where the format has a choice.
            parallelization_group: replicas within this group share the writing; None: the main replica writes.
            preprocess_common: as megatron-core's `preprocess_common_before_consistancy_check`.
            assume_constant_structure: the plan may be kept for the next save, where the format keeps plans.
            io_backend: who writes the files, where the format has a choice.

        Returns:
            The planned write, and what to pass as `strategy` to the next call.

        Raises:
            CheckpointSaveError: the shards cannot be saved. Every rank raises.
        """


class Load(Protocol):
    """Loads from a checkpoint. Collective."""

    def __call__(
        self,
        template: dict[str, Any],
        directory: Path,
        ranks: Ranks,
        *,
        strictness: str,
        parallelization_group: Any | None = None,
        validate_access: bool = True,
        io_backend: IoBackend = "direct",
    ) -> Loaded:
        """Load the parts of a checkpoint that `template` asks for.

        Args:
            template: sharded state dict of this rank.
            directory: the checkpoint.
            ranks: all ranks.
            strictness: one of megatron-core's `StrictHandling` values.
            parallelization_group: each rank of this group reads a share and they exchange; None: everybody reads.
            validate_access: check that the ranks' requests cover every requested tensor exactly once.
            io_backend: who reads the files, where the format has a choice.

        Raises:
            CheckpointError: it is damaged, or does not fit. Every rank raises.
        """


class LoadFrom(Protocol):
    """Loads from a checkpoint whose shards are elsewhere. Collective."""

    def __call__(
        self,
        template: dict[str, Any],
        directory: Path,
        ranks: Ranks,
        *,
        strictness: str,
        parallelization_group: Any | None = None,
        validate_access: bool = True,
        io_backend: IoBackend = "direct",
        shards: Shards | None = None,
    ) -> Loaded:
        """As `Load`.

        Args:
            template: as there.
            directory: the checkpoint, without shards.
            ranks: all ranks.
            strictness: as there.
            parallelization_group: as there.
            validate_access: as there.
            io_backend: as there.
            shards: the others.
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
    load_from: LoadFrom | None = None
    """As `load`, where the shards are not in the directory; None where the format cannot do without them there."""
