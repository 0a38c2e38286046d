"""A run small enough for tests, on synthetic data, and everything of it that must be equal bit for bit."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from bridge.training.callbacks import CallbackManager
from bridge.training.config import ConfigContainer, load_config
from bridge.training.setup import Run, setup
from bridge.training.train import train

TINY = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: 16, vocab_size: 64,
        make_vocab_size_divisible_by: 16, attention_dropout: 0.1, hidden_dropout: 0.1}
optimizer: {lr: 0.01, min_lr: 0.0001}
scheduler: {lr_warmup_iters: 2}
train: {train_iters: 6, micro_batch_size: 2, global_batch_size: 8}
dataset: {mock: true}
tokenizer: {tokenizer_type: NullTokenizer, vocab_size: 63}
logger: {log_level: WARNING}
"""

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "world 1": (1, []),
    "DP2, distributed optimizer": (2, []),
    "DP2, plain optimizer": (2, ["ddp.use_distributed_optimizer=false"]),
    "TP2": (2, ["model.tensor_model_parallel_size=2"]),
    "PP2": (2, ["model.pipeline_model_parallel_size=2"]),
    "PP2 VPP2": (
        2,
        [
            "model.pipeline_model_parallel_size=2",
            "model.num_layers=4",
            "model.virtual_pipeline_model_parallel_size=2",
        ],
    ),
    "EP2": (
        2,
        [
            "model.num_moe_experts=4",
            "model.expert_model_parallel_size=2",
            "model.add_bias_linear=false",
            "model.moe_aux_loss_coeff=0.01",
        ],
    ),
    "TP2 PP2": (4, ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]),
    "DP2 bf16": (2, ["model.precision=bf16"]),
}
"""Name → (world size, overrides)."""


def tiny_config(directory: Path, *overrides: str) -> ConfigContainer:
    """The tiny run with overrides; `directory` holds its recipe."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = directory / "tiny.yaml"
    if not recipe.exists():
        recipe.write_text(TINY)
    return load_config(recipe, (), overrides)


class Recorder:
    """Callbacks that note each iteration's learning-rate-independent state, and each published checkpoint."""

    def __init__(self) -> None:
        self.manager = CallbackManager()
        self.saved: list[tuple[str, int, str]] = []
        self.manager.register("on_checkpoint_save", self._saved)

    def _saved(self, context: Any) -> None:
        info = context.checkpoint
        self.saved.append((info.path.name, info.iteration, info.kind))


def run_to_end(cfg: ConfigContainer) -> dict[str, Any]:
    """Train as configured on this rank; return the digests of everything and what was saved."""
    recorder = Recorder()
    run = setup(cfg, recorder.manager)
    started_at = run.state.train_state.step
    outcome = train(run)
    return {
        "started at": started_at,
        "loaded from": run.state.loaded_from,
        "reached end": outcome.reached_end,
        "iteration": outcome.iteration,
        "saved": recorder.saved,
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
    found["rng python"] = hashlib.sha256(pickle.dumps(random.getstate())).hexdigest()
    found["rng numpy"] = hashlib.sha256(pickle.dumps(np.random.get_state())).hexdigest()
    found["rng torch"] = _hash(torch.get_rng_state())
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        found[f"rng tracker {name}"] = _hash(state)
    if run.train_data_iterator is not None:
        found["data iterator"] = repr(run.train_data_iterator.save_state())
    return found


def _hash(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
