"""What the checksums of a manifest cost, as a ratio of what they are part of.

    manifest.py [--mib 512] [--directory DIR] [--rounds 3]

It writes shards of random tensors as a save does, with each kind of checksum and with none, syncs them, and prints how
much longer the writing takes; and how long the verification of what was written takes, by sample and in full, against a
plain read of the same files. Rounds are interleaved, and medians of processor time are compared: other work on the
machine does not disturb that, and it leaves out every wait for storage, so the share of a real save or load is lower
than what is printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.formats.writing import write_bucket
from bridge.training.checkpointing.integrity import FileRecord, find_damage

_TENSOR_BYTES = 16 << 20


class _NoChecksum:
    """Stands for a checksum that costs nothing."""

    def update(self, data: Any, /) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """No digits."""
        return ""


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checksums._KINDS["none"] = _NoChecksum
    directory = Path(tempfile.mkdtemp(prefix="manifest-", dir=arguments.directory))
    try:
        _report(arguments.mib, arguments.rounds, directory)
    finally:
        shutil.rmtree(directory)


def _report(mib: int, rounds: int, directory: Path) -> None:
    items = [
        (WriteItem(MetadataIndex(f"t{number}"), WriteItemType.TENSOR), torch.randn(_TENSOR_BYTES // 4))
        for number in range(mib * (1 << 20) // _TENSOR_BYTES)
    ]
    kinds = ("none", *checksums.KINDS)
    records: dict[str, FileRecord] = {}

    def write(kind: str) -> None:
        bucket = (str(directory / f"{kind}.distcp"), f"{kind}.distcp", ([], items))
        records[kind] = write_bucket([_StorageWriterTransforms()], bucket, kind)[0]

    write("none")  # the first file is slower than those after it
    seconds = _interleaved({kind: lambda kind=kind: write(kind) for kind in kinds}, rounds)
    size = records["none"].size
    rate = size / seconds["none"] / 1e9
    print(f"{size / 2**20:.0f} MiB written and synced in {seconds['none']:.2f} s of processor time ({rate:.2f} GB/s)")
    for kind in checksums.KINDS:
        print(f"  with {kind:<7} {seconds[kind] / seconds['none'] - 1:+7.1%} of the time")

    def read(kind: str, **how: bool) -> None:
        if find_damage(directory, [records[kind]], **how):
            raise SystemExit("the files are not what was written")

    checks: dict[str, Callable[[], None]] = {"none": lambda: _read(directory / "none.distcp")}
    checks |= {f"{kind}, full": lambda kind=kind: read(kind, checksums=True) for kind in checksums.KINDS}
    checks["xxh3, sample"] = lambda: read("xxh3", samples=True)
    seconds = _interleaved(checks, rounds)
    print(f"read in {seconds['none']:.3f} s of processor time ({size / seconds['none'] / 1e9:.2f} GB/s)")
    for name in list(checks)[1:]:
        print(f"  verified with {name:<13} in {seconds[name] / seconds['none']:8.3f} of the time")


def _interleaved(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each action."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            begun = time.process_time()
            action()
            found[name].append(time.process_time() - begun)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _read(path: Path) -> None:
    buffer = memoryview(bytearray(8 << 20))
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
