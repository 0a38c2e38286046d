"""A directory as the next run that saves there finds it: with what a crash has left complete published.

A run publishes that before it looks for a checkpoint. Here nothing may be changed, so the same code looks at a view
instead: a directory of links, under the names that there will be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bridge.training.checkpointing import inheritance, recovery
from bridge.training.checkpointing.catalog.owners import find_owner
from bridge.training.checkpointing.layout import is_iteration_directory


@dataclass(frozen=True)
class Foreseen:
    """A directory of checkpoints as it will be."""

    directory: Path
    """Where it really is."""
    view: Path
    """Where it can be looked at: the same, if nothing is to be published."""
    unpublished: dict[str, str] = field(default_factory=dict)
    """Names of staging directories, and what they will be called."""

    def real(self, path: Path) -> Path:
        """Where something is now that was found in the view."""
        if self.view == self.directory or self.view not in (path, *path.parents):
            return path
        first, *rest = path.relative_to(self.view).parts or (".",)
        names = {target: name for name, target in self.unpublished.items()}
        return self.directory.joinpath(names.get(first, first), *rest)

    def text(self, message: str) -> str:
        """A message about the view, with the paths that there really are."""
        if self.view == self.directory:
            return message
        for name, target in self.unpublished.items():
            message = message.replace(str(self.view / target), str(self.directory / name))
        return message.replace(str(self.view), str(self.directory))


def to_publish(directory: Path) -> dict[str, str]:
    """What the next run that saves in a directory publishes there; nothing while another run has it.

    Raises:
        OSError: it cannot be read.
    """
    if not directory.is_dir() or is_iteration_directory(directory):
        return {}
    found = recovery.unpublished(directory)
    return {} if found and find_owner(directory).is_alive else found


def completed_by_writers(directory: Path) -> dict[str, str]:
    """What the next run that saves in a directory completes and publishes there, as `to_publish`.

    It is not among what is foreseen, because to look at it takes its metadata, which is not there yet.
    """
    staged = recovery.staged(directory) if directory.is_dir() else {}
    found = {name: target for name, target in staged.items() if inheritance.is_complete(directory / name)}
    return {} if found and find_owner(directory).is_alive else found


@contextmanager
def foreseen(directory: Path, *, is_saved_in: bool = True) -> Iterator[Foreseen]:
    """A directory as a run finds it that loads from it.

    Args:
        directory: of checkpoints; it need not exist.
        is_saved_in: whether that run saves there too; otherwise it leaves everything as it is.
    """
    unpublished = to_publish(directory) if is_saved_in else {}
    if not unpublished:
        yield Foreseen(directory, directory)
        return
    with tempfile.TemporaryDirectory(prefix="bridge-view-") as place:
        view = Path(place)
        for entry in directory.resolve().iterdir():
            (view / unpublished.get(entry.name, entry.name)).symlink_to(entry)
        yield Foreseen(directory, view, unpublished)
