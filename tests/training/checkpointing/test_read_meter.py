"""What is shown of a load while this process reads."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from bridge.training.checkpointing import restoring
from bridge.training.checkpointing.read_meter import bytes_read, bytes_wanted, shown
from bridge.training.config import LoggerConfig
from bridge.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.skipif(bytes_read() is None, reason="this kernel does not count what processes read")
def test_what_is_read_is_counted_and_shown_as_a_bar_that_goes_away(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(8 << 20))
    before = bytes_read()
    stream = Terminal()
    with shown(Progress(stream), "reading iter_0000040", 64 << 20):
        deadline = time.monotonic() + 60
        while "of 64.0 MiB" not in stream.getvalue() and time.monotonic() < deadline:
            file.read_bytes()
            time.sleep(0.05)
    after = bytes_read()
    assert before is not None and after is not None
    assert after - before >= 8 << 20
    assert stream.getvalue().startswith("\r\x1b[Kreading iter_0000040")
    assert stream.getvalue().endswith("\r\x1b[K")


def test_nothing_is_shown_to_nobody() -> None:
    with shown(None, "reading", 1):
        pass


def test_a_load_does_not_fail_because_nothing_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    with shown(Progress(Terminal()), "reading", 1):
        done.append("loaded")
    assert done == ["loaded"]


def test_an_error_of_the_load_passes_through() -> None:
    with pytest.raises(ValueError, match="damaged"), shown(Progress(Terminal()), "reading", 1):
        raise ValueError("damaged")


def test_the_bytes_that_are_wanted_are_those_of_this_ranks_tensors() -> None:
    tensor = torch.zeros(10, dtype=torch.float32)
    template = {
        "model": {"a": ShardedTensor.from_rank_offsets("a", tensor), "b": [tensor, (tensor,)]},
        "object": ShardedObject("c", io.BytesIO(b"text"), (1,), (0,)),
        "array": np.zeros(3),
        "number": 3,
        "none": None,
    }
    assert bytes_wanted(template) == 3 * 40 + 24

    class Odd:
        @property
        def data(self) -> None:
            raise RuntimeError("no storage")

    assert bytes_wanted([tensor, Odd()]) == 0


@pytest.mark.parametrize(
    ("settings", "is_shown"),
    [({}, True), ({"show_progress": False}, False), ({"log_level": "WARNING"}, False), ({"log_level": "DEBUG"}, True)],
)
def test_the_logger_section_decides_whether_it_is_shown(
    settings: dict[str, object], is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    progress = restoring._progress(LoggerConfig(**settings))  # type: ignore[arg-type]
    clock = SimpleNamespace(now=0.0)
    progress._clock = lambda: clock.now
    for moment in (0.0, 1.0):
        clock.now = moment
        progress("reading", 1, 2)
    assert bool(stream.getvalue()) == is_shown
