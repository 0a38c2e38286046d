"""The training loop on real ranks: deterministic, learning, and asking its manager for the right things."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.setup import setup as set_up
from bridge.training.train import TrainOutcome, pretrain, train
from tests.distributed.launch import RankError, init_ranks, run_ranks
from tests.training.tiny import LAYOUTS, digests, tiny_config


class RecordingManager:
    """A checkpoint manager that writes nothing and remembers what it was asked."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012  (one list for the one run of a process)

    def __init__(self, checkpoint_config: Any) -> None:
        self.calls.clear()

    def save(self, ctx: Any, callback_manager: Any) -> None:
        self.calls.append(("save", ctx.state.train_state.step))

    def load(self, ctx: Any) -> tuple[int, int]:
        self.calls.append(("load", ctx.strict))
        return 0, 0

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        self.calls.append(("finalize", blocking, terminate))


RECORDING = f"{__name__}.RecordingManager"


def _train_once(settings: dict[str, Any], metrics: Path | None = None) -> tuple[dict[str, str], list[float]]:
    cfg = tiny_config(**settings)
    cfg.logger.metrics_path = None if metrics is None else str(metrics)
    run = set_up(cfg)
    train(run)
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()] if metrics else []
    return digests(run), losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_bitwise_deterministic(layout: str, tmp_path: Path) -> None:
    world_size, model = LAYOUTS[layout]
    settings = {"model": model}

    def two_runs() -> tuple[dict[str, str], dict[str, str]]:
        first, _ = _train_once(settings, tmp_path / "first.jsonl")
        second, _ = _train_once(settings, tmp_path / "second.jsonl")
        return first, second

    for first, second in run_ranks(two_runs, world_size):
        assert first == second

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name).read_text().splitlines()]

    assert len(losses("first.jsonl")) == 4
    assert losses("first.jsonl") == losses("second.jsonl")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls(precision: str, tmp_path: Path) -> None:
    settings = {
        "train_iters": 30,
        "model": {"precision": precision, "num_layers": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0},
        "ddp": {"check_for_nan_in_grad": precision != "fp16"},
    }
    [(_, losses)] = run_ranks(_train_once, 1, settings, tmp_path / "m.jsonl")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_data_parallel_ranks_share_the_batch_of_a_single_rank(tmp_path: Path) -> None:
    quiet = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    for world_size in (1, 2):
        run_ranks(_train_once, world_size, {"train_iters": 2, "model": quiet}, tmp_path / f"{world_size}.jsonl")
    alone, shared = (
        [json.loads(line)["loss"] for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()] for size in (1, 2)
    )
    assert shared == pytest.approx(alone, rel=1e-6)


FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False}
LEARNED = {"position_embedding_type": "learned_absolute", "transformer_overrides": {"qk_layernorm": True}}
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "full recompute": (1, {"model": FULL_RECOMPUTE}),
    "llama-like": (1, {"model": {"num_query_groups": 2, "activation": "swiglu", "normalization": "RMSNorm"}}),
    "learned positions and an override": (1, {"model": LEARNED}),
    "untied embeddings": (2, {"model": {"share_embeddings_and_output_weights": False}}),
    "alltoall dispatch": (2, {"model": EXPERTS | {"moe_token_dispatcher_type": "alltoall"}}),
    "experts in a pipeline": (2, {"model": EXPERTS | {"pipeline_model_parallel_size": 2}}),
    "three pipeline stages": (3, {"model": {"num_layers": 3, "pipeline_model_parallel_size": 3}}),
    "SGD": (1, {"optimizer": {"optimizer": "sgd"}, "ddp": {"use_distributed_optimizer": False}}),
    "plain optimizer": (2, {"ddp": {"use_distributed_optimizer": False}}),
    "overlap": (2, {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "ramp-up": (1, {"train": {"rampup_batch_size": [4, 4, 8]}}),
    "random replicas": (2, {"rng": {"data_parallel_random_init": True}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train(variant: str, tmp_path: Path) -> None:
    world_size, settings = VARIANTS[variant]
    run_ranks(_train_once, world_size, settings, tmp_path / "m.jsonl")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(0 < loss < 7 for loss in losses)


def test_overlapping_communication_gives_the_same_losses(tmp_path: Path) -> None:
    for name, overlap in (("plain", False), ("overlap", True)):
        ddp = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
        run_ranks(_train_once, 2, {"ddp": ddp}, tmp_path / f"{name}.jsonl")
    plain, overlapped = (
        [json.loads(line)["loss"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("plain", "overlap")
    )
    assert plain == overlapped


def _calls(settings: dict[str, Any]) -> tuple[TrainOutcome, list[tuple[Any, ...]]]:
    cfg = tiny_config(**settings)
    cfg.checkpoint.custom_manager_class = RECORDING
    return pretrain(cfg), RecordingManager.calls


@pytest.mark.parametrize(
    ("iterations", "checkpoint", "saves"),
    [
        (4, {"save": "x", "save_interval": 2}, [2, 4]),
        (5, {"save": "x", "save_interval": 2}, [2, 4, 5]),
        (3, {"save": "x", "save_interval": None}, [3]),
        (3, {"save": "x", "save_interval": 0}, []),
        (3, {"save": None}, []),
    ],
)
def test_saves_happen_at_the_interval_and_once_at_the_end(
    iterations: int, checkpoint: dict[str, Any], saves: list[int]
) -> None:
    settings = {"train_iters": iterations, "checkpoint": checkpoint}
    [(outcome, calls)] = run_ranks(_calls, 1, settings)
    assert outcome == TrainOutcome(True, f"train.train_iters ({iterations}) reached", iterations)
    assert [step for kind, step, *_ in calls if kind == "save"] == saves
    assert calls[0] == ("load", True)
    assert calls.count(("finalize", False, False)) == iterations
    assert calls[-1] == ("finalize", True, True)
    assert calls.count(("finalize", True, True)) == 1


def test_exit_interval_saves_once_and_stops() -> None:
    settings = {
        "train_iters": 9,
        "train": {"exit_interval": 4},
        "checkpoint": {"save": "x", "save_interval": 2},
    }
    [(outcome, calls)] = run_ranks(_calls, 1, settings)
    assert outcome == TrainOutcome(False, "iteration 4 is a multiple of train.exit_interval (4)", 4)
    assert [step for kind, step, *_ in calls if kind == "save"] == [2, 4]
    assert calls[-1] == ("finalize", True, True)


def test_exit_duration_saves_and_stops() -> None:
    settings = {"train_iters": 9, "train": {"exit_duration_in_mins": 1e-6}, "checkpoint": {"save": "x"}}
    outcomes = run_ranks(_calls, 2, settings)
    for outcome, calls in outcomes:
        assert outcome == TrainOutcome(False, "train.exit_duration_in_mins (1e-06) has passed", 1)
        assert ("save", 1) in calls


def test_sigterm_to_one_of_two_ranks_stops_both_after_one_save() -> None:
    def interrupted() -> tuple[TrainOutcome, list[tuple[Any, ...]]]:
        def interrupt(context: CallbackContext) -> None:
            if context.state.train_state.step == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

        cfg = tiny_config(
            train_iters=9,
            train={"exit_signal_handler": True},
            checkpoint={"save": "x", "save_interval": 3, "custom_manager_class": RECORDING},
        )
        callbacks = CallbackManager()
        callbacks.register("on_train_step_end", interrupt)
        outcome = pretrain(cfg, callbacks)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return outcome, RecordingManager.calls

    for outcome, calls in run_ranks(interrupted, 2):
        assert outcome == TrainOutcome(False, "SIGTERM was received", 3)
        assert [step for kind, step, *_ in calls if kind == "save"] == [3]
        assert calls[-1] == ("finalize", True, True)


def test_without_the_handler_sigterm_ends_the_process() -> None:
    def interrupted() -> None:
        callbacks = CallbackManager()
        callbacks.register("on_train_step_end", lambda context: os.kill(os.getpid(), signal.SIGTERM))
        pretrain(tiny_config(), callbacks)

    with pytest.raises(RankError, match="rank 0 died: killed by signal 15"):
        run_ranks(interrupted, 1)


def test_callbacks_hear_of_start_steps_and_end() -> None:
    def heard() -> list[tuple[str, int]]:
        events: list[tuple[str, int]] = []
        callbacks = CallbackManager()
        for event in ("on_train_start", "on_train_step_end", "on_train_end"):
            callbacks.register(event, lambda context, e=event: events.append((e, context.state.train_state.step)))
        pretrain(tiny_config(train_iters=2), callbacks)
        return events

    assert run_ranks(heard, 1) == [
        [("on_train_start", 0), ("on_train_step_end", 1), ("on_train_step_end", 2), ("on_train_end", 2)]
    ]


def test_the_metrics_file_has_a_line_an_iteration_written_by_one_rank(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    run_ranks(_train_once, 2, {"train_iters": 3}, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert [line["consumed_train_samples"] for line in lines] == [8, 16, 24]
    assert [line["lr"] for line in lines][:2] == [0.0, 0.01]
    assert all(isinstance(line["loss"], float) and line["seconds"] > 0 for line in lines)


def test_train_state_counts_samples_and_exact_flops() -> None:
    def counted() -> tuple[int, int, int]:
        run = set_up(tiny_config(train_iters=3))
        train(run)
        state = run.state.train_state
        saved = state.state_dict()["floating_point_operations_so_far"].item()
        assert int(saved) == state.floating_point_operations_so_far
        return state.step, state.consumed_train_samples, state.floating_point_operations_so_far

    [(step, samples, flops)] = run_ranks(counted, 1)
    assert (step, samples) == (3, 24)
    # 4 layers of (QKV and output 4*64*64, scores 2*64*32, MLP 8*64*64) and a vocabulary of 256
    assert flops == 24 * 6 * 32 * (4 * (4 * 64 * 64 + 2 * 64 * 32 + 8 * 64 * 64) + 64 * 256)


def test_an_overflowing_fp16_step_is_skipped_and_counted(tmp_path: Path) -> None:
    def overflow() -> tuple[int, int]:
        cfg = tiny_config(
            train_iters=2,
            model={"precision": "fp16", "num_layers": 2},
            optimizer={"initial_loss_scale": 2.0**40},
            ddp={"check_for_nan_in_grad": False},
        )
        run = set_up(cfg)
        train(run)
        return run.state.train_state.skipped_train_samples, run.scheduler.num_steps

    assert run_ranks(overflow, 1) == [(16, 0)]


def test_a_resumed_run_takes_its_learning_rate_from_the_configuration(tmp_path: Path) -> None:
    def run(lr: float, train_iters: int) -> None:
        cfg = tiny_config(
            train_iters=train_iters,
            optimizer={"lr": lr},
            scheduler={"lr_decay_style": "constant", "lr_warmup_iters": 0},
            checkpoint={"save": str(tmp_path / "saved"), "load": str(tmp_path / "saved")},
            logger={"metrics_path": str(tmp_path / "m.jsonl")},
        )
        pretrain(cfg)

    def rates_change() -> None:
        init_ranks()
        run(0.01, 2)
        run(0.02, 4)

    run_ranks(rates_change, 1)
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["lr"]) for line in lines] == [(1, 0.01), (2, 0.01), (3, 0.02), (4, 0.02)]


@pytest.mark.parametrize("layout", ["DP2", "PP2 with VPP2"])
def test_a_run_stopped_and_resumed_continues_bit_for_bit(layout: str, tmp_path: Path) -> None:
    world_size, model = LAYOUTS[layout]

    def run(name: str, exit_interval: int | None, checkpoint: dict[str, Any]) -> TrainOutcome:
        cfg = tiny_config(model=model, checkpoint=checkpoint, logger={"metrics_path": str(tmp_path / f"{name}.jsonl")})
        cfg.train.exit_interval = exit_interval
        return pretrain(cfg)

    def straight_and_interrupted() -> list[bool]:
        init_ranks()
        directory = str(tmp_path / "saved")
        return [
            run("straight", None, {}).reached_end,
            run("interrupted", 2, {"save": directory}).reached_end,
            run("interrupted", None, {"save": directory, "load": directory}).reached_end,
        ]

    assert run_ranks(straight_and_interrupted, world_size) == [[True, False, True]] * world_size
    straight, interrupted = (
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "interrupted")
    )
    assert straight == interrupted
