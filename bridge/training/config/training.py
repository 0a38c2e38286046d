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
