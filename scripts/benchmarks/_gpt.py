"""What the benchmarks of real training share: GPTs of a chosen size, and what other programs save of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

MOE = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01, "add_bias_linear": False}


def gpt_run(
    directory: Path,
    layers: int,
    hidden: int,
    model: dict[str, Any] | None = None,
    is_saving: bool = True,
    **checkpoint: Any,
) -> Any:
    """A run that trains on synthetic data and saves in `directory`.

    Args:
        directory: where it saves.
        layers: of the model.
        hidden: its hidden size.
        model: further settings of the model.
        is_saving: whether it saves at all.
        **checkpoint: further settings of the section `checkpoint`.
    """
    from bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DatasetConfig,
        GPTModelConfig,
        TokenizerConfig,
        TrainingConfig,
    )
    from bridge.training.setup import setup

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    saving: dict[str, Any] = {"save": str(directory), "save_interval": 100_000, "most_recent_k": 1}
    cfg = ConfigContainer(
        model=GPTModelConfig(
            num_layers=layers, hidden_size=hidden, num_attention_heads=8, seq_length=32, **(model or {})
        ),
        train=TrainingConfig(train_iters=100_000, micro_batch_size=1, global_batch_size=ranks),
        dataset=DatasetConfig(mock=True),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        checkpoint=CheckpointConfig(**{**saving, **checkpoint}),
    )
    if not is_saving:
        cfg.checkpoint = CheckpointConfig()
    cfg.logger.log_level = "ERROR"
    return setup(cfg)


def beside(run: Any, directory: Path, **checkpoint: Any) -> Any:
    """The same model and optimizer with a manager and a directory of their own."""
    from bridge.training.checkpointing import create_checkpoint_manager
    from bridge.training.state import GlobalState

    cfg = replace(run.cfg, checkpoint=replace(run.cfg.checkpoint, save=str(directory), **checkpoint))
    state = GlobalState(cfg=cfg, tokenizer=run.state.tokenizer)
    return replace(run, state=state, manager=create_checkpoint_manager(cfg.checkpoint))


def step(run: Any) -> None:
    """Train for one iteration."""
    from bridge.training.step import train_step

    train_step(run.cfg, run.model, run.optimizer, run.scheduler, run.train_data_iterator)
    run.state.train_state.step += 1


def save(run: Any) -> None:
    """Save, or begin to, as the training loop does: to a non-persistent tier if the run has one."""
    from bridge.training.checkpointing import CheckpointSaveContext

    context = CheckpointSaveContext(
        run.state,
        run.model,
        run.optimizer,
        run.scheduler,
        0,
        run.train_data_iterator,
        non_persistent_ckpt=run.cfg.checkpoint.non_persistent_ckpt_type is not None,
        pg_collection=run.pg_collection,
    )
    run.manager.save(context, None)


def load(run: Any) -> int:
    """Load the newest checkpoint; return its iteration."""
    from bridge.training.checkpointing import CheckpointLoadContext

    run.cfg.checkpoint.load = run.cfg.checkpoint.save
    context = CheckpointLoadContext(run.state, run.model, run.optimizer, run.scheduler, pg_collection=run.pg_collection)
    run.manager.load(context)
    return int(run.state.train_state.step)


def is_saved(run: Any) -> bool:
    """Look whether asynchronous saves are published, as the training loop does in each step."""
    from bridge.training.checkpointing import is_empty_async_queue

    run.manager.finalize_async_saves(run.state)
    return bool(is_empty_async_queue(run.state))


def sharded_state(run: Any, is_loading: bool = False) -> dict[str, Any]:
    """Model, optimizer and scheduler as megatron-core's `dist_checkpointing` takes them. Collective."""
    from bridge.training.checkpointing import generate_state_dict
    from bridge.training.checkpointing.contents.optimizer import build_sharded_state_dict_metadata

    cfg = run.cfg
    metadata = build_sharded_state_dict_metadata(cfg.ddp.use_distributed_optimizer, cfg.checkpoint)
    building = {"metadata": {**metadata, "dp_cp_group": run.pg_collection.dp_cp}}
    loading = {"is_loading": True} if is_loading else {}
    return generate_state_dict(
        cfg.checkpoint,
        run.model,
        run.optimizer,
        run.scheduler,
        None,
        run.state.train_state.step,
        optim_sd_kwargs={**building, **loading},
        model_sd_kwargs=building,
    )


def tensors_of(state: Any) -> dict[str, Any]:
    """The tensors of a sharded state dict by a name of each, as torch DCP takes them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    return {
        f"{item.key}/{item.global_offset}": item.data.detach()
        for item in nested_values(state)
        if isinstance(item, ShardedTensor) and item.data is not None
    }


def live_tensors(run: Any) -> dict[str, Any]:
    """Those of `tensors_of` that are the run's own, and not made, or left unfilled as padding, for a save."""
    first, second = tensors_of(sharded_state(run)), tensors_of(sharded_state(run))
    return {name: tensor for name, tensor in first.items() if second[name].data_ptr() == tensor.data_ptr()}


class Megatron:
    """megatron-core's own strategies as Megatron-LM sets them up, kept from save to save, with the plan cached."""

    def __init__(self, run: Any) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        self._run = run
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        self._strategy = FullyParallelSaveStrategyWrapper(strategy, run.pg_collection.dp_cp, True)
        self._queue = AsyncCallsQueue()

    def save(self, place: Path, *, background: bool) -> None:
        """Save into an empty directory, or with `background` begin to."""
        from megatron.core import dist_checkpointing

        request = dist_checkpointing.save(
            sharded_state(self._run), str(place), self._strategy, async_sharded_save=background
        )
        if request is not None:
            self._queue.schedule_async_request(request)

    def load(self, place: Path) -> None:
        """Load all of it, and apply it."""
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.utils import unwrap_model

        loaded = dist_checkpointing.load(sharded_state(self._run, is_loading=True), str(place))
        for chunk in unwrap_model(self._run.model):
            chunk.load_state_dict(loaded["model"], strict=False)
        with torch.no_grad():
            self._run.optimizer.load_state_dict(loaded["optimizer"])

    def is_saved(self) -> bool:
        """Look whether the save under way is complete, as a training loop does in each step."""
        self._queue.maybe_finalize_async_calls(blocking=False)
        return self._queue.get_num_unfinalized_calls() == 0

    def close(self) -> None:
        """End what megatron-core has started."""
        self._queue.close()
