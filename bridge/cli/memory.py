"""`bridge-ckpt memory`: the keepers of in-memory checkpoints on this machine."""

from __future__ import annotations

import sys

import click

from bridge.cli.output import Output, output_options


@click.command(
    "memory",
    help="List the processes on this machine that hold your in-memory checkpoints.",
    short_help="list the processes that hold your in-memory checkpoints",
)
@output_options
def command(as_json: bool, quiet: bool) -> None:
    """Carry it out."""
    from bridge.training.checkpointing.errors import CheckpointError
    from bridge.training.checkpointing.tiers.memory.keeper_readers import describe_keeper, running_keepers

    output = Output(as_json, quiet)
    keepers = []
    for session, rank in running_keepers():
        try:
            keeper = describe_keeper(session, rank)
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if keeper is not None:
            keepers.append((session, rank, keeper))
    output.line(f"{'session':<16}  {'rank':>4}  {'process':>7}  {'memory':>12}  iterations")
    for session, rank, keeper in keepers:
        iterations = ", ".join(
            f"{kept.iteration}" if kept.owner == rank else f"{kept.iteration} (of rank {kept.owner})"
            for kept in keeper.snapshots
        )
        size = f"{keeper.total_bytes / 2**20:.1f} MiB"
        output.line(f"{session:<16}  {rank:>4}  {keeper.pid:>7}  {size:>12}  {iterations or 'none'}")
    output.result({"keepers": [{"session": session, "rank": rank, "keeper": each} for session, rank, each in keepers]})
