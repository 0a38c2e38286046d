"""The machine that a benchmark runs on, and what else is going on there."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUIET = 0.15
"""Processors that others may keep busy on a machine that counts as quiet."""
_TICKS = os.sysconf("SC_CLK_TCK")


def describe(directory: Path) -> dict[str, Any]:
    """Processors, memory, kernel, file system and versions; `directory` is where files are written."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file system": _file_system(directory),
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file_system(directory: Path) -> str:
    command = ["df", "--output=fstype", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Busy:
    """Seconds of the processors so far: of the whole machine, and of this process and its children that have ended."""

    machine: float
    own: float

    @classmethod
    def now(cls) -> Busy:
        """Up to now."""
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return cls(0.0, 0.0)
        user, nice, system, _, _, interrupts, soft, stolen = fields
        own = sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        return cls((user + nice + system + interrupts + soft + stolen) / _TICKS, own)

    def others_since(self, earlier: Busy, seconds: float) -> float:
        """How many processors others have kept busy, on average, in the seconds since then."""
        others = (self.machine - earlier.machine) - (self.own - earlier.own)
        return max(0.0, others) / seconds
