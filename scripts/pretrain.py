"""Pre-train a GPT model as a YAML recipe says.

    torchrun --nproc-per-node N scripts/pretrain.py --recipe FILE [--overlay FILE ...] [section.key=value ...]

Without torchrun it runs as a single rank. What comes later wins: overlays over the recipe, overrides over both.
Exit status: 0 if training reached its end, 3 after a planned early exit, 1 after an error (torchrun turns every
status but 0 into 1, and prints the rank's own);
16 and 17 as the rerun state machine asks (16: start again to repeat the last step, 17: its result is wrong).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from bridge.training.logs import quiet_library_warnings

EXIT_ERROR = 1
EXIT_EARLY = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    # A manager class named by checkpoint.custom_manager_class may live in the working directory.
    sys.path.insert(0, str(Path.cwd()))
    quiet_library_warnings()
    try:
        from bridge import accelerator

        accelerator.enable()
        from bridge.training.config import load_config
        from bridge.training.train import pretrain

        outcome = pretrain(load_config(options.recipe, options.overlay, options.overrides))
    except Exception as error:
        _report(error)
        return EXIT_ERROR
    return 0 if outcome.reached_end else outcome.exit_code or EXIT_EARLY


def _report(error: Exception) -> None:
    """One line for what a user can mend, on every rank; the traceback too for everything else."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError) and name != "FileNotFoundError":
        name += " (a FileNotFoundError)"
    if not type(error).__module__.startswith("bridge."):
        traceback.print_exc()
    rank = os.environ.get("RANK")
    where = "" if rank is None else f" on rank {rank}"
    print(f"error{where}: {name}: {error}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, type=Path, help="YAML file with the run's configuration")
    parser.add_argument(
        "--overlay", action="append", default=[], type=Path, help="YAML file laid over the recipe; repeatable"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="one setting, as YAML")
    # Options and overrides may come in any order.
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
