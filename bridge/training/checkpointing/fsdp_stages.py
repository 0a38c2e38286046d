"""The documented functions that save and load `fsdp_dtensor` step by step, for programs that own their training loop.

`save_checkpoint` and `load_checkpoint` do not use those that save and load: what these write is not published as one
whole, and torch's own collectives, inside them, wait for a rank that fails. They are made of the same pieces otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_finalize
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.state_dict_saver import save

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.fsdp_dtensor import (
    MODEL,
    OPTIMIZER,
    preprocess_fsdp_dtensor_state_dict,
    preprocess_on_all_ranks,
)
from bridge.training.checkpointing.errors import CheckpointMismatchError, CheckpointNotFoundError
from bridge.training.checkpointing.formats.fsdp_dtensor import create_fsdp_dtensor_storage_writer
from bridge.training.checkpointing.formats.fsdp_dtensor_reading import read_values
from bridge.training.checkpointing.layout import RELEASE, iteration_name
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.source import require_whole
from bridge.training.checkpointing.stages import CheckpointType

LIVE_MODEL = "_model"
"""Key of the state dict to load under which the list of the run's model chunks lies."""


def save_fsdp_dtensor_checkpoint(
    checkpoint_path: str | Path,
    state_dict: dict[str, Any],
    *,
    cfg: Any,
    model: Any,
    storage_writer: Any | None = None,
    barrier: bool = True,
) -> Any:
    """Preprocess a state dict and save it with torch DCP. Collective.

    Args:
        checkpoint_path: the directory to write, where there is no `storage_writer`.
        state_dict: raw, as `generate_state_dict` returns it. Left as it is.
        cfg: passed on to `preprocess_fsdp_dtensor_state_dict`.
        model: the model chunk under Megatron FSDP.
        storage_writer: torch DCP's writer to use.
        barrier: whether ranks wait for one another when they have saved.

    Returns:
        What `torch.distributed.checkpoint.save` returns.
    """
    writer = storage_writer or create_fsdp_dtensor_storage_writer(str(checkpoint_path))
    saved = save(preprocess_fsdp_dtensor_state_dict(cfg, state_dict, model), storage_writer=writer)
    if barrier and dist.is_initialized():
        dist.barrier()
    return saved


def load_fsdp_dtensor_checkpoint(
    load_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int | None,
    release: bool = False,
    checkpoint_path_override: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    cfg: Any | None = None,
) -> tuple[dict[str, Any], str, bool, CheckpointType]:
    """Load the state dict of one `fsdp_dtensor` checkpoint. Collective, but with `rank0`.

    Args:
        load_dir: directory of checkpoints.
        ckpt_cfg: checkpoint configuration; `strict_fsdp_dtensor_load` decides about tensors that the checkpoint lacks.
        rank0: read nothing; the format keeps nothing apart that could be read alone.
        sharded_state_dict: raw, as `generate_state_dict` returns it, with the model chunks under `_model`. Its tensors
            are read into, and its other values are replaced. Needed unless `rank0`.
        iteration: which iteration; without meaning with `release` or an override.
        release: load the release checkpoint.
        checkpoint_path_override: the checkpoint's own directory.
        checkpointing_context: accepted for compatibility.
        cfg: passed on to `preprocess_fsdp_dtensor_state_dict`.

    Returns:
        (state dict, path, release, CheckpointType.FSDP_DTENSOR); the state dict is empty with `rank0`. The sections
        `model` and `optimizer` have the raw keys again.

    Raises:
        CheckpointError: the checkpoint is absent, damaged, or does not fit. Every rank raises.
    """
    del checkpointing_context
    allow(getattr(ckpt_cfg, "safe_globals", None))
    if checkpoint_path_override is not None:
        path = Path(checkpoint_path_override)
    else:
        path = Path(load_dir) / (RELEASE if release else iteration_name(iteration or 0))
    if not path.is_dir():
        raise CheckpointNotFoundError(f"there is no checkpoint {path}")
    if rank0:
        return {}, str(path), release, CheckpointType.FSDP_DTENSOR
    if sharded_state_dict is None or LIVE_MODEL not in sharded_state_dict:
        raise CheckpointMismatchError(
            f"loading fsdp_dtensor needs sharded_state_dict, a template with the model chunks under {LIVE_MODEL!r}"
        )
    ranks = Ranks.current()
    ranks.first("examining the checkpoint", lambda: require_whole(path) and None)
    raw = {key: value for key, value in sharded_state_dict.items() if key != LIVE_MODEL}
    loaded = _load(raw, path, sharded_state_dict[LIVE_MODEL][0], ckpt_cfg, cfg, ranks)
    return loaded, str(path), release, CheckpointType.FSDP_DTENSOR


def _load(raw: dict[str, Any], path: Path, model: Any, ckpt_cfg: Any, cfg: Any, ranks: Ranks) -> dict[str, Any]:
    template = preprocess_on_all_ranks(cfg, raw, model, ranks)
    metadata = ranks.run("reading what the checkpoint holds", lambda: read_payload_metadata(path))
    flat, places = flatten_state_dict(template)
    tensors = {key: value for key, value in flat.items() if hasattr(value, "dtype")}
    objects = [key for key in flat if key not in tensors and key in metadata.state_dict_metadata]
    strictness = "raise_unexpected" if ckpt_cfg.strict_fsdp_dtensor_load else "log_unexpected"
    values = read_values(tensors, objects, path, metadata, ranks, strictness=strictness)
    for key, value in values.objects.items():
        set_element(template, places[key], value)
    template[MODEL] = raw[MODEL]
    if OPTIMIZER in raw:
        template[OPTIMIZER] = {**template[OPTIMIZER], "state": raw[OPTIMIZER]["state"]}
    return template


def get_save_and_finalize_callbacks(writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
    """The request of an asynchronous save with megatron-core's writer, for `schedule_async_save`.

    Args:
        writer: megatron-core's `FileSystemWriterAsync`, which has planned the save.
        save_state_dict_ret: what megatron-core's `save_state_dict_async_plan` returned: first what finalizes the save.

    Returns:
        A request that writes this rank's files, and writes `.metadata` when all ranks have written.
    """
    write, preload, args = writer.get_save_function_and_args()

    def finalize() -> None:
        save_state_dict_async_finalize(*save_state_dict_ret)

    return AsyncRequest(write, args, [finalize], async_fn_kwargs={}, preload_fn=preload)
