"""`bridge-ckpt memory`: the keepers of in-memory checkpoints on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_to(commands: Any) -> None:
    """Declare the command."""
    text = "list the processes on this machine that hold your in-memory checkpoints"
    commands.add_parser("memory", help=text, description=f"{text.capitalize()}.").set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.errors import CheckpointError
    from bridge.training.checkpointing.tiers.memory.keeper_readers import describe_keeper, running_keepers

    print(f"{'session':<16}  {'rank':>4}  {'process':>7}  {'memory':>12}  iterations")
    for session, rank in running_keepers():
        try:
            keeper = describe_keeper(session, rank)
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if keeper is not None:
            iterations = ", ".join(
                f"{kept.iteration}" if kept.owner == rank else f"{kept.iteration} (of rank {kept.owner})"
                for kept in keeper.snapshots
            )
            size = f"{keeper.total_bytes / 2**20:.1f} MiB"
            print(f"{session:<16}  {rank:>4}  {keeper.pid:>7}  {size:>12}  {iterations or 'none'}")
    return 0
