"""Events in words, one line each, for the log and for sinks that take text."""

from __future__ import annotations

import re

from bridge.training.checkpointing.events.kinds import (
    CheckpointConverted,
    CheckpointDeleted,
    CheckpointLoaded,
    CheckpointRescued,
    CheckpointsRetained,
    Event,
    FellBack,
    LoadResolved,
    RunEnded,
    RunStarted,
    SaveCommitted,
    SaveFailed,
    SaveSkipped,
    SaveStarted,
    UploadFailed,
    UploadFinished,
    UploadStarted,
)
from bridge.training.checkpointing.resolve import NAMES

_LONGEST = 4096
_CREDENTIALS = re.compile(r"//[^/\s]*@")


def without_credentials(text: str) -> str:
    """A text without the name and the password that a URL in it may have before its host."""
    return _CREDENTIALS.sub("//", text)


def error_text(error: BaseException) -> str:
    """What an error says, at most 4 KiB of it and without credentials. Never raises, whatever the error is."""
    try:
        text = str(error)
    except Exception:
        return "what it says cannot be told"
    return shortened(without_credentials(text))


def shortened(text: str) -> str:
    """A text, at most 4 KiB of it: its beginning and its end."""
    half = _LONGEST // 2
    if len(text) <= _LONGEST:
        return text
    return f"{text[:half]} ... ({len(text) - 2 * half} characters are left out) ... {text[-half:]}"


def saved_line(event: SaveCommitted) -> str:
    """A published checkpoint: where, how large, and what it cost."""
    parts = []
    if event.total_bytes is not None:
        rate = event.gigabytes_per_second
        parts.append(size(event.total_bytes) + (f" at {rate:.2f} GB/s" if rate is not None else ""))
    if event.blocking_seconds is not None:
        stall = f"training stood still for {event.blocking_seconds:.2f} s"
        if event.stall_share is not None and event.since_seconds is not None:
            stall += f" ({100 * event.stall_share:.1f} % of the {event.since_seconds:.1f} s since the save before)"
        parts.append(stall)
    if event.background_seconds:
        parts.append(f"{event.background_seconds:.2f} s in the background")
    return f"saved the {_of(event)} to {event.path}: {', '.join(parts)}"


def loaded_line(event: CheckpointLoaded) -> str:
    """A checkpoint that was loaded: from where, how large, and how long it took."""
    amount = "" if event.total_bytes is None else f"{size(event.total_bytes)} in "
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in event.phases.items())
    line = f"loaded iteration {event.iteration} from {event.path}: {amount}{event.blocking_seconds or 0.0:.2f} s"
    return f"{line} ({phases})" if phases else line


def describe(event: Event) -> str:
    """Any event in one line."""
    match event:
        case SaveCommitted():
            return saved_line(event)
        case CheckpointLoaded():
            return loaded_line(event)
        case RunStarted():
            return f"a run of {event.world_size} ranks goes on from iteration {event.iteration}"
        case RunEnded():
            return f"the run ended after iteration {event.iteration}: {event.reason}"
        case SaveStarted():
            return f"saving the {_of(event)}"
        case SaveFailed():
            failed = "failed after it was published" if event.published else "failed"
            return f"saving the {_of(event)} {failed}: {event.error}: {event.message}"
        case SaveSkipped():
            return f"the {_of(event)} is skipped: the one before is still being written"
        case CheckpointRescued():
            return f"rescued the {_of(event)} from memory to {event.path}{_cost(event)}"
        case CheckpointConverted():
            made = f"converted {event.source} ({event.source_format}) to {event.path} ({event.checkpoint_format})"
            return f"{made}{_cost(event)}"
        case CheckpointsRetained():
            return f"retention kept {event.kept} and deleted {event.deleted} after iteration {event.iteration}"
        case CheckpointDeleted():
            return f"deleted {event.path}"
        case LoadResolved():
            return f"loading {event.path}: {event.reason}" if event.path else f"nothing to load: {event.reason}"
        case FellBack():
            return f"passed over {event.path}, went back to {event.to}: {event.message}"
        case UploadStarted():
            return f"uploading the {_of(event)} to {event.path}"
        case UploadFinished():
            rate = event.gigabytes_per_second
            sent = "" if event.sent_bytes is None else f"{size(event.sent_bytes)} sent in "
            speed = "" if rate is None else f", at {rate:.2f} GB/s"
            return f"uploaded the {_of(event)} to {event.path}: {sent}{event.background_seconds or 0.0:.2f} s{speed}"
        case UploadFailed():
            what = "" if event.iteration is None else f"the {_of(event)} "
            return f"uploading {what}to {event.path} failed: {event.message}"
    return f"{event.kind.replace('_', ' ')}: {_of(event)}"


def _cost(event: CheckpointRescued | CheckpointConverted) -> str:
    parts = [] if event.total_bytes is None else [size(event.total_bytes)]
    parts += [] if event.seconds is None else [f"{event.seconds:.2f} s"]
    return f": {', '.join(parts)}" if parts else ""


def size(total: int) -> str:
    """Bytes in powers of 1024."""
    return f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"


def _of(event: Event) -> str:
    name = "checkpoint" if event.tier is None else NAMES[event.tier]
    return f"{name} of iteration {event.iteration}"
