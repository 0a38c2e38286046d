"""The fast readers of torch DCP files.

`TorchDistLoadStrategy` is for those who use megatron-core's `dist_checkpointing` without this project's manager, and
`DirectReader` for those who use torch DCP.
"""

from __future__ import annotations

from bridge.training.checkpointing.io.reader import DirectReader
from bridge.training.checkpointing.io.reading import ReadOptions, ReadStats
from bridge.training.checkpointing.io.strategy import TorchDistLoadStrategy

__all__ = ["DirectReader", "ReadOptions", "ReadStats", "TorchDistLoadStrategy"]
