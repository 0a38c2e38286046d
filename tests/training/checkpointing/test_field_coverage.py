"""Every field of CheckpointConfig that this version carries out is read by the code that carries it out."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from bridge.training.config import CheckpointConfig
from bridge.training.config.availability import NOT_AVAILABLE
from tests.distributed.launch import run_ranks
from tests.training import fsdp
from tests.training.checkpointing.objects.store import running_server
from tests.training.tiny import run_to_end, tiny_config

FIELDS = {field.name for field in fields(CheckpointConfig)}
CARRIED_OUT = {name for name in FIELDS if f"checkpoint.{name}" not in NOT_AVAILABLE}


def fields_read_by_a_run(ranks: int = 1, *, megatron_fsdp: bool = False, **checkpoint: Any) -> set[str]:
    """Fields that code outside the configuration package reads; that package reads all of them, to check them."""

    def run() -> set[str]:
        read: set[str] = set()

        def note(config: CheckpointConfig, name: str) -> Any:
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if name in FIELDS and reader.startswith("bridge.") and not reader.startswith("bridge.training.config"):
                read.add(name)
            return object.__getattribute__(config, name)

        CheckpointConfig.__getattribute__ = note  # type: ignore[method-assign, assignment]  # in this forked rank only
        cfg = tiny_config(train_iters=2, ddp={"use_megatron_fsdp": megatron_fsdp}, checkpoint=checkpoint)
        (fsdp.run_to_end if megatron_fsdp else run_to_end)(cfg)
        return read

    return set().union(*run_ranks(run, ranks))


def test_every_available_field_is_read_by_what_it_controls(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    read = fields_read_by_a_run(save=first, save_interval=1, async_save=True)
    read |= fields_read_by_a_run(load=first, save=second)
    read |= fields_read_by_a_run(load=second, pretrained_checkpoint=first, finetune=True)
    read |= fields_read_by_a_run(load=str(tmp_path / "third"), pretrained_checkpoint=first)
    fourth = str(tmp_path / "fourth")
    read |= fields_read_by_a_run(load=fourth, save=fourth, dist_ckpt_optim_fully_reshardable=True)
    read |= fields_read_by_a_run(
        save=str(tmp_path / "fifth"),
        save_interval=1,
        most_recent_k=1,
        retain_best_k=1,
        retain_best_metric="loss",
        retain_iterations=[1],
        non_persistent_ckpt_type="global",
        non_persistent_save_interval=1,
    )
    copied = {"replication": True, "replication_jump": 1, "non_persistent_save_interval": 1}
    for kind in ("local", "in_memory"):
        read |= fields_read_by_a_run(
            2,
            save=str(tmp_path / kind),
            non_persistent_ckpt_type=kind,
            non_persistent_local_ckpt_dir=str(tmp_path / "node"),
            **copied,
        )
    sharded = {"save": str(tmp_path / "sharded"), "ckpt_format": "fsdp_dtensor", "megatron_fsdp": True}
    read |= fields_read_by_a_run(**sharded)
    read |= fields_read_by_a_run(load=sharded["save"], strict_fsdp_dtensor_load=True, **sharded)
    with running_server() as server:
        url = f"s3://{server.bucket()}/run"
        read |= fields_read_by_a_run(save=url, load=url, staging_dir=str(tmp_path / "staging"))
        read |= fields_read_by_a_run(save=str(tmp_path / "mirrored"), mirror=f"{url}-copy", mirror_required=True)
    assert read >= CARRIED_OUT, sorted(CARRIED_OUT - read)
