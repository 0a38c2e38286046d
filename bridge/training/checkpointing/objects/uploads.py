"""The background uploads of a run, as rank 0 sees them: one process, and what it tells.

A thread would take turns at Python's lock with the training loop, and a forked process would hold on to a copy of its
memory. So it is a small program of its own, which ends with this process; what is not uploaded then is, by the next
start of the run.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bridge.training.checkpointing.events.describing import shortened, without_credentials
from bridge.training.checkpointing.events.kinds import Event, UploadFailed, UploadFinished, UploadStarted
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints
from bridge.training.checkpointing.objects.transfer import MIB
from bridge.training.checkpointing.objects.uploader import EXIT_FAILED, Report, Settings

logger = logging.getLogger(__name__)

EXIT_SECONDS = 10.0
"""How long an end of the process that is not a planned one waits for an upload under way."""

_PROGRAM = Path(__file__).with_name("uploader_program.py")
_BOOT = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
)
_POLL_SECONDS = 0.1


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    """A file, because a pipe that nobody reads yet would stop the process when it is full."""
    errors: IO[bytes]
    read: int = 0


@dataclass
class Uploads:
    """The uploads from one directory to one place of a bucket.

    No method raises: what goes wrong is logged and tried again, and `missing` and `failure` tell of it.
    """

    url: str
    directory: Path
    retention: dict[str, Any] = field(default_factory=dict)
    transfer: dict[str, Any] = field(default_factory=dict)
    protected: Sequence[int] = ()
    owner: dict[str, Any] = field(default_factory=dict)
    """The run, as the fields of a `BucketOwner`; without them nobody is asked whose the place is."""
    goes_on: bool = False
    """Whether the run goes on from what is in the place, or nothing is there."""
    events: EventStream = field(default_factory=EventStream)
    """Hears of every upload."""
    waiting: list[int] = field(default_factory=list, init=False)
    """Checkpoints of this run that are not in the bucket yet, in the order in which they were published."""
    failure: str = field(default="", init=False)
    """What the last try failed for; empty after one that succeeded."""
    unconfirmed: set[int] = field(default_factory=set, init=False)
    """Checkpoints that were in the directory at the start, as long as nobody knows that they are in the bucket."""
    lost: str = field(default="", init=False)
    """Why one of this run will not be uploaded at all, until `take_loss`."""
    _published: list[int] = field(default_factory=list, init=False)
    _deaths: int = field(default=0, init=False)
    _is_start: bool = field(default=True, init=False)
    _begun: Report | None = field(default=None, init=False)
    """The upload under way."""
    _running: _Running | None = field(default=None, init=False)
    _owner: int = field(default_factory=os.getpid, init=False)

    @property
    def missing(self) -> int | None:
        """The newest checkpoint of this run, as long as it is not in the bucket."""
        return self.waiting[-1] if self.waiting else None

    def is_for(self, other: Uploads) -> bool:
        """Whether these do what the other ones, which have not begun, would do."""
        return (self.retention, self.transfer) == (other.retention, other.transfer)

    def begin(self) -> None:
        """Start the process; it uploads at once what an earlier start of the run has left."""
        if self._running is None:
            # Until the bucket has been looked at, they may be nowhere else.
            self.unconfirmed = set(list_checkpoints(self.directory).iterations)
            self._start()

    def revive(self) -> None:
        """Start the process again if it has died; after several times without an upload the failure stays."""
        self.poll()
        if self._running is None and os.getpid() == self._owner:
            if self._deaths <= 1:
                self.failure = ""
            self._start()

    def published(self, iteration: int, protected: Sequence[int] = ()) -> None:
        """There is a new checkpoint in the directory.

        Args:
            iteration: its own.
            protected: further ones that stay in the bucket whatever retention says.
        """
        self.poll()
        self._forget(iteration)
        self.waiting.append(iteration)
        self.protected = sorted({*self.protected, *protected})
        if self._running is None:
            self._start()  # before it is noted: it is told below
        self._published.append(iteration)
        self._tell({"published": iteration, "protected": self.protected})

    def take_loss(self) -> str:
        """Why a checkpoint of this run will never be uploaded; told once, and empty if there is none."""
        lost, self.lost = self.lost, ""
        return lost

    def poll(self) -> list[Report]:
        """Take in what the process has told, and log it."""
        if self._running is None or os.getpid() != self._owner:
            return []
        ended = self._running.process.poll() is not None
        reports = self._read()
        for report in reports:
            self._note(report)
        if ended:
            self._collect()
        for iteration in [n for n in self.waiting if not (self.directory / iteration_name(n)).is_dir()]:
            self._forget(iteration)
            logger.warning(
                "the checkpoint of iteration %d was removed from %s before it was uploaded to %s; keep more there, or "
                "save less often",
                iteration,
                self.directory,
                self.url,
            )
        return reports

    def wait_for_room(self, most: int, timeout: float) -> float:
        """Wait until fewer than `most` checkpoints are waiting, or an upload has failed.

        Args:
            most: at least 1.
            timeout: seconds.

        Returns:
            Seconds that it took.
        """
        begun = time.monotonic()
        self.poll()
        while len(self.waiting) >= most and not self.failure and self._running is not None:
            if time.monotonic() - begun > timeout:
                self.failure = f"its upload did not end within {timeout:.0f} s"
                break
            time.sleep(_POLL_SECONDS)
            self.poll()
        return time.monotonic() - begun

    def finish(self, timeout: float) -> None:
        """Wait until everything is uploaded, or cannot be now, and end the process.

        Args:
            timeout: seconds.
        """
        if os.getpid() != self._owner or self._running is None:
            return
        atexit.unregister(self._finish_at_exit)
        self._tell({"finish": True})
        until = time.monotonic() + timeout
        while self._running is not None and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            self.poll()
        if self._running is None:
            return
        self._running.process.kill()
        self._running.process.wait()
        self.poll()
        logger.warning(
            "the upload to %s did not end within %.0f s; the next start of the run goes on with it", self.url, timeout
        )

    def _start(self) -> None:
        settings = Settings(
            self.url,
            str(self.directory.absolute()),
            os.getpid(),
            self.retention,
            self.transfer,
            list(self.protected),
            list(self._published),
            self.owner,
            self._is_start,
            self.goes_on,
        )
        path = json.dumps([entry or str(Path.cwd()) for entry in sys.path])
        command = [sys.executable, "-W", "ignore", "-c", _BOOT, path, str(_PROGRAM)]
        try:
            output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by _collect)
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=errors)
        except OSError as error:
            self.failure = f"could not start the process that uploads checkpoints: {error}"
            logger.error("%s; trying again at the next save", self.failure)
            return
        atexit.register(self._finish_at_exit)
        self._running = _Running(process, output, errors)
        self._tell(asdict(settings))

    def _finish_at_exit(self) -> None:
        self.finish(EXIT_SECONDS if self.missing is not None else 0.0)

    def _tell(self, message: dict[str, Any]) -> None:
        if self._running is None or self._running.process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._running.process.stdin.write(json.dumps(message).encode() + b"\n")
            self._running.process.stdin.flush()

    def _read(self) -> list[Report]:
        running = self._running
        if running is None:
            return []
        # By position: the process writes through the same description of the file.
        data = os.pread(running.output.fileno(), 1 << 20, running.read)
        lines = data[: data.rfind(b"\n") + 1]
        running.read += len(lines)
        return [report for line in lines.splitlines() if (report := _parsed(line)) is not None]

    def _note(self, report: Report) -> None:
        event = self._event(report)
        if event is not None:
            self.events.emit(event)
        if report.event == "log":
            logger.log(report.level, "%s", report.text)
        elif report.event == "owned":
            self._is_start = False
        elif report.event in ("there", "unneeded"):
            self.failure = ""
            self._confirm(report)
        elif report.event == "outdated":
            logger.warning(
                "the checkpoint of iteration %d in %s is not uploaded: %s has another one, which may be later",
                report.iteration,
                self.directory,
                self.url,
            )
        elif report.event == "damaged":
            text = f"the checkpoint of iteration {report.iteration} is damaged and is not uploaded: {report.text}"
            if report.iteration in self.waiting:
                self.lost = text
                self.unconfirmed.add(report.iteration)
                self._forget(report.iteration)
            logger.error("UPLOADING TO %s FAILED: %s", self.url, text)
        elif report.event == "uploaded":
            self.failure, self._deaths = "", 0
            self._confirm(report)
            logger.info(
                "uploaded the checkpoint of iteration %d to %s: %.1f MiB of %.1f MiB sent in %.2f s",
                report.iteration,
                self.url,
                report.sent_bytes / MIB,
                report.total_bytes / MIB,
                report.seconds,
            )
        elif report.event == "gone":
            logger.warning("the checkpoint of iteration %d is not in %s: %s", report.iteration, self.url, report.text)
        elif report.event == "failed":
            self.failure = report.text
            logger.error("UPLOADING TO %s FAILED: %s", self.url, report.text)

    def _event(self, report: Report) -> Event | None:
        """A report as an event for others than the log; None for what is none."""
        path = f"{self.url}/{iteration_name(report.iteration)}" if report.iteration >= 0 else self.url
        common: dict[str, Any] = {"time": report.time, "tier": "persistent", "path": path}
        common["iteration"] = report.iteration if report.iteration >= 0 else None
        if report.event == "begun":
            self._begun = report
            return UploadStarted(**common, total_bytes=report.total_bytes)
        if report.event == "uploaded":
            common["background_seconds"] = report.seconds
            return UploadFinished(**common, total_bytes=report.total_bytes, sent_bytes=report.sent_bytes)
        if report.event in ("failed", "damaged", "gone"):
            begun = self._begun
            if begun is not None and begun.iteration == report.iteration:
                self._begun = None
                common["total_bytes"] = begun.total_bytes
                common["background_seconds"] = max(0.0, report.time - begun.time)
            return UploadFailed(**common, message=shortened(without_credentials(report.text)))
        return None

    def _confirm(self, report: Report) -> None:
        """A checkpoint is in the bucket, or will not be needed there; unless it is the one that it has replaced."""
        if report.iteration not in self._published[report.seen :]:
            self._forget(report.iteration)
            self.unconfirmed.discard(report.iteration)

    def _forget(self, iteration: int) -> None:
        if iteration in self.waiting:
            self.waiting.remove(iteration)

    def _collect(self) -> None:
        """The process has ended."""
        running = self._running
        if running is None:
            return
        self._running = None
        status = running.process.returncode
        with running.output, running.errors, contextlib.suppress(OSError):
            if status not in (0, EXIT_FAILED):
                self._deaths += 1
                running.errors.seek(0)
                last = running.errors.read()[-2000:].decode(errors="replace").strip()
                self.failure = f"the process that uploads checkpoints ended with status {status}"
                self.events.emit(UploadFailed(tier="persistent", path=self.url, message=self.failure))
                logger.error("%s; another is started at the next save. It said: %s", self.failure, last or "nothing")
        if running.process.stdin is not None:
            with contextlib.suppress(OSError):
                running.process.stdin.close()


def _parsed(line: bytes) -> Report | None:
    """A report; None, with a warning, for what is none: whatever a library writes."""
    try:
        return Report(**json.loads(line))
    except (ValueError, TypeError):
        logger.warning("the process that uploads checkpoints said: %s", line[:500].decode(errors="replace"))
        return None
