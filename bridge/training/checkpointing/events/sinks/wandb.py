"""Events as metrics of a run of Weights & Biases."""

from __future__ import annotations

import uuid
from typing import Any

from bridge.training.checkpointing.events.describing import describe
from bridge.training.checkpointing.events.kinds import Event, FellBack, LoadResolved, SaveFailed, UploadFailed
from bridge.training.checkpointing.events.numbers import PREFIX, numbers_of
from bridge.training.checkpointing.events.sinks.requiring import require

_STEP = f"{PREFIX}/iteration"


class WandbSink:
    """Logs to a run of its own, and only events. `WANDB_MODE=offline` keeps it in files.

    A run that training has begun is left alone: W&B's steps only go up, and each of our rows would take the place of
    rows that training is still going to log.
    """

    def __init__(self, project: str, name: str | None, entity: str | None, directory: str | None) -> None:
        """
        Args:
            project: `logger.wandb_project`.
            name: `logger.wandb_exp_name`.
            entity: `logger.wandb_entity`.
            directory: `logger.wandb_save_dir`.

        Raises:
            EventSinkError: wandb is not installed.
        """
        wandb = require("wandb", "logger.wandb_project", "wandb")
        # The command line, the output and the state of the machine are for whoever trains to show, or not.
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run: Any = wandb.init(
            project=project,
            name=name,
            entity=entity,
            dir=directory,
            # WANDB_RUN_ID and WANDB_RESUME, where they are set, are meant for the run of training.
            id=uuid.uuid4().hex[:12],
            resume="never",
            reinit="create_new",
            settings=settings,
        )
        # What is shown goes by the checkpoint's iteration.
        self._run.define_metric(f"{PREFIX}/*", step_metric=_STEP)

    def take(self, event: Event) -> None:
        """Log the numbers of an event, and raise an alert for one that somebody should look at."""
        numbers = numbers_of(event)
        if numbers:
            self._run.log({_STEP: event.iteration, **numbers})
        if isinstance(event, SaveFailed | FellBack | UploadFailed):
            self._run.alert(title=event.kind.replace("_", " "), text=describe(event))
        if isinstance(event, LoadResolved):
            self._run.summary[f"{PREFIX}/started_from"] = event.path or "scratch"

    def close(self) -> None:
        """End the run."""
        self._run.finish()
