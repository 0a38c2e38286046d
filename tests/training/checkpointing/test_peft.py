"""A run with PEFT saves its adapters, resumes from them bit for bit, and never takes them for a base model."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.utils import unwrap_model

from bridge.peft import LoRA
from bridge.training.checkpointing import CheckpointSaveContext, save_checkpoint
from bridge.training.checkpointing.contents.peft import apply_peft_adapter_filter_to_state_dict
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import CheckpointLoaded
from bridge.training.checkpointing.plans.adapters import Adapters, other_base, require_adapters, saved_adapters
from bridge.training.config import ConfigContainer, LoRAConfig
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import LAYOUTS, run_to_end, tiny_config

SWIGLU = {"activation": "swiglu", "precision": "bf16"}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
EXPERTS = {key: value for key, value in LAYOUTS["EP2"][1].items() if key != "expert_model_parallel_size"}
BASES: dict[str, dict[str, Any]] = {"dense": {}, "swiglu": SWIGLU, "experts": EXPERTS}

RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "DP2": (2, "dense", {}),
    "TP2": (2, "dense", {"model": {"tensor_model_parallel_size": 2}}),
    "PP2": (2, "dense", {"model": {"pipeline_model_parallel_size": 2}}),
    "PP2 with VPP2": (2, "dense", {"model": LAYOUTS["PP2 with VPP2"][1]}),
    "EP2": (2, "experts", {"model": LAYOUTS["EP2"][1]}),
    "TP2, bf16 and swiglu, plain optimizer, recomputation": (
        2,
        "swiglu",
        {
            "model": {
                **SWIGLU,
                "tensor_model_parallel_size": 2,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            "ddp": {"use_distributed_optimizer": False},
        },
    ),
}
"""Name → (world size, base model, settings)."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a base model's checkpoints, of iterations 1 and 2."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base")
            checkpoint = {"save": str(made[name]), "save_interval": 1}
            run_ranks(run_to_end, 1, tiny_config(train_iters=2, model=BASES[name], checkpoint=checkpoint))
        return made[name]

    return get


def lora_config(base: Path, *, train_iters: int = 4, **settings: dict[str, Any]) -> ConfigContainer:
    """A valid configuration of a run with LoRA; `settings` as in `tiny_config`, and `peft`."""
    peft = LoRAConfig(**{"dim": 4, "dropout": 0.1, **settings.pop("peft", {})})
    checkpoint = {"pretrained_checkpoint": str(base), **settings.pop("checkpoint", {})}
    cfg = tiny_config(train_iters=train_iters, checkpoint=checkpoint, **settings)
    cfg.peft = peft
    return cfg


def payload(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint whole, by its key, as stock torch reads it."""
    reader = dcp.FileSystemReader(checkpoint)
    found = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in found.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def model_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in payload(checkpoint).items() if not key.startswith("optimizer.")}


def losses(path: Path) -> dict[int, float]:
    return {entry["iteration"]: entry["loss"] for entry in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "sync") for name in RUNS), *((name, "async") for name in ("DP2", "TP2", "PP2"))],
)
def test_resume_is_bitwise(base: Callable[[str], Path], tmp_path: Path, name: str, mode: str) -> None:
    world_size, kind, settings = RUNS[name]
    save = tmp_path / "adapters"

    def config(**more: Any) -> ConfigContainer:
        checkpoint = {"save": str(save), "save_interval": 2, "async_save": mode == "async", **more}
        return lora_config(base(kind), train_iters=4, **settings, checkpoint=checkpoint)

    expected = run_ranks(run_to_end, world_size, config())
    found = run_ranks(run_to_end, world_size, config(load=str(save), ckpt_step=2))
    for rank in range(world_size):
        assert [iteration for _, iteration, _ in expected[rank]["saved"]] == [2, 4]
        assert expected[rank]["loaded from"] == str(base(kind) / "iter_0000002")
        assert found[rank]["loaded from"] == str(save / "iter_0000002")
        assert found[rank]["started at"] == 2
        assert found[rank]["digests"] == expected[rank]["digests"]
    # The base is loaded before there is a file of events to tell of it.
    told = [event.path for event in read_events(save).events if isinstance(event, CheckpointLoaded)]
    base_model = str(base(kind) / "iter_0000002")
    assert told == [base_model, base_model, str(save / "iter_0000002")]


def test_recomputation_changes_nothing(base: Callable[[str], Path]) -> None:
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain, again = (
        run_ranks(run_to_end, 1, lora_config(base("dense"), model=model, train_iters=2)) for model in ({}, recompute)
    )
    assert plain[0]["digests"] == again[0]["digests"]


def test_a_checkpoint_holds_the_adapters_and_the_base_stays_as_it_was(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    def run(cfg: ConfigContainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        given = copy.deepcopy(cfg)
        run = setup(cfg)
        before = {name: value.clone() for name, value in unwrap_model(run.model)[0].named_parameters()}
        train(run)
        assert cfg == given
        after = dict(unwrap_model(run.model)[0].named_parameters())
        return before, {name: value.detach().clone() for name, value in after.items()}

    save = tmp_path / "adapters"
    peft = {"target_modules": ["linear_qkv", "linear_fc2"], "dim": 2}
    cfg = lora_config(base("dense"), checkpoint={"save": str(save)}, peft=peft)
    before, after = run_ranks(run, 2, cfg)[0]
    frozen = {name for name in before if ".adapter." not in name}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not any(torch.equal(before[name], after[name]) for name in before.keys() - frozen)

    whole, saved = base("dense") / "iter_0000002", save / "iter_0000004"
    own = {
        f"decoder.layers.{layer}.adapter.{projection}.weight"
        for layer in ("self_attention.linear_qkv", "mlp.linear_fc2")
        for projection in ("linear_in", "linear_out")
    }
    keys = set(dcp.FileSystemReader(saved).read_metadata().state_dict_metadata)
    assert {key for key in keys if not key.startswith(("optimizer.", "rng_state/"))} == own
    trained = after["decoder.layers.3.mlp.linear_fc2.adapter.linear_out.weight"]
    assert torch.equal(model_tensors(saved)["decoder.layers.mlp.linear_fc2.adapter.linear_out.weight"][3], trained)
    for key, value in model_tensors(whole).items():
        name = key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        if name.startswith("decoder.layers."):
            stacked = [before[name.replace("layers.", f"layers.{layer}.", 1)] for layer in range(4)]
            assert torch.equal(torch.stack(stacked), value)
    size = {path: sum(file.stat().st_size for file in path.glob("*.distcp")) for path in (whole, saved)}
    assert size[saved] < size[whole] / 10


@pytest.mark.parametrize("kind", ["dense", "swiglu"])
def test_adapters_load_under_other_parallel_sizes(base: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    first = tmp_path / "TP2"
    split = {"tensor_model_parallel_size": 2}
    model = {**BASES[kind], **NO_DROPOUT}
    peft = {"dropout": 0.0}
    reshardable = {"dist_ckpt_optim_fully_reshardable": True}
    cfg = lora_config(
        base(kind), train_iters=2, model=model | split, checkpoint={"save": str(first), **reshardable}, peft=peft
    )
    run_ranks(run_to_end, 2, cfg)
    expected = model_tensors(first / "iter_0000002")
    found: dict[str, float] = {}
    sizes = {"TP2": (2, split), "TP1": (1, {}), "PP2": (2, {"pipeline_model_parallel_size": 2})}
    for name, (world_size, layout) in sizes.items():
        checkpoint = {"load": str(first), "save": str(tmp_path / name / "next"), "save_interval": 3, **reshardable}
        metrics = tmp_path / f"{name}.jsonl"
        cfg = lora_config(
            base(kind),
            train_iters=4,
            model=model | layout,
            checkpoint=checkpoint,
            peft=peft,
            logger={"metrics_path": str(metrics)},
        )
        run_ranks(_save_and_train, world_size, cfg)
        resharded = model_tensors(tmp_path / name / "next" / "iter_0000002")
        assert resharded.keys() == expected.keys()
        assert all(torch.equal(resharded[key], expected[key]) for key in expected)
        found[name] = losses(metrics)[4]
    # The sizes change the order in which matrix products are added up, and with bf16 what is rounded.
    tolerance = 1e-5 if kind == "dense" else 2e-3
    assert found["TP1"] == pytest.approx(found["TP2"], rel=tolerance)
    assert found["PP2"] == pytest.approx(found["TP2"], rel=tolerance)


def _save_and_train(cfg: ConfigContainer) -> None:
    run = setup(cfg)
    context = CheckpointSaveContext(run.state, run.model, run.optimizer, run.scheduler, 0)
    run.manager.save(context, None)
    train(run)


def test_a_merged_model_is_a_base_like_any_other(base: Callable[[str], Path], tmp_path: Path) -> None:
    def merge_and_save(cfg: ConfigContainer) -> torch.Tensor:
        run = setup(cfg)
        train(run)
        before = _logits(run)
        assert isinstance(run.state.peft, LoRA)
        run.state.peft.merge(run.model)
        run.state.peft = None
        save_checkpoint(run.state, run.model, None, None, 0)
        return before

    merged = tmp_path / "merged"
    checkpoint = {"save": str(merged), "save_interval": 0, "save_optim": False, "save_rng": False}
    (expected,) = run_ranks(merge_and_save, 1, lora_config(base("dense"), checkpoint=checkpoint))
    plain = tiny_config(checkpoint={"pretrained_checkpoint": str(merged)})
    (found,) = run_ranks(lambda: _logits(setup(plain)), 1)
    (untrained,) = run_ranks(lambda: _logits(setup(lora_config(base("dense")))), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - untrained).abs().max() > 0.01
    whole = base("dense") / "iter_0000002"
    assert model_tensors(merged / "iter_0000004").keys() == model_tensors(whole).keys()


def _logits(run: Any) -> torch.Tensor:
    (chunk,) = run.model
    chunk.eval()
    with torch.no_grad():
        output: torch.Tensor = chunk(torch.arange(64).view(2, 32), torch.arange(32).expand(2, 32), None)
    return output


def _attempt(cfg: ConfigContainer) -> str:
    """The error that ends a run before it trains, and nothing else of it."""
    with pytest.raises(Exception) as caught:
        setup(cfg)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_whole_model_and_adapters_are_never_taken_for_each_other(base: Callable[[str], Path], tmp_path: Path) -> None:
    whole, adapters = base("dense"), tmp_path / "adapters"
    run_ranks(run_to_end, 2, lora_config(whole, train_iters=2, checkpoint={"save": str(adapters)}))
    here, there = adapters / "iter_0000002", whole / "iter_0000002"
    no_model = (
        f"CheckpointMismatchError: {here} holds only the adapters of a run with peft, and no model; set "
        "checkpoint.pretrained_checkpoint to the base model that they were trained on, which is "
        f"{there}, and checkpoint.load to the adapters"
    )
    resumed = {"load": str(adapters)}
    cases = [
        (lora_config(adapters), no_model),
        (lora_config(here), no_model),
        (tiny_config(checkpoint={"load": str(adapters)}), no_model),
        (tiny_config(checkpoint={"pretrained_checkpoint": str(adapters)}), no_model),
        (
            lora_config(whole, checkpoint={"load": str(whole)}),
            f"CheckpointMismatchError: {there} holds a whole model, and a run with peft continues from adapters only; "
            "set checkpoint.pretrained_checkpoint to the model, and checkpoint.load to the directory that this run "
            "saves to",
        ),
        (
            lora_config(whole, checkpoint=resumed, peft={"dim": 8, "alpha": 1.0}),
            f"CheckpointMismatchError: the adapters in {here} are others than this run's: peft.dim was 4 and is 8, "
            "peft.alpha was 32.0 and is 1.0; keep the settings, or start other adapters with another checkpoint.load",
        ),
        (
            lora_config(tmp_path / "nothing"),
            "CheckpointNotFoundError: checkpoint.pretrained_checkpoint: there is no checkpoint in "
            f"{tmp_path / 'nothing'}",
        ),
    ]
    found = run_ranks(lambda: [_attempt(cfg) for cfg, _ in cases], 2)
    assert found == [[message for _, message in cases]] * 2


def test_the_base_is_always_the_newest_and_adapters_start_afresh(base: Callable[[str], Path], tmp_path: Path) -> None:
    """`ckpt_step` is for the adapters; an empty `load` gives fresh ones; another base is reported."""

    def run(cfg: ConfigContainer) -> tuple[Any, str | None, list[str]]:
        heard = _Heard()
        logging.getLogger("bridge").addHandler(heard)
        run = setup(cfg)
        return run.state.train_state.step, run.state.base_checkpoint, heard.warnings

    older, newest = base("dense") / "iter_0000001", base("dense") / "iter_0000002"
    adapters = tmp_path / "adapters"
    checkpoint = {"load": str(adapters), "save": str(adapters), "save_interval": 1}
    fresh = lora_config(base("dense"), checkpoint=checkpoint)
    step, used, warnings = run_ranks(run, 1, fresh)[0]
    assert (step, used) == (0, str(newest))
    assert any("STARTING WITH FRESH ADAPTERS: there is no checkpoint in" in warning for warning in warnings)
    run_ranks(run_to_end, 1, lora_config(base("dense"), train_iters=3, checkpoint=checkpoint))
    step, used, warnings = run_ranks(run, 1, lora_config(base("dense"), checkpoint={**checkpoint, "ckpt_step": 1}))[0]
    assert (step, used, [text for text in warnings if "BASE" in text]) == (1, str(newest), [])
    step, used, warnings = run_ranks(run, 1, lora_config(older, checkpoint=checkpoint))[0]
    assert (step, used) == (3, str(older))
    assert [text for text in warnings if "BASE" in text] == [
        f"ANOTHER BASE MODEL: the adapters in {adapters / 'iter_0000003'} were trained on {newest}, which is not what "
        "checkpoint.pretrained_checkpoint gives now; name that one to go on with it"
    ]


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


def test_the_filter_keeps_adapters_and_every_other_section() -> None:
    def sharded(key: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.zeros(2), replica_id=0)

    keys = ["linear.weight", "linear.bias", "linear.adapter.linear_in.weight", "linear._extra_state"]
    keys += ["linear.adapter._extra_state", "output.bias", "block.adapters"]
    state_dict: dict[str, Any] = {
        "model": {key: sharded(key) for key in keys},
        "model0": {key: sharded(key) for key in keys},
        "model12": {key: torch.zeros(1) for key in keys},
        "model_config": {"linear.weight": 1},
        "optimizer": {"linear.weight": 2},
        "iteration": 3,
    }
    lora = LoRA()
    lora.params_to_save = {"output.bias"}
    filtered = apply_peft_adapter_filter_to_state_dict(state_dict, lora)
    kept = ["linear.adapter.linear_in.weight", "output.bias", "block.adapters"]
    for section in ("model", "model0", "model12"):
        assert filtered[section] == {key: state_dict[section][key] for key in kept}
        assert len(state_dict[section]) == len(keys)
    assert {key: filtered[key] for key in ("model_config", "optimizer", "iteration")} == {
        key: state_dict[key] for key in ("model_config", "optimizer", "iteration")
    }


LORA = {"dim": 4, "alpha": 8.0, "target_modules": ["a", "b"], "dropout": 0.0}
OURS = Adapters(LORA, "/base/iter_0000001")


@pytest.mark.parametrize(
    ("metadata", "config", "expected"),
    [
        (None, None, None),
        ({"singleton_local_shards": False}, {"peft": None}, None),
        (OURS.mark(), {"peft": None}, OURS),
        (OURS.mark(), None, OURS),
        ({}, {"peft": {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 8}}, Adapters()),
    ],
)
def test_adapters_are_recognised_by_their_mark_and_elsewhere_by_the_configuration(
    metadata: dict[str, Any] | None, config: dict[str, Any] | None, expected: Adapters | None
) -> None:
    assert saved_adapters(metadata, config) == expected


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (OURS, None),
        (replace(OURS, base="/elsewhere"), None),
        (Adapters({**LORA, "dropout": 0.5, "target_modules": ["b", "a"], "new": 1}), None),
        (Adapters({**LORA, "dim": 2}), "peft.dim was 4 and is 2"),
        (Adapters({**LORA, "target_modules": ["a"]}), r"peft.target_modules was \['a', 'b'\] and is \['a'\]"),
        (None, "holds only the adapters"),
    ],
)
def test_which_adapters_may_continue(wanted: Adapters | None, problem: str | None) -> None:
    if problem is None:
        require_adapters(Path("/x"), OURS, wanted)
        return
    with pytest.raises(CheckpointMismatchError, match=problem):
        require_adapters(Path("/x"), OURS, wanted)


def test_another_base_is_one_at_another_place() -> None:
    assert other_base(OURS, OURS) is None
    assert other_base(OURS, replace(OURS, base="/base/./iter_0000001")) is None
    assert other_base(OURS, replace(OURS, base=None)) is None
    assert other_base(OURS, replace(OURS, base="/base/iter_0000002")) == "/base/iter_0000001"
    assert other_base(None, OURS) is None
