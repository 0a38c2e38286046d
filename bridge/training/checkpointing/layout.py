"""Every file and directory name of a checkpoint directory, and what a look at one finds.

<save>/
  latest_train_state.pt                tracker: a copy of the published train_state.pt
  latest_checkpointed_iteration.txt    tracker for Megatron-LM readers: "10" or "release"
  iter_0000010/                        a published checkpoint
    .bridge-damaged                    put there by a run that found it damaged
  .saving-iter_0000020-3f9c12ab/       a save in progress, or the remains of a crash
    .bequest-0                         what rank 0's writer has left there when its trainer had died
  .trash-iter_0000010-77b0e1d4/        on its way out
  non_persistent/                      global non-persistent checkpoints, in the same form
  SAVE_NOW                             put there by somebody who wants a checkpoint now
  .bridge-writer                       locked by the run that saves here
  .bridge-session                      what local and in-memory checkpoints of this run are known by
  .bridge-uploader                     locked by the process that uploads from here
  .bridge-events.jsonl                 what happened here, one event a line
  .bridge-events.1.jsonl               the same, earlier
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ITERATION_PREFIX = "iter_"
SAVING_PREFIX = ".saving-"
TRASH_PREFIX = ".trash-"
TEMPORARY_SUFFIX = ".bridge-tmp"
BEQUEST_PREFIX = ".bequest-"
WRITER = ".bridge-writer"
SAVE_NOW = "SAVE_NOW"
DAMAGED = ".bridge-damaged"
EVENTS = ".bridge-events.jsonl"
EARLIER_EVENTS = ".bridge-events.1.jsonl"

TRACKER_PREFIX = "latest"
TRACKER = f"{TRACKER_PREFIX}_train_state.pt"
LEGACY_TRACKER = f"{TRACKER_PREFIX}_checkpointed_iteration.txt"
RELEASE = "release"

MANIFEST = "manifest.json"
COMMON = "common.pt"
PAYLOAD_METADATA = ".metadata"
COMPACT_METADATA = ".metadata.bridge"
MCORE_METADATA = "metadata.json"
TRAIN_STATE = "train_state.pt"
RUN_CONFIG = "run_config.yaml"
TOKENIZER_DIRECTORY = "tokenizer"
DATALOADER_DIRECTORY = "dataloader_state"
NON_PERSISTENT_DIRECTORY = "non_persistent"

_ITERATION_NAME = re.compile(rf"{ITERATION_PREFIX}(\d{{7,}})")
_SAVING_NAME = re.compile(rf"{re.escape(SAVING_PREFIX)}({ITERATION_PREFIX}\d{{7,}})-[0-9a-f]+")
_TRASH_NAME = re.compile(rf"{re.escape(TRASH_PREFIX)}.+-[0-9a-f]{{8}}")


def iteration_name(iteration: int) -> str:
    """The directory name of an iteration: `iter_0000010` for 10."""
    return f"{ITERATION_PREFIX}{iteration:07d}"


def parse_iteration_name(name: str) -> int | None:
    """The iteration of a name that `iteration_name` could have made; None for any other (`iter_best`, `iter_1_bak`)."""
    match = _ITERATION_NAME.fullmatch(name)
    if match is None or iteration_name(int(match[1])) != name:
        return None
    return int(match[1])


def dataloader_state_name(data_parallel_rank: int) -> str:
    """Path of a data-parallel rank's data iterator state inside a checkpoint."""
    return f"{DATALOADER_DIRECTORY}/train_dataloader_dprank{data_parallel_rank:03d}.pt"


def new_saving_name(iteration: int, token: str = "") -> str:
    """A staging name that no earlier save has used, so the remains of a dead one cannot write into it.

    Args:
        iteration: of the save.
        token: eight hexadecimal digits that no other save has; random ones if empty.
    """
    return f"{SAVING_PREFIX}{iteration_name(iteration)}-{token or secrets.token_hex(4)}"


def bequest_name(rank: int) -> str:
    """What a rank's writer calls, in the staging directory, what it leaves to the next start."""
    return f"{BEQUEST_PREFIX}{rank}"


def new_trash_name(name: str) -> str:
    """A fresh name for a directory that is about to be deleted."""
    return f"{TRASH_PREFIX}{name.lstrip('.')}-{secrets.token_hex(4)}"


def deleted_iteration(name: str) -> int | None:
    """The iteration of a checkpoint that was renamed to `name` to be deleted; None for any other name."""
    if _TRASH_NAME.fullmatch(name) is None:
        return None
    return parse_iteration_name(name[len(TRASH_PREFIX) :].rsplit("-", 1)[0])


def staged_name(name: str) -> str | None:
    """The name that a staging directory would be published under; None if `name` is not a staging name."""
    match = _SAVING_NAME.fullmatch(name)
    return match[1] if match else None


def is_leftover(name: str) -> bool:
    """Whether a name is one that only an unfinished save or deletion of ours leaves behind."""
    return (
        staged_name(name) is not None
        or _TRASH_NAME.fullmatch(name) is not None
        or (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))
    )


def is_iteration_directory(path: Path) -> bool:
    """Whether `path` is itself one checkpoint (any name), rather than a directory of checkpoints."""
    if (path / TRACKER).exists() or (path / LEGACY_TRACKER).exists():
        return False
    return any((path / name).exists() for name in (MANIFEST, MCORE_METADATA, PAYLOAD_METADATA))


@dataclass(frozen=True)
class Listing:
    """What a directory of checkpoints holds, by name only; nothing has been opened."""

    path: Path
    exists: bool
    iterations: tuple[int, ...]
    """Iterations of the `iter_N` directories, ascending."""
    has_release: bool
    has_tracker: bool
    has_legacy_tracker: bool
    leftovers: tuple[str, ...]
    """Remains of unfinished saves and deletions."""
    foreign: tuple[str, ...]
    """Names that are none of the above, not hidden and not the run's own, sorted."""


def list_checkpoints(path: Path, own_paths: Iterable[Path] = ()) -> Listing:
    """Look at a directory of checkpoints.

    Args:
        path: the directory; it need not exist.
        own_paths: files and directories that the run itself writes and that may lie somewhere below `path` (a
            metrics file, say).

    Raises:
        NotADirectoryError: `path` is a file.
    """
    try:
        entries = sorted(path.iterdir())
    except FileNotFoundError:
        return Listing(path, False, (), False, False, False, (), ())
    iterations: list[int] = []
    leftovers: list[str] = []
    foreign: list[str] = []
    known = {TRACKER, LEGACY_TRACKER, RELEASE, SAVE_NOW, NON_PERSISTENT_DIRECTORY, "lost+found"}
    known |= _entries_with(path, own_paths)
    for entry in entries:
        iteration = parse_iteration_name(entry.name)
        if iteration is not None:
            iterations.append(iteration)
        elif is_leftover(entry.name):
            leftovers.append(entry.name)
        elif entry.name not in known and not entry.name.startswith("."):
            foreign.append(entry.name)
    names = {entry.name for entry in entries}
    return Listing(
        path,
        True,
        tuple(sorted(iterations)),
        RELEASE in names,
        TRACKER in names,
        LEGACY_TRACKER in names,
        tuple(leftovers),
        tuple(foreign),
    )


def _entries_with(directory: Path, paths: Iterable[Path]) -> set[str]:
    """The entries of `directory` that are one of `paths` or a directory above one, by name or through links."""
    names = set()
    for path in paths:
        for below, base in ((path.absolute(), directory.absolute()), (path.resolve(), directory.resolve())):
            if base in below.parents:
                names.add(below.relative_to(base).parts[0])
    return names
