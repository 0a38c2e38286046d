"""What a run tells about each iteration: a line on the console and a JSON object in a file."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from bridge.training.logs import EVERY_RANK

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One iteration. Counts and loss are over all ranks."""

    iteration: int
    loss: float
    """Mean over the iteration's tokens that count, in nats."""
    grad_norm: float | None
    """L2 norm before clipping; None where the optimizer did not compute one."""
    lr: float
    """Learning rate that this iteration's update used."""
    consumed_train_samples: int
    seconds: float
    """Wall time from the start of the iteration to the end of its update."""
    skipped: bool
    """Whether the update was left out because a gradient overflowed (fp16)."""

    def to_json(self) -> str:
        """One line of JSON; floats keep every digit."""
        return json.dumps(asdict(self))

    def console_line(self, train_iters: int, tokens: int) -> str:
        """The iteration in words. `tokens` is the number of tokens in it, over all ranks."""
        norm = "none" if self.grad_norm is None else f"{self.grad_norm:.4f}"
        return (
            f"iteration {self.iteration}/{train_iters} | loss {self.loss!r} | grad norm {norm} | "
            f"lr {self.lr:.4e} | {1000 * self.seconds:.1f} ms | {tokens / self.seconds:.0f} tokens/s"
            + (" | update skipped: gradient overflow" if self.skipped else "")
        )


class MetricsFile:
    """A file of JSON lines, one an iteration, each on disk's way (flushed) before the next begins.

    Lines are appended: a resumed run continues the file, and repeats the iterations after the checkpoint.
    """

    def __init__(self, path: Path | None) -> None:
        """Open `path` and make its directory; None writes nothing."""
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append a line."""
        if self._file is not None:
            self._file.write(metrics.to_json() + "\n")
            self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def log_step(metrics: StepMetrics, train_iters: int, tokens: int) -> None:
    """Log the console line; only the rank that has the loss calls this."""
    logger.info(metrics.console_line(train_iters, tokens), extra=EVERY_RANK)
