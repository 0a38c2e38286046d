"""Events as scalars and texts of TensorBoard."""

from __future__ import annotations

from bridge.training.checkpointing.events.describing import describe
from bridge.training.checkpointing.events.kinds import Event, FellBack, SaveCommitted, SaveFailed, UploadFailed
from bridge.training.checkpointing.events.numbers import PREFIX, numbers_of
from bridge.training.checkpointing.events.sinks.requiring import require


class TensorBoardSink:
    """Writes to a directory that `tensorboard --logdir` shows."""

    def __init__(self, directory: str) -> None:
        """
        Args:
            directory: `logger.tensorboard_dir`.

        Raises:
            EventSinkError: tensorboard is not installed.
        """
        require("tensorboard", "logger.tensorboard_dir", "tensorboard")
        module = require("torch.utils.tensorboard", "logger.tensorboard_dir", "tensorboard")
        self._writer = module.SummaryWriter(directory)

    def take(self, event: Event) -> None:
        """Write the numbers of an event, and the text of one that somebody should look at."""
        for name, value in numbers_of(event).items():
            self._writer.add_scalar(name, value, event.iteration, walltime=event.time)
        if isinstance(event, SaveFailed | FellBack | UploadFailed):
            self._writer.add_text(f"{PREFIX}/trouble", describe(event), event.iteration, walltime=event.time)
        if isinstance(event, SaveCommitted | SaveFailed):
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
