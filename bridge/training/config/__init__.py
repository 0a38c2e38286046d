"""Configuration of a run: typed sections, recipes with overlays and overrides, rules between settings.

Importing this package needs neither torch nor megatron-core.
"""

from bridge.training.config.checkpoint import CheckpointConfig
from bridge.training.config.container import ConfigContainer
from bridge.training.config.data import DatasetConfig, TokenizerConfig
from bridge.training.config.errors import ConfigError
from bridge.training.config.loading import load_config
from bridge.training.config.model import GPTModelConfig
from bridge.training.config.optimizer import DistributedDataParallelConfig, OptimizerConfig, SchedulerConfig
from bridge.training.config.peft import LoRAConfig
from bridge.training.config.training import (
    DistributedInitConfig,
    LoggerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigContainer",
    "ConfigError",
    "DatasetConfig",
    "DistributedDataParallelConfig",
    "DistributedInitConfig",
    "GPTModelConfig",
    "LoRAConfig",
    "LoggerConfig",
    "OptimizerConfig",
    "RNGConfig",
    "RerunStateMachineConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "load_config",
]
