"""What the readers ask of a file, wherever it is."""

from __future__ import annotations

from typing import Protocol


class ReadableFile(Protocol):
    """Something that is read as a file is. Several threads may read from it."""

    def read(self, into: memoryview, at: int) -> None:
        """Fill memory with what it holds from byte `at` on.

        Raises:
            CheckpointError: it ends before that, or storage fails.
        """

    def __str__(self) -> str:
        """Its name, for messages."""
