"""`bridge-ckpt rescue`: what dead trainers left in memory becomes a persistent checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from bridge.cli.output import Output, directory_argument, output_options, safe_global_option
from bridge.cli.preparing import enable

DESCRIPTION = """Write the newest complete in-memory checkpoint of a run into its save directory, as a persistent one.

SAVE_DIR is checkpoint.save of a run whose trainers are dead and will not be started again on this machine. The command
has to be run on the machine that holds the snapshots of all ranks, as the user that the run belonged to. If the save
directory has a checkpoint that is as new, nothing is done."""


@click.command("rescue", help=DESCRIPTION, short_help="write a dead run's in-memory checkpoint into its save directory")
@directory_argument(
    "save_dir", "SAVE_DIR", otherwise="name the run's checkpoint.staging_dir; its next start uploads to {url}"
)
@click.option("--force", is_flag=True, help="even if the save directory has a checkpoint as new")
@click.option("--release", is_flag=True, help="end the keepers afterwards and free their memory")
@safe_global_option
@output_options
def command(
    save_dir: Path, force: bool, release: bool, safe_globals: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Carry it out."""
    enable()
    from bridge.training.checkpointing.rescue import end_keepers, rescue

    output = Output(as_json, quiet)
    rescued = rescue(save_dir, force=force, safe_globals=safe_globals)
    if rescued.committed is None:
        output.line(
            f"nothing to rescue: the newest iteration in memory is {rescued.iteration}, and {save_dir} has the "
            f"checkpoint of iteration {rescued.tracked}"
        )
    else:
        output.line(f"saved iteration {rescued.iteration} from memory to {rescued.committed.path}")
    ranks: list[int] = []
    if release:
        ranks = end_keepers(save_dir)
        output.line(f"ended the keepers of rank {', '.join(map(str, ranks))}")
    path = None if rescued.committed is None else rescued.committed.path
    output.result(
        {"iteration": rescued.iteration, "tracked_before": rescued.tracked, "path": path, "released_ranks": ranks}
    )
