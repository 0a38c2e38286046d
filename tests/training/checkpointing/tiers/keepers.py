"""The keepers of in-memory checkpoints that a test has left behind, as any user of the machine sees them."""

from __future__ import annotations

from pathlib import Path

import psutil

from bridge.training.checkpointing.tiers.session import SESSION, session_of


def keepers_of(save_dir: Path) -> dict[int, psutil.Process]:
    """The running keepers of a save directory's session, by rank."""
    found = {}
    session = session_of(save_dir)
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(part.endswith("keeper_process.py") for part in command) and session in command:
            found[int(command[command.index(session) + 1])] = process
    return found


def end_keeper(save_dir: Path, rank: int) -> None:
    """Kill the keeper of one rank, as the loss of its node would."""
    process = keepers_of(save_dir)[rank]
    process.kill()
    process.wait(10)


def end_all_keepers_below(root: Path) -> None:
    """Kill the keepers of every save directory in `root`."""
    for file in root.rglob(SESSION):
        for rank in keepers_of(file.parent):
            end_keeper(file.parent, rank)
