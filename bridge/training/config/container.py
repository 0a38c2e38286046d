"""`ConfigContainer`: everything that one run is configured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from bridge.training.config.checkpoint import CheckpointConfig
from bridge.training.config.data import DatasetConfig, TokenizerConfig
from bridge.training.config.errors import ConfigError
from bridge.training.config.model import GPTModelConfig
from bridge.training.config.optimizer import DistributedDataParallelConfig, OptimizerConfig, SchedulerConfig
from bridge.training.config.parallel_rules import data_parallel_size
from bridge.training.config.peft import LoRAConfig
from bridge.training.config.serialization import from_plain, read_yaml, to_plain, write_yaml
from bridge.training.config.training import (
    DistributedInitConfig,
    LoggerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    TrainingConfig,
)
from bridge.training.config.validation import violations


@dataclass(kw_only=True)
class ConfigContainer:
    """All sections of a run's configuration.

    Making one checks nothing; call `validate` before using it.
    """

    model: GPTModelConfig = field(default_factory=GPTModelConfig)
    """Architecture, precision and parallel sizes."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and loss scaling."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Learning rate and weight decay over time."""

    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    """Data-parallel reduction."""

    train: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, batch sizes and early exits."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Training data."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and loading."""

    rng: RNGConfig = field(default_factory=RNGConfig)
    """Seeds."""

    dist: DistributedInitConfig = field(default_factory=DistributedInitConfig)
    """Process groups."""

    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Console and metrics."""

    rerun_state_machine: RerunStateMachineConfig = field(default_factory=RerunStateMachineConfig)
    """Repeating steps that went wrong."""

    peft: LoRAConfig | None = None
    """Parameter-efficient fine-tuning of `checkpoint.pretrained_checkpoint`; None trains the whole model."""

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel replicas of the model among `world_size` ranks.

        Raises:
            ConfigError: the ranks cannot be divided among tensor, pipeline and context parallelism.
        """
        return data_parallel_size(self.model, world_size)

    def validate(self, world_size: int | None = None) -> None:
        """Check every setting and every rule between settings.

        Args:
            world_size: ranks of the run; None leaves out the rules that depend on it.

        Raises:
            ConfigError: at least one violation; `problems` lists them all, each with setting, value and fix.
        """
        problems = violations(self, world_size)
        if problems:
            raise ConfigError(problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names, each dataclass with its `_target_`, as in run_config.yaml.

        Raises:
            ConfigError: a free-form setting holds something that YAML has no plain form for.
        """
        return to_plain(self)

    def to_yaml(self, path: str | PathLike[str] | None = None) -> str:
        """The text of run_config.yaml, also written to `path` unless that is None.

        Raises:
            ConfigError: as in `to_dict`.
            OSError: `path` cannot be written.
        """
        return write_yaml(self, path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConfigContainer:
        """The reverse of `to_dict`; a missing setting takes its default.

        Raises:
            ConfigError: an unknown setting, a value of the wrong type, or a foreign `_target_`.
        """
        return from_plain(cls, values)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> ConfigContainer:
        """Read a file that `to_yaml` wrote. Nothing that the file names is imported or called.

        Raises:
            ConfigError: the file is missing, no YAML, or as in `from_dict`.
        """
        return read_yaml(cls, path)
