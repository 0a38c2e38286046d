"""The sinks that a run's logger section asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import EventSinkError
from bridge.training.checkpointing.events.describing import without_credentials
from bridge.training.checkpointing.events.sinks.comet import CometSink
from bridge.training.checkpointing.events.sinks.late import LateSink
from bridge.training.checkpointing.events.sinks.mlflow import MlflowSink
from bridge.training.checkpointing.events.sinks.opentelemetry import OpenTelemetrySink
from bridge.training.checkpointing.events.sinks.requiring import require
from bridge.training.checkpointing.events.sinks.tensorboard import TensorBoardSink
from bridge.training.checkpointing.events.sinks.wandb import WandbSink
from bridge.training.checkpointing.events.stream import EventStream, Sink

if TYPE_CHECKING:
    from bridge.training.config import LoggerConfig


def add_configured(events: EventStream, logger_config: LoggerConfig, ranks: Ranks) -> None:
    """Bring events to the programs that the logger section asks for. Collective; on rank 0 the sinks are made.

    A program that is elsewhere is not asked for anything here: that it cannot be reached costs events, no run.

    Raises:
        EventSinkError: a library is missing, or what is kept on this machine cannot be. Every rank raises, and events
            go nowhere any more.
    """
    wanted = _wanted(logger_config)
    if not wanted:
        return

    def make() -> None:
        for each in wanted:
            try:
                if each.library:
                    require(each.library, each.setting, each.extra)
                    events.add(each.name, lambda make=each.make: LateSink(make))  # type: ignore[misc]
                else:
                    events.add(each.name, each.make)
            except EventSinkError:
                raise
            except Exception as error:
                raise EventSinkError(
                    f"{each.setting}: {each.name} cannot be used: {type(error).__name__}: "
                    f"{without_credentials(str(error))}; check the settings around it, or leave them out"
                ) from error

    try:
        ranks.first("preparing what checkpoint events are brought to", make)
    except BaseException:
        events.close()
        raise


@dataclass(frozen=True)
class _Wanted:
    """A program that the settings ask for."""

    name: str
    setting: str
    """The one that asks for it."""
    extra: str
    make: Callable[[], Sink]
    library: str = ""
    """What is needed to reach a program that is elsewhere; empty: its sink is made at once."""


def _wanted(cfg: LoggerConfig) -> list[_Wanted]:
    wanted = []
    if (directory := cfg.tensorboard_dir) is not None:
        wanted.append(
            _Wanted("TensorBoard", "logger.tensorboard_dir", "tensorboard", lambda: TensorBoardSink(directory))
        )
    if (project := cfg.wandb_project) is not None:

        def to_wandb() -> Sink:
            return WandbSink(project, cfg.wandb_exp_name, cfg.wandb_entity, cfg.wandb_save_dir)

        wanted.append(_Wanted("Weights & Biases", "logger.wandb_project", "wandb", to_wandb, "wandb"))
    if (experiment := cfg.mlflow_experiment) is not None:

        def to_mlflow() -> Sink:
            return MlflowSink(experiment, cfg.mlflow_run_name, cfg.mlflow_tracking_uri, cfg.mlflow_tags)

        wanted.append(_Wanted("MLflow", "logger.mlflow_experiment", "mlflow", to_mlflow, "mlflow"))
    if (comet := cfg.comet_project) is not None:

        def to_comet() -> Sink:
            return CometSink(
                comet, cfg.comet_experiment_name, cfg.comet_workspace, cfg.comet_tags, cfg.comet_offline_dir
            )

        wanted.append(_Wanted("Comet", "logger.comet_project", "comet", to_comet, "comet_ml"))
    if (endpoint := cfg.otlp_endpoint) is not None:
        # Its sink asks nobody before there is a span.
        wanted.append(
            _Wanted("OpenTelemetry", "logger.otlp_endpoint", "opentelemetry", lambda: OpenTelemetrySink(endpoint))
        )
    return wanted
