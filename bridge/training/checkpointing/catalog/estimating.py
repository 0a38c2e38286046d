"""How large a run's checkpoints will be, in how many files, and how long they take: counted from its configuration.

No model is built, no tensor is made, and no rank is asked, so any parallel sizes can be tried on a laptop. What is
counted are the tensors of the GPT model that `model` describes and the state that the optimizer keeps of each: the
bytes of their values are exact. Beside them a file holds a header for each tensor, of some hundred bytes to two
kilobytes, and the random states; these are added with sizes measured once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.retention.policies import Best, Entry, EveryHours, policies_of, removable
from bridge.training.config import ConfigContainer

_HALF = 2
_FULL = 4
"""Bytes of an element."""
_ALIGNED = 64
"""Elements."""
_RECORD = 1700
"""Bytes that a record takes beside its values: torch.save's archive, and the alignment in it."""
_RANDOM_STATES = 17_500
"""Bytes of one rank's random states, without those of CUDA."""
_BESIDE = 24_000
"""Bytes of the small files: configuration, train state, common state, manifest."""
_INDEX = 350
"""Bytes of `.metadata` for each record."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, or several of the same size."""

    numel: int
    """Elements of one, over all tensor-parallel ranks."""
    count: int
    """How many there are in the whole model."""
    split: bool
    """Whether tensor-parallel ranks share it; otherwise each has all of it."""
    expert: bool = False
    """Whether it belongs to an expert, of which each expert-parallel rank has some."""

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.numel * self.count


@dataclass(frozen=True)
class Estimate:
    """What a run's checkpoints come to."""

    world_size: int
    data_parallel_size: int
    parameters: int
    """Of the model."""
    model_bytes: int
    optimizer_bytes: int
    other_bytes: int
    """Headers, random states and small files: measured once, not counted."""
    largest_rank_bytes: int
    """What the rank writes that writes most, if the ranks that write share evenly."""
    payload_files: int
    """Files with values."""
    files: int
    """All files, without those of the tokenizer."""
    saves: int
    """Persistent ones, over the whole run."""
    most_kept: int | None
    """Checkpoints that are in the directory at the same time at most; None where that depends on time or metrics."""
    gib_per_second: float
    """The rate that the times are worked out with: of the storage as a whole."""

    @property
    def payload_bytes(self) -> int:
        """Of the values of all tensors: exact."""
        return self.model_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """Of one checkpoint."""
        return self.payload_bytes + self.other_bytes

    @property
    def seconds(self) -> float:
        """To write one checkpoint."""
        return self.total_bytes / (self.gib_per_second * 2**30)

    @property
    def most_bytes(self) -> int | None:
        """That the directory takes at most."""
        return None if self.most_kept is None else self.most_kept * self.total_bytes


def estimate(cfg: ConfigContainer, world_size: int, rows: int, *, gib_per_second: float = 1.0) -> Estimate:
    """Work out what the persistent checkpoints of a run come to.

    Args:
        cfg: of the run.
        world_size: ranks.
        rows: of the embedding: the tokenizer's size as it is padded; `padded_vocab_size` of `bridge.training.gpt`.
        gib_per_second: at which the storage as a whole takes data.

    Raises:
        ConfigError: the number of ranks does not fit the parallel sizes.
        CheckpointMismatchError: the configuration has something that is not counted here.
    """
    _require_countable(cfg)
    model, checkpoint = cfg.model, cfg.checkpoint
    data = cfg.data_parallel_size(world_size)
    parameters = list(parameters_of(cfg, rows))
    count = sum(each.total for each in parameters)
    model_bytes = count * (_FULL if model.precision == "fp32" else _HALF)
    optimizer_bytes = _optimizer_bytes(cfg, parameters, count, rows) if checkpoint.save_optim else 0
    writers = world_size if checkpoint.fully_parallel_save else world_size // data
    payload_files = writers * checkpoint.storage_writers_per_rank
    records = _records(cfg, parameters, writers)
    other = records * (_RECORD + _INDEX) + _BESIDE + data * 1400
    other += world_size * _RANDOM_STATES if checkpoint.save_rng else 0
    saves = saves_of(cfg)
    return Estimate(
        world_size,
        data,
        count,
        model_bytes,
        optimizer_bytes,
        other,
        -(-(model_bytes + optimizer_bytes) // writers),
        payload_files,
        payload_files + _small_files(cfg, data),
        len(saves),
        most_kept(cfg, saves),
        gib_per_second,
    )


def parameters_of(cfg: ConfigContainer, rows: int) -> Iterator[Parameter]:
    """The parameters of the whole model, each once.

    Args:
        cfg: of the run.
        rows: of the embedding.
    """
    model = cfg.model
    hidden, layers = model.hidden_size, model.num_layers
    channels = model.kv_channels or hidden // model.num_attention_heads
    queries = channels * model.num_attention_heads
    keys = 2 * channels * (model.num_query_groups or model.num_attention_heads)
    norm = 1 if model.normalization == "RMSNorm" else 2
    bias = model.add_bias_linear
    yield Parameter(rows * hidden, 1 if model.share_embeddings_and_output_weights else 2, split=True)
    if model.position_embedding_type == "learned_absolute":
        yield Parameter(model.seq_length * hidden, 1, split=False)
    yield Parameter(hidden, norm * (2 * layers + 1), split=False)
    yield Parameter((queries + keys) * hidden, layers, split=True)
    yield Parameter(queries * hidden, layers, split=True)
    if bias:
        yield Parameter(queries + keys, layers, split=True)
        yield Parameter(hidden, layers, split=False)
    yield from _mlp(cfg)


def _mlp(cfg: ConfigContainer) -> Iterator[Parameter]:
    model = cfg.model
    hidden, layers = model.hidden_size, model.num_layers
    width = model.ffn_hidden_size or 4 * hidden
    inner = width * (2 if model.activation == "swiglu" else 1)
    experts = model.num_moe_experts
    if experts is not None:
        yield Parameter(experts * hidden, layers, split=False)
        yield Parameter(inner * hidden, layers * experts, split=True, expert=True)
        yield Parameter(width * hidden, layers * experts, split=True, expert=True)
        return
    yield Parameter(inner * hidden, layers, split=True)
    yield Parameter(width * hidden, layers, split=True)
    if model.add_bias_linear:
        yield Parameter(inner, layers, split=True)
        yield Parameter(hidden, layers, split=False)


def _optimizer_bytes(cfg: ConfigContainer, parameters: list[Parameter], count: int, rows: int) -> int:
    model = cfg.model
    is_half = model.precision != "fp32"
    if not cfg.ddp.use_distributed_optimizer:
        # Two moments, and main parameters where the model's are not in full precision.
        return count * _FULL * (3 if is_half else 2)
    if cfg.checkpoint.dist_ckpt_optim_fully_reshardable:
        return count * _FULL * 3
    return _FULL * 3 * _buffer_elements(cfg, parameters, rows)


def _buffer_elements(cfg: ConfigContainer, parameters: list[Parameter], rows: int) -> int:
    """Of the flat buffers of all model-parallel ranks: each has its own copy of what such ranks have in common.

    A parameter begins at a multiple of 64 elements (megatron-core's `_ParamAndGradBuffer`).
    """
    model = cfg.model
    dense = model.tensor_model_parallel_size
    experts = model.expert_tensor_parallel_size or dense
    elements = 0
    for each in parameters:
        ranks = experts if each.expert else dense
        local = each.numel // ranks if each.split else each.numel
        elements += -(-local // _ALIGNED) * _ALIGNED * each.count * ranks
    if model.share_embeddings_and_output_weights and model.pipeline_model_parallel_size > 1:
        elements += rows * model.hidden_size
    return elements


def _records(cfg: ConfigContainer, parameters: list[Parameter], writers: int) -> int:
    """About how many pieces the tensors are stored in."""
    tensor = cfg.model.tensor_model_parallel_size
    model = sum(each.count * (tensor if each.split else 1) for each in parameters)
    if not cfg.checkpoint.save_optim:
        return model
    return model + 3 * (model + writers)


def _small_files(cfg: ConfigContainer, data: int) -> int:
    """The two indices, `common.pt`, `metadata.json`, train state, configuration, manifest, positions in the data."""
    positions = 0 if cfg.checkpoint.load_dataloader_state == "ignore" else data
    return 7 + positions


def saves_of(cfg: ConfigContainer) -> list[int]:
    """The iterations of the persistent saves, as far as iterations decide."""
    interval, last = cfg.checkpoint.save_interval, cfg.train.train_iters or 0
    if interval == 0 or not last:
        return []
    every = list(range(interval, last + 1, interval)) if interval else []
    return every if every and every[-1] == last else [*every, last]


def most_kept(cfg: ConfigContainer, saves: list[int]) -> int | None:
    """How many checkpoints a directory has at the same time at most, while the run goes through its saves.

    Returns:
        The number, the one that is just written included; None where time or metrics decide.
    """
    policies = policies_of(cfg.checkpoint)
    if not policies:
        return len(saves)
    if any(isinstance(policy, Best | EveryHours) for policy in policies):
        return None
    kept: list[int] = []
    most = 0
    for iteration in saves:
        kept.append(iteration)
        most = max(most, len(kept))
        goes = set(removable([Entry(each) for each in kept], policies, iteration))
        kept = [each for each in kept if each not in goes]
    return most


def _require_countable(cfg: ConfigContainer) -> None:
    reasons: list[tuple[bool, str]] = [
        (cfg.peft is not None, "peft adds adapters, and only they are saved"),
        (bool(cfg.model.transformer_overrides), "model.transformer_overrides may change the model"),
        (cfg.checkpoint.ckpt_format != "torch_dist", f"checkpoint.ckpt_format is {cfg.checkpoint.ckpt_format}"),
        (cfg.optimizer.optimizer != "adam", f"optimizer.optimizer is {cfg.optimizer.optimizer}"),
    ]
    found = [reason for applies, reason in reasons if applies]
    if found:
        raise CheckpointMismatchError(
            f"the checkpoint cannot be counted from the recipe: {'; '.join(found)}. Save once, and see bridge-ckpt ls"
        )
