"""Events as metrics of an experiment of Comet."""

from __future__ import annotations

from bridge.training.checkpointing.events.describing import describe
from bridge.training.checkpointing.events.kinds import Event, FellBack, LoadResolved, SaveFailed, UploadFailed
from bridge.training.checkpointing.events.numbers import PREFIX, numbers_of
from bridge.training.checkpointing.events.sinks.requiring import require


class CometSink:
    """Logs to an experiment of its own, and only events: Comet watches nothing else of the process."""

    def __init__(
        self,
        project: str,
        name: str | None,
        workspace: str | None,
        tags: list[str] | None,
        offline_directory: str | None,
    ) -> None:
        """
        Args:
            project: `logger.comet_project`.
            name: `logger.comet_experiment_name`.
            workspace: `logger.comet_workspace`.
            tags: `logger.comet_tags`.
            offline_directory: `logger.comet_offline_dir`; None sends to Comet, with the key in `COMET_API_KEY`.

        Raises:
            EventSinkError: comet_ml is not installed.
        """
        comet = require("comet_ml", "logger.comet_project", "comet")
        kind = comet.Experiment if offline_directory is None else comet.OfflineExperiment
        place = {} if offline_directory is None else {"offline_directory": offline_directory}
        self._experiment = kind(
            project_name=project,
            workspace=workspace,
            log_code=False,
            log_graph=False,
            log_git_metadata=False,
            log_git_patch=False,
            log_env_details=False,
            auto_param_logging=False,
            auto_metric_logging=False,
            auto_output_logging=False,
            parse_args=False,
            display_summary_level=0,
            **place,
        )
        if name is not None:
            self._experiment.set_name(name)
        self._experiment.add_tags(tags or [])

    def take(self, event: Event) -> None:
        """Log the numbers of an event, and the text of one that somebody should look at."""
        numbers = numbers_of(event)
        if numbers:
            self._experiment.log_metrics(numbers, step=event.iteration)
        if isinstance(event, SaveFailed | FellBack | UploadFailed):
            self._experiment.log_text(describe(event), step=event.iteration)
        if isinstance(event, LoadResolved):
            self._experiment.log_other(f"{PREFIX}/started_from", event.path or "scratch")

    def close(self) -> None:
        """End the experiment."""
        self._experiment.end()
