"""A GPT that trains in milliseconds, and everything of its run that must be equal bit for bit."""

from __future__ import annotations

import hashlib
import pickle
import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch.distributed.tensor import DTensor

from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.config import (
    ConfigContainer,
    DatasetConfig,
    GPTModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from bridge.training.setup import Run, setup
from bridge.training.train import train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 with VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP2": (
        2,
        {
            "expert_model_parallel_size": 2,
            "num_moe_experts": 4,
            "moe_aux_loss_coeff": 0.01,
            "add_bias_linear": False,
        },
    ),
}
"""World size and model settings of every way to spread a run that the tests cover; dropout is on in all."""


def tiny_config(*, train_iters: int = 4, **settings: dict[str, Any]) -> ConfigContainer:
    """A valid configuration on synthetic data. `settings` are sections: `tiny_config(model={"num_layers": 2})`."""
    cfg = ConfigContainer(
        model=GPTModelConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, make_vocab_size_divisible_by=16
        ),
        optimizer=OptimizerConfig(lr=0.01, min_lr=1e-4),
        scheduler=SchedulerConfig(lr_warmup_iters=1),
        train=TrainingConfig(train_iters=train_iters, micro_batch_size=2, global_batch_size=8),
        dataset=DatasetConfig(mock=True),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
    )
    for section, values in settings.items():
        for name, value in values.items():
            if not hasattr(getattr(cfg, section), name):
                raise AttributeError(f"{section} has no setting {name}")
            setattr(getattr(cfg, section), name, value)
    return cfg


class SavedCheckpoints:
    """Notes what `on_checkpoint_save` tells: directory name, iteration and kind."""

    def __init__(self) -> None:
        self.manager = CallbackManager()
        self.saved: list[tuple[str, int, str]] = []
        self.manager.register("on_checkpoint_save", self._saved)

    def _saved(self, context: CallbackContext) -> None:
        info = context.checkpoint
        assert info is not None
        self.saved.append((info.path.name, info.iteration, info.kind))


def run_to_end(cfg: ConfigContainer) -> dict[str, Any]:
    """Train as configured on this rank; return the digests of everything and what was saved."""
    saved = SavedCheckpoints()
    run = setup(cfg, saved.manager)
    started_at = run.state.train_state.step
    outcome = train(run)
    return {
        "started at": started_at,
        "loaded from": run.state.loaded_from,
        "reached end": outcome.reached_end,
        "iteration": outcome.iteration,
        "saved": saved.saved,
        "digests": digests(run),
    }


def digests(run: Run) -> dict[str, str]:
    """One hash for each tensor and counter of this rank's run."""
    found: dict[str, str] = {}
    for index, chunk in enumerate(run.model):
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            found[f"model{index}.{name}"] = _hash(tensor)
    optimizers = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.optimizer.param_groups):
            settings = {key: value for key, value in group.items() if key != "params"}
            found[f"optimizer{index}.group{number}"] = repr(sorted(settings.items()))
            for position, parameter in enumerate(group["params"]):
                prefix = f"optimizer{index}.group{number}.{position}"
                found[f"{prefix}.main"] = _hash(parameter)
                for key, value in optimizer.optimizer.state.get(parameter, {}).items():
                    found[f"{prefix}.{key}"] = _hash(value) if torch.is_tensor(value) else repr(value)
    found["scheduler"] = repr(run.scheduler.state_dict())
    found["train state"] = repr(run.state.train_state)
    found |= digests_of_random_states()
    if run.train_data_iterator is not None:
        found["data iterator"] = repr(run.train_data_iterator.save_state())
    return found


def digests_of_random_states() -> dict[str, str]:
    """One hash for each random generator of this rank."""
    found = {
        "rng python": hashlib.sha256(pickle.dumps(random.getstate())).hexdigest(),
        "rng numpy": hashlib.sha256(pickle.dumps(np.random.get_state())).hexdigest(),
        "rng torch": _hash(torch.get_rng_state()),
    }
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        found[f"rng tracker {name}"] = _hash(state)
    return found


def _hash(tensor: torch.Tensor) -> str:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    data = own.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
