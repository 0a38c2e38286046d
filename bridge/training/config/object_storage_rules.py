"""Rules between the settings of `checkpoint` that name places in object storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config.schema import Violation, at_least
from bridge.training.object_url import ObjectUrl, is_url

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig

_EXAMPLE = "write s3://bucket/prefix"
_DIRECTORIES = (
    "staging_dir",
    "pretrained_checkpoint",
    "non_persistent_global_ckpt_dir",
    "non_persistent_local_ckpt_dir",
)


def object_storage_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    """Rules for URLs, and for what belongs to them."""
    yield from at_least("checkpoint", checkpoint, 1, "upload_threads", "staging_keep")
    minutes = checkpoint.upload_wait_minutes
    if minutes <= 0:
        yield Violation("checkpoint.upload_wait_minutes", minutes, "is too small", "set it to a number above 0")
    if minutes >= checkpoint.wait_timeout_minutes and (checkpoint.mirror is not None or is_url(checkpoint.save)):
        yield Violation(
            "checkpoint.upload_wait_minutes",
            minutes,
            f"is not below checkpoint.wait_timeout_minutes ({checkpoint.wait_timeout_minutes}), so the other ranks "
            "would take rank 0 for lost while it waits for uploads",
            "set it to less, or that to more",
        )
    for field in ("save", "load", "mirror"):
        url = getattr(checkpoint, field)
        if is_url(url) or (field == "mirror" and url is not None):
            yield from _url_rules(f"checkpoint.{field}", url)
    for field in _DIRECTORIES:
        value = getattr(checkpoint, field)
        if is_url(value):
            yield Violation(
                f"checkpoint.{field}", _shown(value), "is a URL, and only a directory will do", "name a directory"
            )
    yield from _mirror_rules(checkpoint)
    yield from _staging_rules(checkpoint)


def _mirror_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    mirror = checkpoint.mirror
    if mirror is not None and not checkpoint.save:
        yield Violation(
            "checkpoint.mirror",
            _shown(mirror),
            "has nothing to copy without checkpoint.save",
            "set checkpoint.save to a directory, or mirror to null",
        )
    if mirror is not None and is_url(checkpoint.save):
        yield Violation(
            "checkpoint.mirror",
            _shown(mirror),
            "copies a directory, and checkpoint.save is in object storage itself",
            "set checkpoint.save to a directory, or mirror to null",
        )
    if checkpoint.mirror_required and mirror is None:
        yield Violation(
            "checkpoint.mirror_required",
            True,
            "has no effect without checkpoint.mirror",
            "set that, or leave this at false",
        )


def _staging_rules(checkpoint: CheckpointConfig) -> Iterator[Violation]:
    if is_url(checkpoint.save) and not checkpoint.staging_dir:
        yield Violation(
            "checkpoint.save",
            _shown(checkpoint.save),
            "needs a directory to write to first",
            "set checkpoint.staging_dir to one that all ranks share",
        )
    if checkpoint.staging_dir and not is_url(checkpoint.save):
        yield Violation(
            "checkpoint.staging_dir",
            checkpoint.staging_dir,
            "has no effect where checkpoint.save is no URL",
            "set checkpoint.save to one, or leave this at null",
        )


def _url_rules(setting: str, url: str) -> Iterator[Violation]:
    try:
        ObjectUrl.parse(url)
    except ValueError as error:
        yield Violation(setting, _shown(url), str(error), _EXAMPLE)


def _shown(url: str | None) -> str | None:
    """A URL without what may be a secret in it: nothing before the last @, and nothing from a ? on."""
    if url is None:
        return url
    before, at, after = url.rpartition("@")
    kept, query, _ = after.partition("?")
    if not at:
        return kept + (f"{query}…" if query else "")
    scheme, separator, _ = before.partition("://")
    shown = f"{scheme}://…" if separator else "…"
    return shown if "?" in before else f"{shown}@{kept}" + (f"{query}…" if query else "")
