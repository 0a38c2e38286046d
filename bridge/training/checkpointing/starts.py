"""Which starts of a run wrote something, and what they left behind.

A run that goes back, by an older `ckpt_step` or because something newer could not be had, leaves checkpoints of later
iterations behind: in directories of other nodes, in memory, in a tier that is not configured this time. They must not
win when they are found again. So the starts of a run are counted, what a start writes carries its number, and the
save directory remembers where each start went on from that has begun to save.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from bridge.training.checkpointing.files import replace_file

logger = logging.getLogger(__name__)

STARTS = ".bridge-starts"
"""In a save directory: the starts that have saved something."""


@dataclass(frozen=True)
class Starts:
    """The starts of one run that have saved something, in their order."""

    entries: tuple[tuple[int, int], ...] = ()
    """Number of the start, and the iteration that it went on from. Both rise: what a start left behind, all that
    went on from there left behind too."""

    @property
    def next(self) -> int:
        """The number of a start that has saved nothing yet, from 1."""
        return self.entries[-1][0] + 1 if self.entries else 1

    def have_left_behind(self, iteration: int, start: int) -> bool:
        """Whether a later start has gone on from before what `start` wrote of `iteration`."""
        return any(later > start and resumed < iteration for later, resumed in self.entries)

    def followed_by(self, start: int, resumed: int) -> Starts:
        """These, and a start that went on from the iteration `resumed` and now saves."""
        return Starts((*(entry for entry in self.entries if entry[1] < resumed), (start, resumed)))


def read_starts(save_dir: Path) -> Starts:
    """The starts that a save directory knows of. One that has lost them knows of none, with a warning.

    Raises:
        OSError: the file is there and cannot be read now.
    """
    path = save_dir / STARTS
    try:
        entries = json.loads(path.read_bytes())
        return Starts(tuple((int(start), int(resumed)) for start, resumed in entries))
    except FileNotFoundError:
        return Starts()
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        logger.warning(
            "%s cannot be read (%s): a non-persistent checkpoint that this run has left behind may be taken for a "
            "newer one",
            path,
            error,
        )
        return Starts()


def write_starts(save_dir: Path, starts: Starts) -> None:
    """Make the save directory know of these starts."""
    replace_file(save_dir / STARTS, json.dumps(starts.entries).encode())
