"""What a writer leaves in a save's directory when its trainer has died: that its files are whole, and which they are.

The next start finds one of each rank, or too few, and then nothing is made of them. The first line is JSON, from the
writer; behind it is what the trainer gave it for this. An empty file is a sign of life: the writer is still at it.

This module runs in the writer process, which imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from bridge.training.checkpointing.layout import MANIFEST, TEMPORARY_SUFFIX


class Bequest:
    """What one save would leave on this rank."""

    def __init__(self, name: str, directory: int) -> None:
        """
        Args:
            name: of the file.
            directory: a descriptor of the save's directory; it is duplicated.
        """
        self._name = name
        self._directory = os.dup(directory)
        self._content: bytes | None = None
        self._is_shown = False

    def show_life(self) -> None:
        """Let the next start know that it is worth waiting. Never raises."""
        if self._is_sealed():
            return
        with contextlib.suppress(OSError):
            self._is_shown = True
            descriptor = os.open(self._name, os.O_WRONLY | os.O_CREAT, 0o666, dir_fd=self._directory)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)

    def complete(self, written: dict[str, Any], content: bytes) -> None:
        """The files are written and synced.

        Args:
            written: which, as JSON.
            content: what the trainer gave.
        """
        self._content = json.dumps(written).encode() + b"\n" + content

    def leave(self) -> None:
        """Write the file, unless the save did not come to its end or the trainer had come to sealing it.

        Raises:
            OSError: it cannot be written.
        """
        if self._content is None or self._is_sealed():
            return
        temporary = self._name + TEMPORARY_SUFFIX
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=self._directory)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(self._content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)
        self._is_shown = False

    def close(self) -> None:
        """Nothing more is to come. What has only shown life is taken away. Never raises."""
        if self._is_shown:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
        os.close(self._directory)

    def _is_sealed(self) -> bool:
        try:
            os.stat(MANIFEST, dir_fd=self._directory)
        except OSError:
            return False
        return True
