"""Events as named numbers, which is what programs draw curves of."""

from __future__ import annotations

from bridge.training.checkpointing.events.kinds import (
    CheckpointLoaded,
    CheckpointsRetained,
    Event,
    FellBack,
    SaveCommitted,
    SaveFailed,
    SaveSkipped,
    UploadFailed,
    UploadFinished,
)

PREFIX = "checkpoint"


def numbers_of(event: Event) -> dict[str, float]:
    """The numbers of an event, by name; empty where it has none. Numbers that are not known are left out.

    Those of tiers other than the persistent one have the tier's name in theirs: `checkpoint/local/stall_seconds`.
    """
    found: dict[str, float | None]
    match event:
        case SaveCommitted():
            found = {
                "stall_seconds": event.blocking_seconds,
                "background_seconds": event.background_seconds,
                "gigabytes": None if event.total_bytes is None else event.total_bytes / 1e9,
                "gigabytes_per_second": event.gigabytes_per_second,
                "stall_share": event.stall_share,
            }
        case SaveFailed():
            found = {"failed": 1.0}
        case SaveSkipped():
            found = {"skipped": 1.0}
        case CheckpointLoaded():
            found = {"load_seconds": event.blocking_seconds}
        case FellBack():
            found = {"fell_back": 1.0}
        case CheckpointsRetained():
            found = {"kept": float(event.kept), "deleted": float(event.deleted)}
        case UploadFinished():
            found = {
                "upload_seconds": event.background_seconds,
                "upload_gigabytes": None if event.sent_bytes is None else event.sent_bytes / 1e9,
                "upload_gigabytes_per_second": event.gigabytes_per_second,
            }
        case UploadFailed():
            found = {"upload_failed": 1.0}
        case _:
            return {}
    place = PREFIX if event.tier in (None, "persistent") else f"{PREFIX}/{event.tier}"
    return {f"{place}/{name}": float(value) for name, value in found.items() if value is not None}
