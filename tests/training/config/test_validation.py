"""ConfigContainer.validate: every rule, by the exact line that a user reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bridge.training.config import ConfigContainer, ConfigError, OptimizerConfig
from bridge.training.config.schema import field_types

VALID = {
    "train.train_iters": 100,
    "dataset.path": "data/text",
    "tokenizer.tokenizer_model": "data/tokenizer",
}


def configure(settings: dict[str, Any]) -> ConfigContainer:
    """A valid configuration with some settings changed."""
    config = ConfigContainer()
    for setting, value in {**VALID, **settings}.items():
        name, _, field = setting.partition(".")
        section, field = (getattr(config, name), field) if field else (config, name)
        setattr(section, field, value)
    return config


def problems(settings: dict[str, Any], world_size: int | None = None) -> list[str]:
    """What `validate` complains about."""
    try:
        configure(settings).validate(world_size)
    except ConfigError as error:
        return list(error.problems)
    return []


MOE = {"model.num_moe_experts": 4}
MOE_TP = {**MOE, "model.tensor_model_parallel_size": 2, "model.add_bias_linear": False}
FULL = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
NULL = {"tokenizer.tokenizer_type": "NullTokenizer", "tokenizer.tokenizer_model": None}

ACCEPTED: list[dict[str, Any]] = [
    {},
    {"model.num_layers": 8, "model.pipeline_model_parallel_size": 2},
    {
        "model.num_layers": 8,
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 4,
    },
    {"model.num_query_groups": 2, "model.tensor_model_parallel_size": 4},
    {"model.hidden_size": 130, "model.kv_channels": 32},
    {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    {"model.context_parallel_size": 4},
    {**MOE, "model.expert_model_parallel_size": 2, "model.moe_aux_loss_coeff": 0.01},
    {**MOE_TP, "model.sequence_parallel": True},
    {**MOE_TP, "model.sequence_parallel": True, "model.add_bias_linear": True, "model.expert_tensor_parallel_size": 1},
    FULL,
    {"model.recompute_granularity": "selective"},
    {"model.transformer_overrides": {"qk_layernorm": True}},
    {"model.precision": "fp16", "ddp.check_for_nan_in_grad": False},
    {"model.precision": "fp16", "optimizer.loss_scale": 128.0},
    {"optimizer.optimizer": "sgd", "ddp.use_distributed_optimizer": False},
    {"optimizer.clip_grad": 0.0, "optimizer.weight_decay": 0.0},
    {"optimizer.lr": 1},
    {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True},
    {"scheduler.lr_warmup_iters": 99},
    {
        "scheduler.start_weight_decay": 0.0,
        "scheduler.end_weight_decay": 0.1,
        "scheduler.weight_decay_incr_style": "linear",
    },
    {"train.micro_batch_size": 2, "train.global_batch_size": 16, "train.rampup_batch_size": [4, 4, 100]},
    {"dataset.path": None, "dataset.mock": True, **NULL, "tokenizer.vocab_size": 1000},
    {"dataset.path": ["a", "b"], "dataset.weights": [0.3, 0.7]},
    {"dataset.path": ["a", "b"]},
    {"dataset.split": "1,0,0"},
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_accepts(settings: dict[str, Any]) -> None:
    assert problems(settings) == []


BROKEN: list[tuple[dict[str, Any], str]] = [
    # model: sizes and ranges
    ({"model.num_layers": 0}, "model.num_layers: 0 is too small; set it to 1 or more"),
    ({"model.seq_length": -1}, "model.seq_length: -1 is too small; set it to 1 or more"),
    ({"model.vocab_size": 0}, "model.vocab_size: 0 is too small; set it to 1 or more"),
    (
        {"model.hidden_dropout": 1.0},
        "model.hidden_dropout: 1.0 is out of range; set it to a number from 0 to below 1",
    ),
    (
        {"model.attention_dropout": -0.1},
        "model.attention_dropout: -0.1 is out of range; set it to a number from 0 to below 1",
    ),
    (
        {"model.rotary_percent": 0.0},
        "model.rotary_percent: 0.0 is out of range; set it to a number above 0 and up to 1",
    ),
    (
        {"model.layernorm_epsilon": 0.0},
        "model.layernorm_epsilon: 0.0 is too small; set it to a number above 0",
    ),
    (
        {"model.hidden_size": 130},
        "model.hidden_size: 130 is not a multiple of num_attention_heads 4; change one of them",
    ),
    (
        {"model.num_query_groups": 3},
        "model.num_attention_heads: 4 is not a multiple of num_query_groups 3; change one of them",
    ),
    (
        {"model.transformer_overrides": {"num_layers": 3}},
        "model.transformer_overrides.num_layers: 3 has a setting of its own; set model.num_layers instead",
    ),
    # model: parallel sizes
    (
        {"model.tensor_model_parallel_size": 0},
        "model.tensor_model_parallel_size: 0 is too small; set it to 1 or more",
    ),
    (
        {"model.tensor_model_parallel_size": 8},
        "model.num_attention_heads: 4 is not a multiple of tensor_model_parallel_size 8; change one of them",
    ),
    (
        {"model.tensor_model_parallel_size": 2, "model.ffn_hidden_size": 33},
        "model.ffn_hidden_size: 33 is not a multiple of tensor_model_parallel_size 2; change one of them",
    ),
    (
        {"model.tensor_model_parallel_size": 2, "model.vocab_size": 101},
        "model.vocab_size: 101 is not a multiple of tensor_model_parallel_size 2; change one of them",
    ),
    (
        {
            "model.num_attention_heads": 12,
            "model.hidden_size": 120,
            "model.num_query_groups": 3,
            "model.tensor_model_parallel_size": 2,
        },
        "model.num_query_groups: 3 is neither a multiple nor a divisor of tensor_model_parallel_size 2; "
        "change one of them",
    ),
    (
        {"model.pipeline_model_parallel_size": 3},
        "model.num_layers: 2 is not a multiple of pipeline_model_parallel_size 3; change one of them",
    ),
    (
        {"model.pipeline_model_parallel_size": 2, "model.virtual_pipeline_model_parallel_size": 2},
        "model.num_layers: 2 is not a multiple of pipeline_model_parallel_size * "
        "virtual_pipeline_model_parallel_size, 4; change one of them",
    ),
    (
        {"model.virtual_pipeline_model_parallel_size": 2},
        "model.virtual_pipeline_model_parallel_size: 2 interleaves nothing with pipeline_model_parallel_size 1; "
        "leave it at null, or set pipeline_model_parallel_size to 2 or more",
    ),
    (
        {"model.context_parallel_size": 3},
        "model.seq_length: 256 is not a multiple of twice context_parallel_size, 6; change one of them",
    ),
    (
        {"model.sequence_parallel": True},
        "model.sequence_parallel: true has no ranks to share the sequence with tensor_model_parallel_size 1; "
        "set it to false, or tensor_model_parallel_size to 2 or more",
    ),
    (
        {"model.sequence_parallel": True, "model.tensor_model_parallel_size": 2, "model.seq_length": 255},
        "model.seq_length: 255 is not a multiple of tensor_model_parallel_size 2; change one of them",
    ),
    # model: experts
    (
        {"model.expert_model_parallel_size": 2},
        "model.expert_model_parallel_size: 2 needs experts; set model.num_moe_experts, or leave it out",
    ),
    (
        {"model.expert_tensor_parallel_size": 2},
        "model.expert_tensor_parallel_size: 2 needs experts; set model.num_moe_experts, or leave it out",
    ),
    (
        {"model.moe_aux_loss_coeff": 0.01},
        "model.moe_aux_loss_coeff: 0.01 needs experts; set model.num_moe_experts, or leave it out",
    ),
    (
        {**MOE, "model.expert_model_parallel_size": 3},
        "model.num_moe_experts: 4 is not a multiple of expert_model_parallel_size 3; change one of them",
    ),
    (
        {**MOE, "model.moe_router_topk": 5},
        "model.moe_router_topk: 5 is more than num_moe_experts 4; lower it, or add experts",
    ),
    (
        MOE_TP,
        "model.sequence_parallel: false does not work with num_moe_experts and tensor_model_parallel_size 2 "
        "together: megatron-core refuses it; set it to true, or tensor_model_parallel_size to 1",
    ),
    (
        {**MOE, "model.expert_tensor_parallel_size": 2},
        "model.add_bias_linear: true does not work with experts that are split over 2 ranks; "
        "set it to false, or expert_tensor_parallel_size to 1",
    ),
    # model: recomputation
    (
        {**FULL, "model.recompute_method": None},
        "model.recompute_method: null is needed with recompute_granularity 'full'; set it",
    ),
    (
        {**FULL, "model.recompute_num_layers": None},
        "model.recompute_num_layers: null is needed with recompute_granularity 'full'; set it",
    ),
    (
        {"model.recompute_granularity": "selective", "model.recompute_method": "block"},
        "model.recompute_method: 'block' has no effect without recompute_granularity 'full'; "
        "set that, or leave this at null",
    ),
    # optimizer, scheduler, ddp
    ({"optimizer.lr": 0.0}, "optimizer.lr: 0.0 is too small; set it to a number above 0"),
    ({"optimizer.min_lr": -1.0}, "optimizer.min_lr: -1.0 is too small; set it to 0 or more"),
    ({"optimizer.min_lr": 0.1}, "optimizer.min_lr: 0.1 is above optimizer.lr 0.0003; lower it"),
    (
        {"optimizer.adam_beta2": 1.0},
        "optimizer.adam_beta2: 1.0 is out of range; set it to a number from 0 to below 1",
    ),
    (
        {"optimizer.initial_loss_scale": 0.5},
        "optimizer.initial_loss_scale: 0.5 is below optimizer.min_loss_scale 1.0; raise it",
    ),
    (
        {"optimizer.loss_scale": 8.0},
        "optimizer.loss_scale: 8.0 has no effect with model.precision 'fp32'; "
        "leave it at null, or set model.precision to 'fp16'",
    ),
    (
        {"model.precision": "fp16"},
        "ddp.check_for_nan_in_grad: true would stop training at the first overflow, by which fp16 finds its "
        "loss scale; set it to false, or optimizer.loss_scale to a number",
    ),
    (
        {"scheduler.lr_warmup_iters": 100},
        "scheduler.lr_warmup_iters: 100 leaves no iteration of train.train_iters 100 for the decay; lower it",
    ),
    (
        {"scheduler.lr_warmup_iters": 50, "scheduler.lr_decay_iters": 40},
        "scheduler.lr_warmup_iters: 50 leaves no iteration of scheduler.lr_decay_iters 40 for the decay; lower it",
    ),
    (
        {"scheduler.lr_warmup_init": 1.0},
        "scheduler.lr_warmup_init: 1.0 is above optimizer.lr 0.0003; lower it",
    ),
    ({"scheduler.lr_decay_iters": 0}, "scheduler.lr_decay_iters: 0 is too small; set it to 1 or more"),
    (
        {"scheduler.end_weight_decay": 0.1},
        "scheduler.weight_decay_incr_style: 'constant' contradicts a weight decay that goes from 0.01 to 0.1; "
        "set it to 'linear' or 'cosine', or make start_weight_decay and end_weight_decay equal",
    ),
    (
        {"scheduler.end_weight_decay": 0.001, "scheduler.weight_decay_incr_style": "linear"},
        "scheduler.end_weight_decay: 0.001 lets the weight decay fall from 0.01 to 0.001; set it to 0.01 or more",
    ),
    (
        {"optimizer.optimizer": "sgd"},
        "ddp.use_distributed_optimizer: true does not work with optimizer.optimizer 'sgd'; "
        "set it to false, or optimizer.optimizer to 'adam'",
    ),
    (
        {"ddp.overlap_param_gather": True},
        "ddp.overlap_param_gather: true needs ddp.overlap_grad_reduce; "
        "set overlap_grad_reduce to true, or this to false",
    ),
    (
        {
            "ddp.overlap_param_gather": True,
            "ddp.overlap_grad_reduce": True,
            "ddp.use_distributed_optimizer": False,
        },
        "ddp.overlap_param_gather: true needs ddp.use_distributed_optimizer; "
        "set use_distributed_optimizer to true, or this to false",
    ),
    ({"ddp.bucket_size": 0}, "ddp.bucket_size: 0 is too small; set it to 1 or more"),
    (
        {"ddp.use_megatron_fsdp": True},
        "ddp.use_megatron_fsdp: true does not work with checkpoint.ckpt_format 'torch_dist'; "
        "set checkpoint.ckpt_format to 'fsdp_dtensor', or this to false",
    ),
    ({"peft": {"dim": 8}}, "peft: {'dim': 8} is not valid; set it to a LoRAConfig"),
    # train
    (
        {"train.train_iters": None},
        "train.train_iters: null does not say how long to train; set the number of iterations",
    ),
    ({"train.train_iters": 0}, "train.train_iters: 0 is too small; set it to 1 or more"),
    ({"train.exit_interval": 0}, "train.exit_interval: 0 is too small; set it to 1 or more"),
    (
        {"train.exit_duration_in_mins": 0.0},
        "train.exit_duration_in_mins: 0.0 is too small; set it to a number above 0",
    ),
    (
        {"train.exit_signal": "SIGINT"},
        "train.exit_signal: 'SIGINT' has no effect without train.exit_signal_handler; "
        "set that to true, or leave this at 'SIGTERM'",
    ),
    (
        {
            "train.exit_signal_handler": True,
            "train.exit_signal": "SIGUSR1",
            "checkpoint.save": "/s",
            "checkpoint.save_signal": "SIGUSR1",
        },
        "checkpoint.save_signal: 'SIGUSR1' is train.exit_signal too, which saves and stops; "
        "choose another signal for one of them",
    ),
    (
        {"train.micro_batch_size": 4, "train.global_batch_size": 6},
        "train.global_batch_size: 6 is not a multiple of micro_batch_size 4; change one of them",
    ),
    (
        {"train.rampup_batch_size": [2, 2]},
        "train.rampup_batch_size: [2, 2] is not valid; write [start, increment, samples], each 1 or more",
    ),
    (
        {"train.rampup_batch_size": [2, 2, 8]},
        "train.rampup_batch_size: [2, 2, 8] leads to no batch size; set train.global_batch_size",
    ),
    (
        {"train.rampup_batch_size": [2, 4, 8], "train.global_batch_size": 8},
        "train.rampup_batch_size: [2, 4, 8] does not reach global_batch_size 8 from 2 in steps of 4; "
        "choose a smaller start and an increment that divides the difference",
    ),
    (
        {"train.rampup_batch_size": [8, 4, 8], "train.global_batch_size": 8},
        "train.rampup_batch_size: [8, 4, 8] does not reach global_batch_size 8 from 8 in steps of 4; "
        "choose a smaller start and an increment that divides the difference",
    ),
    # data
    (
        {"dataset.path": None},
        "dataset.path: null leaves nothing to train on; set it, or dataset.mock to true",
    ),
    ({"dataset.path": []}, "dataset.path: [] leaves nothing to train on; set it, or dataset.mock to true"),
    (
        {"dataset.mock": True},
        "dataset.mock: true would ignore dataset.path; set it to false, or leave out the path",
    ),
    (
        {"dataset.path": ["a", "b"], "dataset.weights": [1.0]},
        "dataset.weights: [1.0] does not weigh the 2 entries of a list in dataset.path; "
        "give each entry a number above 0",
    ),
    (
        {"dataset.weights": [1.0]},
        "dataset.weights: [1.0] does not weigh the 0 entries of a list in dataset.path; "
        "give each entry a number above 0",
    ),
    (
        {"dataset.path": ["a"], "dataset.weights": [0.0]},
        "dataset.weights: [0.0] does not weigh the 1 entries of a list in dataset.path; "
        "give each entry a number above 0",
    ),
    *(
        (
            {"dataset.split": split},
            f"dataset.split: {split!r} is not three relative sizes; write them as in '99,1,0', the first above 0",
        )
        for split in ("", "99,1", "0,1,1", "99,-1,1", "a,b,c", "1,inf,0", "nan,1,1", "1,nan,1")
    ),
    ({"dataset.num_workers": -1}, "dataset.num_workers: -1 is too small; set it to 0 or more"),
    (
        {"tokenizer.tokenizer_model": None},
        "tokenizer.tokenizer_model: null is needed by HuggingFaceTokenizer; set it",
    ),
    (
        {"tokenizer.vocab_size": 100},
        "tokenizer.vocab_size: 100 has no effect with HuggingFaceTokenizer; leave it at null",
    ),
    (NULL, "tokenizer.vocab_size: null is needed by NullTokenizer; set it"),
    (
        {**NULL, "tokenizer.vocab_size": 9, "tokenizer.tokenizer_model": "t"},
        "tokenizer.tokenizer_model: 't' has no effect with NullTokenizer; leave it at null",
    ),
    # around the run
    ({"rng.seed": 0}, "rng.seed: 0 is out of range; set it to a number from 1 to below 2147483648"),
    (
        {"dist.distributed_timeout_minutes": 0},
        "dist.distributed_timeout_minutes: 0 is too small; set it to 1 or more",
    ),
    ({"dist.backend": "mpi"}, "dist.backend: 'mpi' is not valid; set it to 'nccl' or 'gloo' or null"),
    ({"logger.log_interval": 0}, "logger.log_interval: 0 is too small; set it to 1 or more"),
    (
        {"logger.wandb_exp_name": "first"},
        "logger.wandb_exp_name: 'first' has no effect without logger.wandb_project; set that, or leave this out",
    ),
    (
        {"logger.mlflow_tags": {"team": "a"}},
        "logger.mlflow_tags: {'team': 'a'} has no effect without logger.mlflow_experiment; set that, or leave this out",
    ),
    (
        {"logger.comet_offline_dir": "runs/comet"},
        "logger.comet_offline_dir: 'runs/comet' has no effect without logger.comet_project; set that, or leave this "
        "out",
    ),
    (
        {"logger.otlp_endpoint": "localhost:4318"},
        "logger.otlp_endpoint: 'localhost:4318' is no URL of a collector; set it to one, as in 'http://localhost:4318'",
    ),
    (
        {"logger.otlp_endpoint": "https://bob:secret@otel.example/v1/traces"},
        "logger.otlp_endpoint: 'https://***@otel.example/v1/traces' holds credentials; "
        "give them as a header in the environment: OTEL_EXPORTER_OTLP_HEADERS",
    ),
    (
        {"logger.mlflow_experiment": "mine", "logger.mlflow_tracking_uri": "https://bob:secret@mlflow.example"},
        "logger.mlflow_tracking_uri: 'https://***@mlflow.example' holds credentials; give them in the environment: "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN; for a database, leave this "
        "out and give the whole address as MLFLOW_TRACKING_URI",
    ),
    # checkpoint rules reach the container
    (
        {"checkpoint.ckpt_step": 3},
        "checkpoint.ckpt_step: 3 names an iteration of no directory; "
        "set checkpoint.load to the directory that holds it, or ckpt_step to null",
    ),
    (
        {"checkpoint.strict_fsdp_dtensor_load": True},
        "checkpoint.strict_fsdp_dtensor_load: true has no effect with checkpoint.ckpt_format 'torch_dist'; "
        "leave it at false, or see checkpoint.dist_ckpt_strictness",
    ),
    # types
    (
        {"model.num_layers": "4"},
        "model.num_layers: '4' is not valid; set it to an integer, without quotes "
        "(${oc.decode:${oc.env:NAME}} reads one from the environment)",
    ),
    ({"optimizer.lr": float("nan")}, "optimizer.lr: nan is not valid; set it to a finite number"),
    ({"optimizer.lr": float("inf")}, "optimizer.lr: inf is not valid; set it to a finite number"),
    ({"optimizer.lr": 10**400}, f"optimizer.lr: {10**400} is not valid; set it to a finite number"),
    ({"dataset.path": [1]}, "dataset.path: [1] is not valid; set it to a string or a list of strings or null"),
    (
        {"dataset.path": ("a",)},
        "dataset.path: ('a',) is not valid; set it to a string or a list of strings or null, in quotes",
    ),
    (
        {"model.transformer_overrides": {"activation": {1}}},
        "model.transformer_overrides: {'activation': {1}} is not valid; set it to plain values only: strings, "
        "numbers, true, false, null, lists and mappings",
    ),
    ({"model": OptimizerConfig()}, f"model: {OptimizerConfig()!r} is not valid; set it to a GPTModelConfig"),
]


@pytest.mark.parametrize(("settings", "message"), BROKEN)
def test_refuses_with_one_line(settings: dict[str, Any], message: str) -> None:
    assert problems(settings) == [message]


WORLD: list[tuple[dict[str, Any], int, list[str]]] = [
    ({}, 1, []),
    ({"model.tensor_model_parallel_size": 2, "train.global_batch_size": 6}, 6, []),
    (
        {"model.tensor_model_parallel_size": 2, "model.pipeline_model_parallel_size": 2},
        6,
        [
            "world size: 6 is not a multiple of model.tensor_model_parallel_size 2 * pipeline_model_parallel_size 2 "
            "* context_parallel_size 1 = 4; start a multiple of 4 ranks, or change the sizes"
        ],
    ),
    (
        {},
        0,
        [
            "world size: 0 is not a multiple of model.tensor_model_parallel_size 1 * pipeline_model_parallel_size 1 "
            "* context_parallel_size 1 = 1; start a multiple of 1 ranks, or change the sizes"
        ],
    ),
    (
        {"train.micro_batch_size": 2, "train.global_batch_size": 10},
        4,
        [
            "train.global_batch_size: 10 is not a multiple of micro_batch_size 2 * data-parallel size 4 = 8; "
            "change one of them"
        ],
    ),
    (
        {"train.global_batch_size": 8, "train.rampup_batch_size": [2, 2, 100]},
        4,
        [
            "train.rampup_batch_size: [2, 2, 100] has a start or an increment that is not a multiple of "
            "micro_batch_size 1 * data-parallel size 4 = 4; change one of them"
        ],
    ),
    ({**MOE, "model.expert_model_parallel_size": 4}, 4, []),
    (
        {**MOE, "model.expert_model_parallel_size": 4},
        2,
        [
            "model.expert_model_parallel_size: 4 does not divide the 2 ranks: times expert tensor parallel size 1 "
            "and pipeline_model_parallel_size 1 it takes a multiple of 4; change one of them"
        ],
    ),
]


@pytest.mark.parametrize(("settings", "world_size", "expected"), WORLD)
def test_rules_of_the_world_size(settings: dict[str, Any], world_size: int, expected: list[str]) -> None:
    assert problems(settings) == []
    assert problems(settings, world_size) == expected


@pytest.mark.parametrize(("sizes", "world_size", "expected"), [((1, 1, 1), 8, 8), ((2, 2, 1), 8, 2), ((2, 1, 2), 4, 1)])
def test_data_parallel_size(sizes: tuple[int, int, int], world_size: int, expected: int) -> None:
    config = ConfigContainer()
    model = config.model
    model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size = sizes
    assert config.data_parallel_size(world_size) == expected


def test_data_parallel_size_of_a_world_that_does_not_fit() -> None:
    config = configure({"model.tensor_model_parallel_size": 4})
    with pytest.raises(ConfigError, match=r"^world size: 6 is not a multiple of"):
        config.data_parallel_size(6)


def test_reports_everything_at_once_and_in_the_order_of_the_sections() -> None:
    settings = {
        "model.num_layers": "two",
        "model.hidden_size": 130,
        "optimizer.min_lr": 1.0,
        "train.train_iters": None,
        "dataset.path": None,
        "checkpoint.async_save": True,
        "checkpoint.ckpt_step": 5,
        "checkpoint.strict_fsdp_dtensor_load": True,
        "logger.log_level": "LOUD",
        "peft": {},
    }
    assert [line.split(":")[0] for line in problems(settings, world_size=2)] == [
        "model.num_layers",
        "logger.log_level",
        "peft",
        "optimizer.min_lr",
        "train.train_iters",
        "dataset.path",
        "checkpoint.async_save",
        "checkpoint.ckpt_step",
        "checkpoint.strict_fsdp_dtensor_load",
    ]


def test_the_error_shows_every_problem() -> None:
    config = configure({"train.train_iters": None, "rng.seed": -1})
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert str(caught.value) == (
        "the configuration has 2 problems:\n"
        "  - train.train_iters: null does not say how long to train; set the number of iterations\n"
        "  - rng.seed: -1 is out of range; set it to a number from 1 to below 2147483648"
    )
    assert isinstance(caught.value, ValueError)


def test_validation_changes_nothing() -> None:
    config = configure({"optimizer.lr": 1, "checkpoint.save": "/s"})
    before = dataclasses.asdict(config)
    config.validate(world_size=2)
    assert dataclasses.asdict(config) == before
    assert type(config.optimizer.lr) is int


@pytest.mark.parametrize("value", [-(10**30), -1, 0, 10**30])
def test_no_number_makes_a_rule_crash(value: int) -> None:
    """Whatever a number is, the answer is violations or none, never another exception."""
    for name, section in field_types(ConfigContainer).items():
        if not dataclasses.is_dataclass(section):
            continue
        for field, declared in field_types(section).items():
            if "int" in str(declared) or "float" in str(declared):
                changed = [value] * 3 if "list" in str(declared) else value
                problems({f"{name}.{field}": changed}, world_size=4)
                problems({**MOE, f"{name}.{field}": changed}, world_size=4)
