"""What a run knows about itself: how far it got (TrainState) and what it is made of (GlobalState)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.failures.history import SaveFailures
from bridge.training.checkpointing.queue import SaveQueue

if TYPE_CHECKING:
    from bridge.peft import PEFT
    from bridge.training.checkpointing.contents.dataloader import DataloaderState
    from bridge.training.config import ConfigContainer


@dataclass
class TrainState:
    """Progress of a run, in the fields and tensor types that `train_state.pt` holds.

    Counts are totals over all data-parallel ranks since the start of training.
    """

    step: int = 0
    """Completed optimizer steps (iterations)."""
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    floating_point_operations_so_far: int = 0
    """Model FLOPs spent. Stored as float64, so the loop keeps it at values that float64 represents exactly."""
    do_train: bool = True
    do_valid: bool = False
    do_test: bool = False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The fields as 0-d tensors: counts int64, FLOPs float64, flags bool."""
        state: dict[str, torch.Tensor] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool):
                dtype = torch.bool
            elif item.name == "floating_point_operations_so_far":
                dtype = torch.float64
            else:
                dtype = torch.int64
            state[item.name] = torch.tensor(value, dtype=dtype)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take every field that `state` holds, as tensors or numbers; absent fields keep their value."""
        for item in fields(self):
            if item.name not in state:
                continue
            value = state[item.name]
            number = value.item() if isinstance(value, torch.Tensor) else value
            current = getattr(self, item.name)
            setattr(self, item.name, bool(number) if isinstance(current, bool) else int(number))


@dataclass
class GlobalState:
    """Everything that the loop and the checkpoint layer share during one run.

    It is made once by `setup` and passed along; nothing keeps a module-level copy.
    """

    cfg: ConfigContainer
    train_state: TrainState = field(default_factory=TrainState)
    tokenizer: Any | None = None
    async_calls_queue: SaveQueue | None = field(default_factory=SaveQueue)
    """Asynchronous saves under way on this rank, the same number on every rank."""
    save_failures: SaveFailures = field(default_factory=SaveFailures)
    """Saves that have failed in a row."""
    events: EventStream = field(default_factory=EventStream)
    """Takes what happens to checkpoints to those who want to know."""
    dataloader_state: DataloaderState | None = None
    """What the loaded checkpoint holds for this rank's data iterator, until the iterator takes it."""
    loaded_from: str | None = None
    """Directory of the checkpoint that this run started from; None for a fresh start."""
    loaded_kind: CheckpointKind | None = None
    """Of which kind that checkpoint is."""
    resumed_at: int | None = None
    """Iteration that this run goes on from; 0 for a fresh start, None before anything was loaded or found absent."""
    resumed_start: tuple[str, int] = ("", 0)
    """Save directory of the run that saved the checkpoint which this run goes on from, and the number of its start."""
    counted_starts: dict[str, int] = field(default_factory=dict)
    """By save directory, the number under which this process saves there since it has last loaded something."""
    peft: PEFT | None = None
    """What the model was adapted by; from then on checkpoints hold its adapters only. None trains the whole model."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the last step measured, by name, on the ranks that know it; saved with a checkpoint, to choose the best."""
    base_checkpoint: str | None = None
    """Directory of the checkpoint that the model came from which `peft` adapted."""

    def begin_anew(self) -> None:
        """Take note that something was loaded, or found absent: what this process saves from now on goes on from there.

        Until more is known, from a checkpoint of another run.
        """
        self.resumed_start = ("", 0)
        self.counted_starts.clear()
