"""Every field of CheckpointConfig that this version carries out is read by the code that carries it out."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from bridge.training.config import CheckpointConfig
from bridge.training.config.availability import NOT_AVAILABLE
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config

FIELDS = {field.name for field in fields(CheckpointConfig)}
CARRIED_OUT = {name for name in FIELDS if f"checkpoint.{name}" not in NOT_AVAILABLE}


def fields_read_by_a_run(**checkpoint: Any) -> set[str]:
    """Fields that code outside the configuration package reads; that package reads all of them, to check them."""

    def run() -> set[str]:
        read: set[str] = set()

        def note(config: CheckpointConfig, name: str) -> Any:
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if name in FIELDS and reader.startswith("bridge.") and not reader.startswith("bridge.training.config"):
                read.add(name)
            return object.__getattribute__(config, name)

        CheckpointConfig.__getattribute__ = note  # type: ignore[method-assign, assignment]  # in this forked rank only
        run_to_end(tiny_config(train_iters=2, checkpoint=checkpoint))
        return read

    return set(run_ranks(run, 1)[0])


def test_every_available_field_is_read_by_what_it_controls(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    read = fields_read_by_a_run(save=first, save_interval=1, async_save=True)
    read |= fields_read_by_a_run(load=first, save=second)
    read |= fields_read_by_a_run(load=second, pretrained_checkpoint=first, finetune=True)
    read |= fields_read_by_a_run(load=str(tmp_path / "third"), pretrained_checkpoint=first)
    fourth = str(tmp_path / "fourth")
    read |= fields_read_by_a_run(load=fourth, save=fourth, dist_ckpt_optim_fully_reshardable=True)
    assert read >= CARRIED_OUT, sorted(CARRIED_OUT - read)
