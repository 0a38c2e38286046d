"""What the uploader's process does: bring every checkpoint of a directory into a bucket, one after the other.

It reads JSON lines from its standard input: first its `Settings`, then `{"published": 10}` when there is a new
checkpoint, or `{"finish": true}` when there will be no more. It writes reports as JSON lines, see `Report`. It ends
with the process that started it. What is where is looked up on both sides each time, so there is nothing to remember
that could be wrong after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    DirectoryInUseError,
)
from bridge.training.checkpointing.integrity import Manifest, read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRAIN_STATE, iteration_name, list_checkpoints
from bridge.training.checkpointing.marks import is_marked
from bridge.training.checkpointing.objects.backlog import (
    Sides,
    may_replace,
    to_upload,
    tracker_target,
    unneeded,
    wait_after,
)
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket
from bridge.training.checkpointing.objects.owner import BucketOwner, read_owner, refusal, successor, write_owner
from bridge.training.checkpointing.objects.sweep import retain, sweep
from bridge.training.checkpointing.objects.transfer import TransferOptions
from bridge.training.checkpointing.objects.upload import point_trackers, upload_checkpoint
from bridge.training.checkpointing.retention.policies import Policy, policies_of
from bridge.training.checkpointing.starts import Starts, starts_or_none
from bridge.training.object_url import ObjectUrl

logger = logging.getLogger(__name__)

LOCK = ".bridge-uploader"
"""In the directory; locked by the one process that uploads from it."""

EXIT_FAILED = 3
"""The status after a failure that was told. An error that Python itself ends a process for has the status 1."""

_WATCH_SECONDS = 0.2
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What an uploader is told at its start."""

    url: str
    directory: str
    parent: int
    """The process that it ends with."""
    retention: dict[str, Any] = field(default_factory=dict)
    """The settings that `policies_of` reads."""
    transfer: dict[str, Any] = field(default_factory=dict)
    """Of `TransferOptions`, where they differ from the default."""
    protected: list[int] = field(default_factory=list)
    """Iterations that stay in the bucket whatever retention says."""
    published: list[int] = field(default_factory=list)
    """What this start of the run has saved until now, in that order."""
    owner: dict[str, Any] = field(default_factory=dict)
    """The run, as the fields of a `BucketOwner`. Without them nobody is asked whose the place is."""
    is_start: bool = True
    """Whether the run has not had the place in this start yet."""
    goes_on: bool = False
    """Whether the run goes on from what is in the place."""


Event = Literal[
    "begun", "uploaded", "there", "unneeded", "outdated", "damaged", "gone", "failed", "deleted", "owned", "log"
]
"""Of a checkpoint of the directory: its upload begins; it was uploaded; was there already; would be deleted there at
once; is older than what is there; is damaged; is not in the directory any more. And: uploading failed; retention
deleted one there; the place is this run's."""


@dataclass(frozen=True)
class Report:
    """What an uploader tells."""

    event: Event
    iteration: int = -1
    text: str = ""
    total_bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0
    level: int = logging.INFO
    seen: int = 0
    """How many of the checkpoints that this start has saved were known of."""
    time: float = field(default_factory=time.time)
    """Unix time in seconds."""


class _Inbox:
    """What has been asked for; filled by a thread that reads the standard input."""

    def __init__(self, published: Sequence[int] = ()) -> None:
        self.changed = threading.Event()
        self.finish = False
        self.published = list(published)
        self.protected: list[int] = []

    def read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "published" in message:
                self.protected = message.get("protected", [])
                self.published.append(message["published"])
            self.finish = self.finish or bool(message.get("finish"))
            self.changed.set()
        os._exit(EXIT_FAILED)


class _ToReport(logging.Handler):
    """Passes on what is logged here, to be logged where the run's log is."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(Report("log", text=record.getMessage(), level=record.levelno))


def _tell(report: Report) -> None:
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    sys.stdout.flush()


class Uploader:
    """Brings one directory into one place of a bucket, and keeps that in order."""

    def __init__(self, settings: Settings, inbox: _Inbox) -> None:
        self._url = ObjectUrl.parse(settings.url)
        self._directory = Path(settings.directory)
        self._policies: tuple[Policy, ...] = policies_of(SimpleNamespace(**settings.retention))  # type: ignore[arg-type]
        self._options = TransferOptions(**settings.transfer)
        self._protected = settings.protected
        self._inbox = inbox
        self.under_way = -1
        """The iteration whose upload has begun and not ended."""
        self._store: ObjectStore | None = None
        self._swept = False
        self._failures: Counter[int] = Counter()
        self._damaged: dict[int, Manifest] = {}
        self._done: dict[int, Report] = {}
        self._told: dict[int, tuple[str, Manifest, int]] = {}
        self._seen = 0
        self._owner = BucketOwner.from_plain(settings.owner) if settings.owner else None
        self._is_start = settings.is_start
        self._goes_on = settings.goes_on
        self._known: dict[int, Manifest] = {}
        """What is in the bucket, as far as it has been read. Only this process changes it, as long as the place is this
        run's."""

    def step(self) -> bool:
        """Upload one checkpoint, lead the trackers where they belong, and tell what is there.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: it could not be done.
            OSError: the directory cannot be read.
        """
        self.under_way = -1
        store = self._store = self._store or ObjectStore(self._url.bucket, self._options)
        self._require_place(store)
        self._seen = len(self._inbox.published)  # before the directory is looked at, so that it is not too many
        published = frozenset(self._inbox.published[: self._seen])
        starts = starts_or_none(self._directory)
        sides, listing = self._look(store, published)
        waiting = [n for n in to_upload(sides, self._policies, starts) if self._damaged.get(n) != sides.local[n]]
        if waiting:
            # One that keeps failing does not hold up the others.
            iteration = min(waiting, key=lambda n: self._failures[n])
            self._upload(store, iteration, sides.local[iteration])
            listing = list_bucket(store, self._url, self._known)
            sides = _with_bucket(sides, listing)
        target = tracker_target(sides)
        if target is not None and sides.is_there(target):
            try:
                train_state = (self._directory / iteration_name(target) / TRAIN_STATE).read_bytes()
            except FileNotFoundError:  # retention has taken it from the directory since that was looked at
                train_state = store.get(self._url.key(iteration_name(target), TRAIN_STATE))
            point_trackers(store, self._url, target, train_state)
        self._confirm(sides, starts)
        # Only a run that saves deletes anything: one that has come to the wrong place, or is out of date, does not.
        if any(sides.is_there(n) for n in published) and target in published and sides.is_there(target):
            self._tidy(store, waiting, starts)
        return bool(waiting)

    def _require_place(self, store: ObjectStore) -> None:
        """Make the place this run's, or see that it still is.

        Raises:
            DirectoryInUseError: it is another run's.
        """
        if self._owner is None:
            return
        found = read_owner(store, self._url)
        owner = successor(found, self._owner, is_start=self._is_start, goes_on=self._goes_on)
        if owner is None and found is not None:
            self._known.clear()
            if self._is_start:
                raise DirectoryInUseError(refusal(self._url, found, "checkpoint.mirror or checkpoint.save"))
            raise DirectoryInUseError(
                f"{self._url} was taken over by another run ({found}), so this one uploads nothing there; end one of "
                "them, and let each have a place of its own"
            )
        if owner is not None and owner != found:
            if found is not None:
                logger.warning("TAKING OVER %s from another run (%s)", self._url, found)
            write_owner(store, self._url, owner)
        if self._is_start:
            self._is_start = False
            self._tell(Report("owned"))

    def _look(self, store: ObjectStore, published: frozenset[int]) -> tuple[Sides, BucketListing]:
        local, tracked = self._local()
        listing = list_bucket(store, self._url, self._known)
        return _with_bucket(Sides(local, tracked, published), listing), listing

    def _upload(self, store: ObjectStore, iteration: int, manifest: Manifest) -> None:
        path = self._directory / iteration_name(iteration)
        self._known.pop(iteration, None)
        self.under_way = iteration
        self._tell(Report("begun", iteration, total_bytes=manifest.total_bytes))
        try:
            done = upload_checkpoint(
                store, self._url, path, move_trackers=False, confirm=lambda: self._require_place(store)
            )
        except CheckpointNotFoundError as error:
            self._swept = False  # what has been uploaded of it is left over
            self._tell(Report("gone", iteration, str(error)))
        except CheckpointDamagedError as error:
            self._damaged[iteration] = manifest
            self._tell(Report("damaged", iteration, str(error)))
        except (CheckpointError, OSError):
            self._failures[iteration] += 1
            raise
        else:
            self._failures.pop(iteration, None)
            self.under_way = -1
            self._done[iteration] = Report("uploaded", iteration, "", done.total_bytes, done.sent_bytes, done.seconds)

    def _confirm(self, sides: Sides, starts: Starts) -> None:
        """Tell what is in the bucket, and what will never be, once for each checkpoint."""
        gone = unneeded(sides, self._policies, starts)
        for iteration, manifest in sides.local.items():
            if sides.is_there(iteration):
                event: Event = "there"
            elif iteration in gone:
                event = "unneeded"
            elif not may_replace(sides, iteration):
                event = "outdated"
            else:
                continue
            done = self._done.pop(iteration, None)
            if done is not None and event == "there":
                self._tell(done)
            # It may have been seen in the directory before this start said that it had saved it: then it is told again.
            told = (event, manifest, self._inbox.published[: self._seen].count(iteration))
            if (done is None or event != "there") and self._told.get(iteration) != told:
                self._tell(Report(event, iteration))
            self._told[iteration] = told

    def _tidy(self, store: ObjectStore, waiting: Sequence[int], starts: Starts) -> None:
        """What fails here fails nothing else: the checkpoints are there."""
        try:
            if self._swept and not self._policies:
                return
            self._known.clear()  # what is deleted by is read anew
            listing = list_bucket(store, self._url, self._known)
            if not self._swept:
                sweep(store, listing, resumed=waiting)
                self._swept = True
            if self._policies:
                protected = {*self._protected, *self._inbox.protected}
                for gone in retain(store, listing, self._policies, protected, starts):
                    self._known.pop(gone, None)
                    self._tell(Report("deleted", gone))
        except (CheckpointError, OSError) as error:
            logger.warning("nothing is deleted from %s for now: %s", self._url, error)

    def _local(self) -> tuple[dict[int, Manifest], int | None]:
        manifests: dict[int, Manifest] = {}
        for iteration in list_checkpoints(self._directory).iterations:
            path = self._directory / iteration_name(iteration)
            try:
                manifest = None if is_marked(path) else read_manifest(path)
            except CheckpointDamagedError:
                continue
            if manifest is not None and manifest.iteration == iteration:
                manifests[iteration] = manifest
        try:
            text = (self._directory / LEGACY_TRACKER).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            text = ""
        return manifests, int(text) if text.isdecimal() else None

    def _tell(self, report: Report) -> None:
        _tell(replace(report, seen=self._seen))


def _with_bucket(sides: Sides, listing: BucketListing) -> Sides:
    return replace(sides, remote=listing.manifests, remote_tracked=listing.tracked, has_tracker=listing.has_tracker)


def _work(uploader: Uploader, inbox: _Inbox) -> int:
    """Upload until told to finish; return the status to exit with."""
    failures = 0
    while True:
        inbox.changed.clear()
        is_last = inbox.finish
        wait: float | None = None
        try:
            while uploader.step():
                failures = 0
        except Exception as error:
            failures += 1
            wait = wait_after(failures)
            what = str(error) if isinstance(error, CheckpointError | OSError) else f"{type(error).__name__}: {error}"
            again = "the next start of the run goes on" if is_last else f"trying again in {wait:.0f} s at the latest"
            _tell(Report("failed", uploader.under_way, f"{what}; {again}"))
        if is_last:
            return 0 if wait is None else EXIT_FAILED
        inbox.changed.wait(wait)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(EXIT_FAILED)


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    # Another one can only be about to end: the process that it belongs to has lost the directory.
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context((directory / LOCK).open("w"))
            _lock(stream, directory)
        except OSError as error:
            logger.warning("no lock keeps another process from uploading from %s: %s", directory, error)
        yield


def _lock(stream: IO[str], directory: Path) -> None:
    begun, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told and time.monotonic() - begun > _LOCK_SECONDS:
                told = True
                _tell(Report("failed", text=f"another process uploads from {directory}; waiting until it has ended"))
            time.sleep(_WATCH_SECONDS)


def main() -> None:
    """Run the program."""
    # A signal for the job is its main process's to handle, and this one ends with that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    settings = Settings(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with, args=(settings.parent,), daemon=True).start()
    inbox = _Inbox(settings.published)
    threading.Thread(target=inbox.read, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(5)
    logging.basicConfig(level=logging.INFO, handlers=[_ToReport()])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    with _only_one(Path(settings.directory)):
        status = _work(Uploader(settings, inbox), inbox)
    os._exit(status)
