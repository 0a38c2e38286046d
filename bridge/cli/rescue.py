"""`bridge-ckpt rescue`: what dead trainers left in memory becomes a persistent checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """Write the newest complete in-memory checkpoint of a run into its save directory, as a persistent one.

For a run whose trainers are dead and will not be started again on this machine. It has to be run on the machine that
holds the snapshots of all ranks, as the user that the run belonged to. If the save directory has a checkpoint that is
as new, nothing is done."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "rescue",
        help="write a dead run's in-memory checkpoint into its save directory",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("save_dir", metavar="SAVE_DIR", type=Path, help="checkpoint.save of the run")
    parser.add_argument("--force", action="store_true", help="even if the save directory has a checkpoint as new")
    parser.add_argument("--release", action="store_true", help="end the keepers afterwards and free their memory")
    parser.add_argument(
        "--safe-global",
        metavar="CLASS",
        action="append",
        default=[],
        help="module.Class of the run's checkpoint.safe_globals; may be given several times",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry it out; return the exit status."""
    from bridge.training.checkpointing.rescue import end_keepers, rescue

    save_dir = options.save_dir.expanduser()
    rescued = rescue(save_dir, force=options.force, safe_globals=options.safe_global)
    if rescued.committed is None:
        print(
            f"nothing to rescue: the newest iteration in memory is {rescued.iteration}, and {save_dir} has the "
            f"checkpoint of iteration {rescued.tracked}"
        )
    else:
        print(f"saved iteration {rescued.iteration} from memory to {rescued.committed.path}")
    if options.release:
        ranks = end_keepers(save_dir)
        print(f"ended the keepers of rank {', '.join(map(str, ranks))}")
    return 0
