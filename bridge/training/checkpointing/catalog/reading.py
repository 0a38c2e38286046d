"""Reading all that a checkpoint consists of, in threads, and comparing it with its checksums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.integrity import FileRecord

Report = Callable[[str, int, int], None]
"""Told of a step how many bytes of how many are done."""
BLOCK = 8 << 20
"""Bytes that a thread reads at a time."""
THREADS = "bridge-verify"
"""How the names of the threads begin that read."""


@dataclass(frozen=True)
class Reading:
    """Threads that read, one file or object each."""

    _pool: ThreadPoolExecutor
    _stop: threading.Event
    """Set when nobody waits for the result any more."""
    _report: Report | None

    @classmethod
    @contextmanager
    def begun(cls, threads: int, report: Report | None) -> Iterator[Reading]:
        """For a `with` block. Whoever interrupts it does not wait until a hundred gigabytes have been read."""
        reading = cls(ThreadPoolExecutor(threads, THREADS), threading.Event(), report)
        try:
            yield reading
        finally:
            reading._stop.set()
            reading._pool.shutdown(wait=False, cancel_futures=True)

    def problems(
        self, name: str, records: Sequence[FileRecord], examine: Callable[[FileRecord], list[str]]
    ) -> list[str]:
        """What `examine` says of all files of the checkpoint `name`, in the order of the alphabet."""
        total, done = sum(record.size for record in records), 0
        self._tell(name, 0, total)
        problems: list[str] = []
        # The largest first, so that no thread is left with one in the end.
        largest_first = sorted(records, key=lambda record: -record.size)
        futures = {self._pool.submit(examine, record): record for record in largest_first}
        for future in as_completed(futures):
            problems += future.result()
            done += futures[future].size
            self._tell(name, done, total)
        return sorted(problems)

    def compare(self, record: FileRecord, blocks: Iterable[bytes | memoryview]) -> list[str]:
        """What is wrong with these contents of a file; given up between two blocks when nobody waits for it."""
        hasher = checksums.new_hasher(record.kind)
        for block in blocks:
            hasher.update(block)
            if self._stop.is_set():
                raise CancelledError
        found = hasher.hexdigest()
        differs = f"{record.name} has {record.kind} {found} instead of {record.checksum}"
        return [] if found == record.checksum else [differs]

    def _tell(self, name: str, done: int, total: int) -> None:
        if self._report is not None:
            self._report(f"reading {name}", done, total)
