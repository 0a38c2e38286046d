"""What a writer leaves in a save's directory when its trainer has died: that its files are whole, and which they are.

The next start finds one of each rank, or too few, and then nothing is made of them. A first line of JSON has a checksum
of what follows: a line from the writer, and what the trainer gave it for this. An empty file is a sign of life: the
writer is still at it. A published checkpoint has none: whoever comes second, the writer or rank 0, removes it.

This module runs in the writer process, which imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing.layout import SAVING_PREFIX, TEMPORARY_SUFFIX


class Bequest:
    """What one save would leave on this rank. Two threads use it: one shows life while the other writes."""

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
        self._is_over = False
        self._lock = Lock()

    def show_life(self) -> None:
        """Let the next start know that it is worth waiting. Never raises."""
        with self._lock, contextlib.suppress(OSError):
            if self._is_over or not self._is_staging():
                return
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
        body = json.dumps(written).encode() + b"\n" + content
        self._content = json.dumps({"crc32": crc32(body)}).encode() + b"\n" + body

    def leave(self) -> None:
        """Write the file, if the save came to its end and was not published. Until then, the signs of life go on.

        Never raises: if it cannot be written, the next start finds none.
        """
        if self._content is None or not self._is_staging():
            return
        temporary = self._name + TEMPORARY_SUFFIX
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=self._directory)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self._content)
                stream.flush()
                os.fsync(stream.fileno())
            with self._lock:
                os.replace(temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                self._is_over = True
                self._is_shown = False
            os.fsync(self._directory)
        if not self._is_staging():
            for name in (temporary, self._name):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory)

    def close(self) -> None:
        """Nothing more is to come. What has only shown life is taken away. Never raises."""
        with self._lock:
            self._is_over = True
            if self._is_shown:
                with contextlib.suppress(OSError):
                    os.unlink(self._name, dir_fd=self._directory)
            os.close(self._directory)

    def _is_staging(self) -> bool:
        """Whether the directory has not been published, nor put out of sight."""
        try:
            path = Path(f"/proc/self/fd/{self._directory}").readlink()
            # Asked for by name too: another machine may have renamed it.
            is_there = path.stat().st_ino == os.fstat(self._directory).st_ino
        except OSError:
            return False
        return is_there and path.name.startswith(SAVING_PREFIX)
