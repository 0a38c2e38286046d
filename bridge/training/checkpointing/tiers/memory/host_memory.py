"""How much memory of the machine in-memory checkpoints may take where the user does not say."""

from __future__ import annotations

import os
import re
from pathlib import Path

FRACTION = 0.5
"""Of what is available, for all ranks of the machine together."""


def share(available: int, cgroup_left: int | None, ranks: int) -> int:
    """Bytes for each of `ranks`: an equal part of `FRACTION` of what is available, here and in the control group."""
    usable = available if cgroup_left is None else min(available, cgroup_left)
    return int(max(0, usable) * FRACTION) // max(1, ranks)


def share_of_this_rank() -> int:
    """`share` of the machine as it is now; torchrun says how many ranks it runs here."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return share(available_bytes(), cgroup_bytes_left(), int(ranks) if ranks.isdigit() else 1)


def available_bytes() -> int:
    """What new memory can be given out without swapping, as the kernel estimates it."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def cgroup_bytes_left(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this process's control groups (version 2, or 1 with a memory controller) leave; None without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, caches = root, "memory.max", "memory.current", r"(?:in)?active_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            caches = r"total_(?:in)?active_file"
        else:
            continue
        group = base / path.lstrip("/")
        # Every group above counts too. Inside a container the path may be the host's: then only the root is there.
        for directory in (group, *group.parents):
            if directory == base or base in directory.parents:
                left += _left(directory, limit, usage, caches)
    return min(left, default=None)


def _left(directory: Path, limit: str, usage: str, caches: str) -> list[int]:
    try:
        allowed, used = (directory / limit).read_text().strip(), (directory / usage).read_text().strip()
    except OSError:
        return []
    return [int(allowed) - int(used) + _cached(directory, caches)] if allowed != "max" else []


def _cached(directory: Path, names: str) -> int:
    """What is used for files' contents, which the kernel gives up for anything else."""
    try:
        text = (directory / "memory.stat").read_text()
    except OSError:
        return 0
    return sum(int(size) for size in re.findall(rf"^{names} (\d+)$", text, re.MULTILINE))
