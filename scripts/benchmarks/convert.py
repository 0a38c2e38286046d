"""Memory and speed of converting a checkpoint that is four times as large as what the conversion may hold.

    .venv/bin/python -m scripts.benchmarks.convert [--memory-mib N] [--processes N ...] [--directory DIR]

For each number of processes, a checkpoint in torch_dist is converted to zarr and back by `bridge-ckpt convert`. "Peak"
is the highest anonymous memory of all its processes together, less that of converting a checkpoint of 8 MiB:
what is left is what the values take. "Copied" is how long copying the same bytes takes, forced to storage; a
conversion reads the source twice and the result once more than that, to check and to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TENSORS = 8
"""Of which the first takes half of the checkpoint, and so is larger than the budget."""
ITERATION = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory by default")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mib", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.make:
        make_checkpoint(options.make, options.mib << 20)
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        return measure(Path(directory), options.memory_mib, options.processes)


def measure(root: Path, memory_mib: int, counts: Sequence[int]) -> int:
    """Make the checkpoints, convert them and print what it took."""
    for name, mib in (("large", 4 * memory_mib), ("small", 8)):
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--make", root / name, "--mib", str(mib)], check=True)
    print(f"budget {memory_mib} MiB, checkpoint {4 * memory_mib} MiB")
    print(f"{'to':<11} {'processes':>9} {'peak':>9} {'peak / budget':>14} {'seconds':>8} {'copied':>7} {'ratio':>6}")
    within = True
    for count in counts:
        source = root / "large"
        for target in ("zarr", "torch_dist"):
            base, _ = convert(root / "small", root / "scrap", "zarr", memory_mib, count)
            shutil.rmtree(root / "scrap")
            copied = copy(source, root / "copy")
            result = root / f"{target}-{count}"
            peak, seconds = convert(source, result, target, memory_mib, count)
            used = (peak - base) / 2**20
            within = within and used <= memory_mib
            print(
                f"{target:<11} {count:>9} {used:>5.0f} MiB {used / memory_mib:>14.2f} {seconds:>8.2f} {copied:>7.2f} "
                f"{seconds / copied:>6.1f}",
                flush=True,
            )
            source = result
    print("within the budget" if within else "MORE THAN THE BUDGET")
    return 0 if within else 1


def make_checkpoint(save_dir: Path, size: int) -> None:
    """Write a checkpoint in torch_dist of `size` bytes of random values."""
    import torch
    import torch.distributed as dist

    from bridge import accelerator

    accelerator.enable()
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from bridge.training.checkpointing.agreement import Ranks
    from bridge.training.checkpointing.files import write_file
    from bridge.training.checkpointing.formats import torch_dist
    from bridge.training.checkpointing.formats.options import SaveOptions

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    directory = save_dir / f"iter_{ITERATION:07d}"
    directory.mkdir(parents=True)
    lengths = [size // 2] + [size // 2 // (TENSORS - 1)] * (TENSORS - 1)
    state: dict[str, Any] = {
        str(number): ShardedTensor.from_rank_offsets(f"tensor{number}", torch.randn(max(1, length // 4096), 1024))
        for number, length in enumerate(lengths)
    }
    payload, _ = torch_dist.plan_save({**state, "iteration": ITERATION}, directory, {}, Ranks.current(), SaveOptions())
    _, results = payload.write("xxh3")
    for sidecar in payload.sidecars:
        write_file(directory / sidecar.name, sidecar.data)
    payload.finish([results])
    dist.destroy_process_group()


def convert(source: Path, target: Path, name: str, memory_mib: int, processes: int) -> tuple[int, float]:
    """Convert; return the peak of anonymous memory in bytes, and the seconds that the command says it took."""
    command = [sys.executable, "-W", "ignore", "-m", "bridge.cli", "convert", str(source), str(target)]
    command += ["--format", name, "--memory-gib", str(memory_mib / 1024), "--processes", str(processes), "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while running.poll() is None:
        peak = max(peak, sum(anonymous_bytes(pid) for pid in tree(running.pid)))
        time.sleep(0.01)
    out, _ = running.communicate()
    if running.returncode != 0:
        raise RuntimeError(f"the conversion ended with status {running.returncode}")
    return peak, float(json.loads(out)["seconds"])


def tree(pid: int) -> list[int]:
    """A process and all below it (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(each for child in children for each in tree(int(child)))]


def anonymous_bytes(pid: int) -> int:
    """A process's resident memory that is no file's (Linux); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def copy(source: Path, target: Path) -> float:
    """Copy the files of a directory and force them to storage; return the seconds."""
    begun = time.monotonic()
    for path in (each for each in source.rglob("*") if each.is_file()):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, destination.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
    seconds = time.monotonic() - begun
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
