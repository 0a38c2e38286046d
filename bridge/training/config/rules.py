"""Rules inside the sections, and between sections, that do not concern parallel sizes or checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bridge.training.config.schema import (
    Violation,
    at_least,
    between,
    default_of,
    field_types,
    multiple_of,
    show,
)

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig
    from bridge.training.config.data import DatasetConfig, TokenizerConfig
    from bridge.training.config.model import GPTModelConfig
    from bridge.training.config.optimizer import (
        DistributedDataParallelConfig,
        OptimizerConfig,
        SchedulerConfig,
    )
    from bridge.training.config.training import (
        DistributedInitConfig,
        LoggerConfig,
        RerunStateMachineConfig,
        RNGConfig,
        TrainingConfig,
    )


def architecture_rules(model: GPTModelConfig) -> Iterator[Violation]:
    """Sizes, probabilities and divisibility inside one model."""
    yield from at_least(
        "model",
        model,
        1,
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"),
        *("kv_channels", "seq_length", "vocab_size", "make_vocab_size_divisible_by", "rotary_base"),
    )
    yield from between("model", model, 0, 1, "attention_dropout", "hidden_dropout")
    yield from between("model", model, 0, 1, "rotary_percent", include_high=True)
    yield from _positive("model", model, "layernorm_epsilon", "init_method_std")
    heads = model.num_attention_heads
    yield from multiple_of("model.num_attention_heads", heads, "num_query_groups", model.num_query_groups)
    if model.kv_channels is None:
        yield from multiple_of("model.hidden_size", model.hidden_size, "num_attention_heads", heads)
    for name in sorted(model.transformer_overrides.keys() & field_types(type(model)).keys()):
        yield Violation(
            f"model.transformer_overrides.{name}",
            model.transformer_overrides[name],
            "has a setting of its own",
            f"set model.{name} instead",
        )


def mixture_of_experts_rules(model: GPTModelConfig) -> Iterator[Violation]:
    """Settings that need experts, and what experts need."""
    yield from at_least("model", model, 1, "num_moe_experts", "moe_router_topk")
    yield from at_least("model", model, 0, "moe_aux_loss_coeff")
    experts = model.num_moe_experts
    if experts is None:
        for field, idle in (
            ("expert_model_parallel_size", 1),
            ("expert_tensor_parallel_size", None),
            ("moe_aux_loss_coeff", 0.0),
        ):
            value = getattr(model, field)
            if value != idle:
                yield Violation(f"model.{field}", value, "needs experts", "set model.num_moe_experts, or leave it out")
        return
    if model.moe_router_topk > experts:
        yield Violation(
            "model.moe_router_topk",
            model.moe_router_topk,
            f"is more than num_moe_experts {experts}",
            "lower it, or add experts",
        )
    split = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
    if model.add_bias_linear and split != 1:
        yield Violation(
            "model.add_bias_linear",
            True,
            f"does not work with experts that are split over {split} ranks",
            "set it to false, or expert_tensor_parallel_size to 1",
        )


def recompute_rules(model: GPTModelConfig) -> Iterator[Violation]:
    """Full recomputation needs a method and a number of layers; nothing else takes them."""
    yield from at_least("model", model, 1, "recompute_num_layers")
    full = model.recompute_granularity == "full"
    for field in ("recompute_method", "recompute_num_layers"):
        value = getattr(model, field)
        if full and value is None:
            yield Violation(f"model.{field}", value, "is needed with recompute_granularity 'full'", "set it")
        if not full and value is not None:
            yield Violation(
                f"model.{field}",
                value,
                "has no effect without recompute_granularity 'full'",
                "set that, or leave this at null",
            )


def optimizer_rules(optimizer: OptimizerConfig) -> Iterator[Violation]:
    """Ranges of the optimizer's numbers."""
    yield from _positive("optimizer", optimizer, "lr", "adam_eps", "min_loss_scale", "loss_scale")
    yield from at_least("optimizer", optimizer, 0, "min_lr", "weight_decay", "clip_grad")
    yield from at_least("optimizer", optimizer, 1, "loss_scale_window")
    yield from between("optimizer", optimizer, 0, 1, "adam_beta1", "adam_beta2", "sgd_momentum")
    if optimizer.min_lr > optimizer.lr:
        yield Violation("optimizer.min_lr", optimizer.min_lr, f"is above optimizer.lr {optimizer.lr}", "lower it")
    if optimizer.initial_loss_scale < optimizer.min_loss_scale:
        yield Violation(
            "optimizer.initial_loss_scale",
            optimizer.initial_loss_scale,
            f"is below optimizer.min_loss_scale {optimizer.min_loss_scale}",
            "raise it",
        )


def loss_scale_rules(
    optimizer: OptimizerConfig, model: GPTModelConfig, ddp: DistributedDataParallelConfig
) -> Iterator[Violation]:
    """Loss scaling belongs to fp16."""
    if model.precision != "fp16":
        if optimizer.loss_scale is not None:
            yield Violation(
                "optimizer.loss_scale",
                optimizer.loss_scale,
                f"has no effect with model.precision {model.precision!r}",
                "leave it at null, or set model.precision to 'fp16'",
            )
    elif optimizer.loss_scale is None and ddp.check_for_nan_in_grad:
        yield Violation(
            "ddp.check_for_nan_in_grad",
            True,
            "would stop training at the first overflow, by which fp16 finds its loss scale",
            "set it to false, or optimizer.loss_scale to a number",
        )


def scheduler_rules(
    scheduler: SchedulerConfig, optimizer: OptimizerConfig, train: TrainingConfig
) -> Iterator[Violation]:
    """Warm-up lies inside the decay, and weight decay never falls."""
    yield from at_least("scheduler", scheduler, 0, "lr_warmup_iters", "lr_warmup_init", "start_weight_decay")
    yield from at_least("scheduler", scheduler, 1, "lr_decay_iters")
    decay_iters, source = scheduler.lr_decay_iters, "scheduler.lr_decay_iters"
    if decay_iters is None:
        decay_iters, source = train.train_iters, "train.train_iters"
    if decay_iters is not None and 1 <= decay_iters <= scheduler.lr_warmup_iters:
        yield Violation(
            "scheduler.lr_warmup_iters",
            scheduler.lr_warmup_iters,
            f"leaves no iteration of {source} {decay_iters} for the decay",
            "lower it",
        )
    if scheduler.lr_warmup_init > optimizer.lr:
        yield Violation(
            "scheduler.lr_warmup_init",
            scheduler.lr_warmup_init,
            f"is above optimizer.lr {optimizer.lr}",
            "lower it",
        )
    yield from _weight_decay_rules(scheduler, optimizer.weight_decay)


def _weight_decay_rules(scheduler: SchedulerConfig, otherwise: float) -> Iterator[Violation]:
    start = otherwise if scheduler.start_weight_decay is None else scheduler.start_weight_decay
    end = otherwise if scheduler.end_weight_decay is None else scheduler.end_weight_decay
    if scheduler.weight_decay_incr_style == "constant" and start != end:
        yield Violation(
            "scheduler.weight_decay_incr_style",
            "constant",
            f"contradicts a weight decay that goes from {start} to {end}",
            "set it to 'linear' or 'cosine', or make start_weight_decay and end_weight_decay equal",
        )
    elif end < start:
        yield Violation(
            "scheduler.end_weight_decay",
            scheduler.end_weight_decay,
            f"lets the weight decay fall from {start} to {end}",
            f"set it to {start} or more",
        )


def ddp_rules(ddp: DistributedDataParallelConfig, optimizer: OptimizerConfig) -> Iterator[Violation]:
    """What the distributed optimizer and the overlapped parameter gather need."""
    yield from at_least("ddp", ddp, 1, "bucket_size")
    if ddp.use_distributed_optimizer and optimizer.optimizer != "adam":
        yield Violation(
            "ddp.use_distributed_optimizer",
            True,
            f"does not work with optimizer.optimizer {optimizer.optimizer!r}",
            "set it to false, or optimizer.optimizer to 'adam'",
        )
    for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if ddp.overlap_param_gather and not getattr(ddp, needed):
            yield Violation(
                "ddp.overlap_param_gather",
                True,
                f"needs ddp.{needed}",
                f"set {needed} to true, or this to false",
            )


def training_rules(train: TrainingConfig) -> Iterator[Violation]:
    """Length and batch sizes; `rampup_batch_size` leads to `global_batch_size` in whole steps."""
    yield from at_least("train", train, 1, "train_iters", "micro_batch_size", "global_batch_size", "exit_interval")
    yield from _positive("train", train, "exit_duration_in_mins")
    if train.train_iters is None:
        yield Violation("train.train_iters", None, "does not say how long to train", "set the number of iterations")
    micro, final, ramp = train.micro_batch_size, train.global_batch_size, train.rampup_batch_size
    yield from multiple_of("train.global_batch_size", final, "micro_batch_size", micro)
    if ramp is None:
        return
    setting = "train.rampup_batch_size"
    if len(ramp) != 3 or min(ramp) < 1:
        yield Violation(setting, ramp, "is not valid", "write [start, increment, samples], each 1 or more")
    elif final is None:
        yield Violation(setting, ramp, "leads to no batch size", "set train.global_batch_size")
    elif ramp[0] >= final or (final - ramp[0]) % ramp[1]:
        yield Violation(
            setting,
            ramp,
            f"does not reach global_batch_size {final} from {ramp[0]} in steps of {ramp[1]}",
            "choose a smaller start and an increment that divides the difference",
        )


def signal_rules(train: TrainingConfig, checkpoint: CheckpointConfig) -> Iterator[Violation]:
    """One signal has one meaning."""
    if not train.exit_signal_handler:
        if train.exit_signal != "SIGTERM":
            yield Violation(
                "train.exit_signal",
                train.exit_signal,
                "has no effect without train.exit_signal_handler",
                "set that to true, or leave this at 'SIGTERM'",
            )
    elif train.exit_signal == checkpoint.save_signal:
        yield Violation(
            "checkpoint.save_signal",
            checkpoint.save_signal,
            "is train.exit_signal too, which saves and stops",
            "choose another signal for one of them",
        )


def dataset_rules(dataset: DatasetConfig) -> Iterator[Violation]:
    """One source of data, and a blend whose weights fit."""
    yield from at_least("dataset", dataset, 0, "num_workers", "seed")
    if not dataset.path and not dataset.mock:
        yield Violation("dataset.path", dataset.path, "leaves nothing to train on", "set it, or dataset.mock to true")
    if dataset.path and dataset.mock:
        yield Violation("dataset.mock", True, "would ignore dataset.path", "set it to false, or leave out the path")
    paths = dataset.path if isinstance(dataset.path, list) else []
    if dataset.weights is not None and (len(dataset.weights) != len(paths) or min(dataset.weights, default=0) <= 0):
        yield Violation(
            "dataset.weights",
            dataset.weights,
            f"does not weigh the {len(paths)} entries of a list in dataset.path",
            "give each entry a number above 0",
        )
    if not _is_split(dataset.split):
        yield Violation(
            "dataset.split",
            dataset.split,
            "is not three relative sizes",
            "write them as in '99,1,0', the first above 0",
        )


def _is_split(split: str) -> bool:
    try:
        sizes = [float(size) for size in split.split(",")]
    except ValueError:
        return False
    return len(sizes) == 3 and min(sizes) >= 0 and sizes[0] > 0 and sum(sizes) < float("inf")


_TOKENIZER_FILES: dict[str, tuple[str, ...]] = {
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "TikTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}
"""What each kind of tokenizer cannot do without."""

_TIKTOKEN_SETTINGS = ("vocab_size", "tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")


def tokenizer_rules(tokenizer: TokenizerConfig) -> Iterator[Violation]:
    """Each kind has the settings that it needs, and none of another kind."""
    yield from at_least("tokenizer", tokenizer, 1, "vocab_size", "tiktoken_num_special_tokens")
    kind = tokenizer.tokenizer_type
    needed = _TOKENIZER_FILES[kind]
    for field in needed:
        value = getattr(tokenizer, field)
        if value is None or value == "":
            yield Violation(f"tokenizer.{field}", value, f"is needed by {kind}", "set it")
    understood = {"tokenizer_type", *needed, *(_TIKTOKEN_SETTINGS if kind == "TikTokenizer" else ())}
    for field in field_types(type(tokenizer)):
        value, default = getattr(tokenizer, field), default_of(type(tokenizer), field)
        if field not in understood and value != default:
            yield Violation(f"tokenizer.{field}", value, f"has no effect with {kind}", f"leave it at {show(default)}")


def rerun_rules(rerun: RerunStateMachineConfig) -> Iterator[Violation]:
    """How many steps a fault is simulated in."""
    yield from at_least("rerun_state_machine", rerun, 0, "error_injection_rate")


def run_rules(rng: RNGConfig, dist: DistributedInitConfig, logger: LoggerConfig) -> Iterator[Violation]:
    """Ranges of the settings around the run."""
    # megatron-core wants a positive seed, and NumPy one of 32 bits after the ranks' offsets are added.
    if not 1 <= rng.seed < 2**31:
        yield Violation("rng.seed", rng.seed, "is out of range", "set it to a number from 1 to below 2147483648")
    yield from at_least("dist", dist, 1, "distributed_timeout_minutes")
    yield from at_least("logger", logger, 1, "log_interval")


_SINKS: dict[str, tuple[str, ...]] = {
    "wandb_project": ("wandb_exp_name", "wandb_entity", "wandb_save_dir"),
    "mlflow_experiment": ("mlflow_run_name", "mlflow_tracking_uri", "mlflow_tags"),
    "comet_project": ("comet_experiment_name", "comet_workspace", "comet_tags", "comet_offline_dir"),
}
"""The settings that mean something only with another one."""


def event_rules(logger: LoggerConfig) -> Iterator[Violation]:
    """Where events are brought to."""
    for needed, fields in _SINKS.items():
        for field in fields:
            value = getattr(logger, field)
            if value is not None and getattr(logger, needed) is None:
                yield Violation(
                    f"logger.{field}", value, f"has no effect without logger.{needed}", "set that, or leave this out"
                )
    yield from _without_credentials(
        "mlflow_tracking_uri",
        logger.mlflow_tracking_uri,
        "give them in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN; "
        "for a database, leave this out and give the whole address as MLFLOW_TRACKING_URI",
    )
    yield from _without_credentials(
        "otlp_endpoint", logger.otlp_endpoint, "give them as a header in the environment: OTEL_EXPORTER_OTLP_HEADERS"
    )
    if logger.otlp_endpoint is not None and not logger.otlp_endpoint.startswith(("http://", "https://")):
        yield Violation(
            "logger.otlp_endpoint",
            logger.otlp_endpoint,
            "is no URL of a collector",
            "set it to one, as in 'http://localhost:4318'",
        )


def _without_credentials(field: str, url: str | None, remedy: str) -> Iterator[Violation]:
    """The configuration is copied into every checkpoint."""
    scheme, mark, rest = (url or "").partition("://")
    credentials, at, place = rest.partition("/")[0].rpartition("@")
    if mark and at and credentials:
        path = rest[len(credentials) + 1 + len(place) :]
        yield Violation(f"logger.{field}", f"{scheme}://***@{place}{path}", "holds credentials", remedy)


def _positive(name: str, section: object, *fields: str) -> Iterator[Violation]:
    for field in fields:
        value = getattr(section, field)
        if value is not None and value <= 0:
            yield Violation(f"{name}.{field}", value, "is too small", "set it to a number above 0")
