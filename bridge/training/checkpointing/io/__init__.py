"""The fast readers and writers of torch DCP files.

`TorchDistSaveStrategy` and `TorchDistLoadStrategy` are for those who use megatron-core's `dist_checkpointing` without
this project's manager, and `DirectReader` for those who use torch DCP.
"""

from __future__ import annotations

from bridge.training.checkpointing.io.reader import DirectReader
from bridge.training.checkpointing.io.reading import ReadOptions, ReadStats
from bridge.training.checkpointing.io.strategy import TorchDistLoadStrategy

# After `strategy`, which the formats need, and which this needs the formats for.
from bridge.training.checkpointing.io.background_writer import Patience  # isort: skip
from bridge.training.checkpointing.io.save_strategy import TorchDistSaveStrategy  # isort: skip

__all__ = [
    "DirectReader",
    "Patience",
    "ReadOptions",
    "ReadStats",
    "TorchDistLoadStrategy",
    "TorchDistSaveStrategy",
]
