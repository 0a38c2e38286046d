"""The run itself: how long it trains, its random numbers, its processes and what it logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TrainingConfig:
    """Length and batch sizes of training, and the conditions under which it stops early."""

    train_iters: int | None = None
    """Iterations at which training has reached its end, counted from the very first start. Required."""

    micro_batch_size: int = 1
    """Sequences that a rank processes at once."""

    global_batch_size: int | None = None
    """Sequences in one iteration over all ranks; None is `micro_batch_size` times the data-parallel size."""

    rampup_batch_size: list[int] | None = None
    """`[start, increment, samples]`: the global batch grows from `start` while `samples` are consumed."""

    exit_signal_handler: bool = False
    """Whether `exit_signal`, received by any rank, ends training after the running iteration, with a checkpoint."""

    exit_signal: Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"] = "SIGTERM"
    """The signal that `exit_signal_handler` answers."""

    exit_duration_in_mins: float | None = None
    """Minutes after which training saves and exits."""

    exit_interval: int | None = None
    """Save and exit after an iteration that is a multiple of this."""


@dataclass(kw_only=True)
class RNGConfig:
    """Seeds of the model's initialization and dropout."""

    seed: int = 1234
    """Base seed; every rank derives its own from it."""

    data_parallel_random_init: bool = False
    """Whether data-parallel ranks draw different numbers."""


@dataclass(kw_only=True)
class DistributedInitConfig:
    """How the processes of a run find one another."""

    backend: Literal["nccl", "gloo"] | None = None
    """Backend of the process groups; None is nccl with CUDA and gloo without."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that some rank never joined fails."""

    use_torch_fsdp2: bool = False
    """Whether torch FSDP2 shards the model over the data-parallel ranks."""


@dataclass(kw_only=True)
class RerunStateMachineConfig:
    """What is done about a step whose loss is not a number."""

    rerun_mode: Literal["disabled", "validate_results"] = "disabled"
    """`validate_results` repeats the step, at once and then after a restart, to tell hardware faults from others."""

    error_injection_rate: int = 0
    """Simulate a fault in one of this many steps, at random; 0 simulates none."""

    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = "transient_error"
    """What the simulated fault turns out to be."""


@dataclass(kw_only=True)
class LoggerConfig:
    """What a run tells about itself."""

    log_interval: int = 1
    """Iterations between lines on the console; the metrics file always has every iteration."""

    metrics_path: str | None = None
    """File to which one JSON object an iteration is appended; None writes none."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""

    checkpoint_events: bool = True
    """Whether what happens to checkpoints is kept in `checkpoint.save`, in the file `.bridge-events.jsonl`."""

    show_progress: bool = True
    """Whether rank 0 shows how far a long load is: as a bar on a terminal, as lines of level INFO otherwise."""

    tensorboard_dir: str | None = None
    """Directory that TensorBoard shows, for checkpoint events; None writes nothing for it."""

    wandb_project: str | None = None
    """Project of Weights & Biases; None sends nothing there."""

    wandb_exp_name: str | None = None
    """Name of the run in `wandb_project`; None leaves it to Weights & Biases."""

    wandb_entity: str | None = None
    """User or team of `wandb_project`."""

    wandb_save_dir: str | None = None
    """Directory in which Weights & Biases keeps its files; None is the working directory."""

    mlflow_experiment: str | None = None
    """Experiment of MLflow, made if it does not exist; None sends nothing there."""

    mlflow_run_name: str | None = None
    """Name of the run in `mlflow_experiment`; None leaves it to MLflow."""

    mlflow_tracking_uri: str | None = None
    """Where MLflow keeps its runs; None is MLflow's own setting."""

    mlflow_tags: dict[str, str] | None = None
    """Tags of the run in `mlflow_experiment`."""

    comet_project: str | None = None
    """Project of Comet; None sends nothing there. The key is taken from `COMET_API_KEY`."""

    comet_experiment_name: str | None = None
    """Name of the experiment in `comet_project`; None leaves it to Comet."""

    comet_workspace: str | None = None
    """Workspace of `comet_project`."""

    comet_tags: list[str] | None = None
    """Tags of the experiment in `comet_project`."""

    comet_offline_dir: str | None = None
    """Directory for the experiment's files, instead of sending it to Comet."""

    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector, which gets saves and loads as spans over HTTP; None sends none."""
