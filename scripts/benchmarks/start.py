"""What this project adds to the start of a program that trains with megatron-core.

    .venv/bin/python -m scripts.benchmarks.start [--rounds N] [--json FILE]

Fresh processes import torch and whatever of megatron-core training uses, and then this project; and set up a tiny model
and take its first step, with and without a directory to save in. Medians are given, in seconds.

    megatron   importing torch and megatron-core
    ours       importing this project after that
    first step setting up and taking the first step, without a directory to save in
    saving     what a directory to save in adds to that
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORT = """
import sys, time
begun = time.perf_counter()
import torch, torch.distributed.checkpoint, megatron.core.tensor_parallel
enabled = time.perf_counter()
from bridge import accelerator
accelerator.enable()
ours = time.perf_counter() - enabled
import importlib, json
for name in {modules}:
    importlib.import_module(name)
imported = time.perf_counter()
import bridge.training.train
print(json.dumps([imported - begun - ours, time.perf_counter() - imported + ours]))
"""
LIST = """
import json, sys
from bridge import accelerator
accelerator.enable()
import bridge.training.train
print(json.dumps([name for name in sys.modules if name.split(".")[0] == "megatron"]))
"""
FIRST_STEP = """
import json, sys, time
from pathlib import Path
from scripts.benchmarks import _gpt, _ranks
_ranks.import_all()
begun = time.perf_counter()
run = _gpt.gpt_run(Path({directory!r}), 2, 64, is_saving={is_saving})
_gpt.step(run)
print(json.dumps(time.perf_counter() - begun))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    modules = _run(LIST)
    seconds: dict[str, list[float]] = {name: [] for name in ("megatron", "ours", "first step", "saving")}
    for _ in range(options.rounds):
        megatron, ours = _run(IMPORT.format(modules=modules))
        with tempfile.TemporaryDirectory() as directory:
            without = _run(FIRST_STEP.format(directory=directory, is_saving=False))
            saving = _run(FIRST_STEP.format(directory=directory, is_saving=True))
        for name, taken in zip(seconds, (megatron, ours, without, saving - without), strict=True):
            seconds[name].append(taken)
    report = {"rounds": options.rounds, "seconds": seconds}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    for name, taken in seconds.items():
        print(f"{name:<11} {statistics.median(taken):7.3f}")
    return 0


def _run(program: str) -> Any:
    """What a program prints in its last line."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
