"""Which starts of a run wrote something, and what they left behind.

A run that goes back, by an older `ckpt_step` or because something newer could not be had, leaves checkpoints of later
iterations behind: in the save directory, in those of other nodes, in memory, in a tier that is not configured this
time. They must not win when they are found again, nor push out what the run goes on from.

The rule:

Every start that saves has a number, higher than all before it, and every checkpoint carries the number of the start
that saved it. Before a start saves for the first time it notes in the save directory its number, the iteration that it
went on from, and the number that the checkpoint of that iteration carries. The line of the run is what the newest noted
start saves, what the start that it went on from had saved up to that iteration, and so on back to a start that began
afresh or from elsewhere. A checkpoint whose start is in the line is left behind if its iteration is beyond where the
line left that start, and one whose start is not in the line is left behind if its iteration is beyond where the line
begins. Nothing is known of any other checkpoint: of those without a number, of those with a number that nobody has
noted yet, and of those that lie before the line begins.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.files import replace_file
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints

logger = logging.getLogger(__name__)

STARTS = ".bridge-starts"
"""In a save directory: the starts that have saved something."""

_LEAP = 1000
"""Numbers that are left out where those that were given out can only be guessed: other tiers may have higher ones."""


class Start(NamedTuple):
    """One start of a run."""

    number: int
    """From 1."""
    resumed: int
    """The iteration that it went on from; 0 for a fresh start."""
    source: int = 0
    """The number of the start that had saved the checkpoint of that iteration. 0 for a fresh start, and where that
    checkpoint says none, or is not of this run."""


@dataclass(frozen=True)
class Starts:
    """The starts of one run that have saved something, in their order."""

    entries: tuple[Start, ...] = ()
    """By number."""
    uncounted: int = 0
    """The highest number that checkpoints may carry of starts which nobody has noted; it is not written either."""

    @property
    def next(self) -> int:
        """The number of a start that has saved nothing yet, from 1."""
        return max(self.entries[-1].number if self.entries else 0, self.uncounted) + 1

    def have_left_behind(self, iteration: int, start: int) -> bool:
        """Whether the run has certainly left behind what `start` wrote of `iteration`."""
        return self.tell(iteration, start) is True

    def tell(self, iteration: int, start: int) -> bool | None:
        """Whether the run has left behind what `start` wrote of `iteration`; None where nobody knows."""
        if start <= 0 or not self.entries or start > self.entries[-1].number:
            return None
        noted = {entry.number: entry for entry in self.entries}
        number, end = self.entries[-1].number, math.inf
        while number in noted and number != start:
            end = min(end, noted[number].resumed)
            number = noted[number].source
        if iteration > end:
            return True
        return False if number == start else None

    def judge(self, saved: Iterable[tuple[int, int]]) -> list[bool | None]:
        """As `tell`, for all checkpoints of one directory or bucket, each its iteration and its start.

        Where no start was ever noted, or the notes are lost, and all are of one start, none was left behind: a start
        does not go back.
        """
        found = list(saved)
        if not self.entries and len({start for _, start in found}) == 1:
            return [None if start == 0 else False for _, start in found]
        return [self.tell(iteration, start) for iteration, start in found]

    def judge_to_delete(self, saved: Iterable[tuple[int, int]]) -> list[bool | None]:
        """As `judge`; but a checkpoint without a number counts as not left behind: of those nothing was ever noted."""
        found = list(saved)
        numbered = iter(self.judge(each for each in found if each[1] > 0))
        return [next(numbered) if start > 0 else False for _, start in found]

    def followed_by(self, number: int, resumed: int, source: int = 0) -> Starts:
        """These, and a start that now saves.

        Args:
            number: its own, above all others.
            resumed: the iteration that it went on from.
            source: the number that the checkpoint of that iteration carries; 0 if nobody knows.
        """
        return Starts((*self.entries, Start(number, resumed, source if 0 < source < number else 0)), self.uncounted)


def read_starts(save_dir: Path) -> Starts:
    """The starts that a save directory knows of; none where it has never noted any.

    Raises:
        OSError: the file is there and cannot be read now.
        CheckpointDamagedError: it is there and says something else.
    """
    path = save_dir / STARTS
    try:
        return Starts(_parsed(json.loads(path.read_bytes())))
    except FileNotFoundError:
        return Starts()
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(
            f"{path} is damaged ({error}), so nobody knows which checkpoints this run has left behind by going back; "
            "the next save of a new start of the run writes it anew"
        ) from error


def _parsed(found: Any) -> tuple[Start, ...]:
    """Check the shape: a list of rising starts, each with two numbers or three.

    Raises:
        ValueError, TypeError: it is another one.
    """
    if not isinstance(found, list):
        raise ValueError("it holds no list")
    entries: list[Start] = []
    for values in found:
        last = entries[-1].number if entries else 0
        # Without the third every start had gone on in the line of the one before it; others were not kept.
        number, resumed, source = values if len(values) != 2 else (*values, last)
        if any(type(value) is not int for value in (number, resumed, source)):
            raise ValueError(f"{values!r} are not numbers")
        if not (last < number and resumed >= 0 and 0 <= source < number):
            raise ValueError(f"{values!r} does not follow on start {last}")
        entries.append(Start(number, resumed, source))
    return tuple(entries)


def starts_or_none(save_dir: Path) -> Starts:
    """As `read_starts`, for whoever can do without: none, with a warning, where the file cannot be read or is lost."""
    try:
        starts, problem = read_starts(save_dir), ""
        if not starts.entries and len(numbers_of_starts(save_dir)) > 1:
            problem = lost_starts(save_dir)
    except (OSError, CheckpointDamagedError) as error:
        starts, problem = Starts(), str(error)
    if problem:
        logger.warning("the order of the checkpoints in %s is taken from their times: %s", save_dir, problem)
    return starts


def lost_starts(save_dir: Path) -> str:
    """What to tell where checkpoints are of starts, and the file that they were noted in is not there."""
    return (
        f"{save_dir / STARTS} is gone, so nobody knows which checkpoints this run has left behind by going back; if "
        "the directory was copied, copy that file too"
    )


def starts_to_go_on(save_dir: Path) -> Starts:
    """As `read_starts`, for a run that saves there: its next number is above all that are in use.

    Raises:
        OSError: the file is there and cannot be read now.
    """
    numbers = numbers_of_starts(save_dir)
    highest = max(numbers, default=0)
    try:
        starts = read_starts(save_dir)
    except CheckpointDamagedError as error:
        logger.warning("%s", error)
        return Starts(uncounted=highest + _LEAP)
    if len(numbers) > 1 and not starts.entries:
        logger.warning("%s; the starts of the run are counted on from %d", lost_starts(save_dir), highest + _LEAP)
    # Without the file, or with an older one, there were starts that it does not tell of.
    is_complete = highest < starts.next
    return Starts(starts.entries, 0 if is_complete else highest + _LEAP)


def numbers_of_starts(save_dir: Path) -> set[int]:
    """The numbers of the starts that the persistent checkpoints of a directory are of."""
    found = set()
    for iteration in list_checkpoints(save_dir).iterations:
        try:
            manifest = read_manifest(save_dir / iteration_name(iteration))
        except (CheckpointDamagedError, OSError):
            continue
        if manifest is not None and manifest.start > 0:
            found.add(manifest.start)
    return found


def write_starts(save_dir: Path, starts: Starts) -> None:
    """Make the save directory know of these starts."""
    replace_file(save_dir / STARTS, json.dumps(starts.entries).encode())
