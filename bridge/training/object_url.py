"""Names of places in object storage: `s3://bucket/prefix`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

SCHEME = "s3://"
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def is_url(text: str | os.PathLike[str] | None) -> bool:
    """Whether a setting names a place in some store by URL, and not a directory."""
    return text is not None and _OTHER_SCHEME.match(os.fspath(text)) is not None


@dataclass(frozen=True)
class ObjectUrl:
    """A place in object storage, used as a directory is."""

    bucket: str
    prefix: str = ""
    """Without slashes at its ends."""

    @classmethod
    def parse(cls, text: str) -> ObjectUrl:
        """Read a URL.

        Raises:
            ValueError: it is no URL of a bucket; the message says what is wrong, without the URL itself.
        """
        if not text.startswith(SCHEME):
            raise ValueError(f"does not begin with {SCHEME}, the only scheme of object storage that there is")
        bucket, _, prefix = text[len(SCHEME) :].partition("/")
        if "@" in bucket:
            raise ValueError(
                "holds credentials; give them as AWS tools take them, in the environment or in ~/.aws/credentials"
            )
        if not _BUCKET.fullmatch(bucket):
            raise ValueError(f"has no valid name of a bucket after {SCHEME}")
        prefix = prefix.rstrip("/")
        if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
            raise ValueError("has an empty part, '.' or '..' in its path")
        if any(sign in prefix for sign in "?#\0\n\r"):
            raise ValueError("has a sign in its path that is none of a name: one of ? # or the end of a line")
        return cls(bucket, prefix)

    def key(self, *names: str) -> str:
        """The key of an object below this place; without names, what all keys below it begin with."""
        parts = [self.prefix, *names] if self.prefix else list(names)
        return "/".join(parts) if names else (f"{self.prefix}/" if self.prefix else "")

    def __truediv__(self, name: str) -> ObjectUrl:
        return ObjectUrl(self.bucket, self.key(name))

    @property
    def name(self) -> str:
        """The last part of the path; empty for a bucket."""
        return self.prefix.rpartition("/")[2]

    @property
    def parent(self) -> ObjectUrl:
        """The place that this one is directly below; a bucket is its own."""
        return ObjectUrl(self.bucket, self.prefix.rpartition("/")[0])

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
