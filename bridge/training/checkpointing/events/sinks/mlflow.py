"""Events as metrics of a run of MLflow."""

from __future__ import annotations

from typing import Any

from bridge.training.checkpointing.events.describing import describe
from bridge.training.checkpointing.events.kinds import Event, FellBack, LoadResolved, RunEnded, SaveFailed, UploadFailed
from bridge.training.checkpointing.events.numbers import PREFIX, numbers_of
from bridge.training.checkpointing.events.sinks.requiring import require

_LONGEST_TAG = 5000


class MlflowSink:
    """Logs to a run of its own, through a client of its own: MLflow's run of the process is left alone."""

    def __init__(
        self, experiment: str, run_name: str | None, tracking_uri: str | None, tags: dict[str, str] | None
    ) -> None:
        """
        Args:
            experiment: `logger.mlflow_experiment`, made if it does not exist.
            run_name: `logger.mlflow_run_name`.
            tracking_uri: `logger.mlflow_tracking_uri`; None is MLflow's own setting.
            tags: `logger.mlflow_tags`.

        Raises:
            EventSinkError: mlflow is not installed.
        """
        mlflow = require("mlflow", "logger.mlflow_experiment", "mlflow")
        entities = require("mlflow.entities", "logger.mlflow_experiment", "mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if known is None else known.experiment_id
        run = self._client.create_run(number, tags=tags, run_name=run_name)
        self._metric: Any = entities.Metric
        self._run: str = run.info.run_id
        self._has_ended = False

    def take(self, event: Event) -> None:
        """Log the numbers of an event, and set a tag for one that somebody should look at."""
        self._has_ended = isinstance(event, RunEnded)
        moment, step = int(1000 * event.time), event.iteration or 0
        metrics = [self._metric(name, value, moment, step) for name, value in numbers_of(event).items()]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)
        if isinstance(event, SaveFailed | FellBack | UploadFailed):
            self._client.set_tag(self._run, f"{PREFIX}.trouble", describe(event)[:_LONGEST_TAG])
        if isinstance(event, LoadResolved):
            self._client.set_tag(self._run, f"{PREFIX}.started_from", event.path or "scratch")

    def close(self) -> None:
        """End the run: as failed, where the run that trains did not end in good order."""
        self._client.set_terminated(self._run, status="FINISHED" if self._has_ended else "FAILED")
