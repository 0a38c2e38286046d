"""A job of one rank under `strace -f`: what it sees, and what it injects."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults import job as jobs
from tests.faults.job import Ended, Job
from tests.faults.system_calls import WRITE_LIKE
from tests.faults.tracer import Call

NAMES = ",".join(call.name for call in WRITE_LIKE)
_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)\)\s+= (-?\d+).*")
_UNFINISHED = re.compile(r"(\d+)\s+(.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+)\s+<\.\.\. \w+ resumed>(.*)")
_DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
_RELATIVE = re.compile(r'(?:AT_FDCWD(?:<([^>]*)>)?|\d+<([^>]*)>)?(?:, )?"([^"]*)"')


@dataclass(frozen=True)
class Straced:
    """How a job under strace went."""

    ended: Ended | None
    """None: it was killed."""
    status: int
    calls: list[Call]
    announced: list[int]


def run_under_strace(job: Job, *options: str) -> Straced:
    """Run a job of one rank with strace attached to it from its first step on; call it where there are no children."""
    job.directory.mkdir(parents=True, exist_ok=True)
    outputs, log = job.directory / "ranks", job.directory / "strace.log"
    outputs.mkdir(exist_ok=True)
    before = len(job.announced())
    gate, opener = os.pipe()
    start = jobs.starts(job, outputs)[0]
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        os.read(gate, 1)
        start()
    os.close(gate)
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={NAMES}", "-e", "signal=none", *options]
    strace = subprocess.Popen([*command, "-o", str(log), "-p", str(pid)], stderr=subprocess.PIPE)
    try:
        _wait_until_traced(pid, strace)
        os.close(opener)
        status = _ended(pid)
    finally:
        jobs.kill_group(pid)
    strace.wait(jobs.TIMEOUT)
    calls = parse(log.read_text(errors="replace"), job.save.resolve())
    return Straced(jobs.read_ended(outputs / "0.pickle"), status, calls, job.announced()[before:])


def parse(log: str, watched: Path) -> list[Call]:
    """The calls of a strace log that are about a directory, or the one above it."""
    calls: list[Call] = []
    unfinished: dict[str, str] = {}
    for line in log.splitlines():
        if match := _UNFINISHED.fullmatch(line):
            unfinished[match[1]] = match[2]
            continue
        if match := _RESUMED.fullmatch(line):
            line = f"{match[1]} {unfinished.pop(match[1], '')}{match[2]}"
        if match := _LINE.fullmatch(line):
            call = _call(match, watched, len(calls) + 1)
            if call is not None:
                calls.append(call)
    return calls


def _call(match: re.Match[str], watched: Path, number: int) -> Call | None:
    process, name, arguments, value = match.groups()
    descriptor = _DESCRIPTOR.match(arguments)
    if descriptor and not name.endswith("at") and name != "renameat2":
        files = [descriptor[1].removesuffix(" (deleted)")]
    else:
        files = [
            os.path.normpath(os.path.join(at or other or "/", path))  # noqa: PTH118 (it may be absolute)
            for at, other, path in _RELATIVE.findall(arguments)
        ]
    if name in ("open", "openat") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
        return None
    inside = [file in (str(watched), str(watched.parent)) or file.startswith(f"{watched}/") for file in files]
    if not any(inside):
        return None
    return Call(
        number,
        "rank 0",
        name,
        tuple(os.path.relpath(file, watched) if near else file for file, near in zip(files, inside, strict=True)),
        int(process),
        error=0 if int(value) >= 0 else 1,
        creates="O_CREAT" in arguments,
    )


def _wait_until_traced(pid: int, strace: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + jobs.TIMEOUT
    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
        if strace.poll() is not None or time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"strace did not attach: {strace.stderr and strace.stderr.read().decode()}")
        time.sleep(0.01)


def _ended(pid: int) -> int:
    deadline = time.monotonic() + jobs.TIMEOUT
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("the job under strace hung")
        time.sleep(0.01)
