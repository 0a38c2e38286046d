"""Interleaved gated layers: the permutation itself, what it is applied to, and whole checkpoints."""

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import unwrap_model

from bridge.training.checkpointing import load_checkpoint, save_checkpoint
from bridge.training.checkpointing.contents import glu
from bridge.training.checkpointing.contents.optimizer import build_sharded_state_dict_metadata
from bridge.training.checkpointing.contents.state_dict import generate_state_dict
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.setup import Run, setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, tiny_config

KEY = "decoder.layers.0.mlp.experts.linear_fc1.weight"


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A tensor of distinct values whose rows can be divided into blocks, and the rows of a block."""
    size, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape = [2 * size * blocks, *draw(st.lists(st.integers(1, 3), max_size=2))]
    return torch.arange(torch.Size(shape).numel()).reshape(shape), size


@given(tensors())
def test_the_two_directions_are_each_others_reverse(case: tuple[torch.Tensor, int]) -> None:
    tensor, size = case
    assert torch.equal(glu.interleave_tensor(glu.deinterleave_tensor(tensor, size), size), tensor)
    assert torch.equal(glu.deinterleave_tensor(glu.interleave_tensor(tensor, size), size), tensor)


@given(tensors())
def test_interleaving_takes_blocks_of_both_halves_in_turn(case: tuple[torch.Tensor, int]) -> None:
    tensor, size = case
    half = len(tensor) // 2
    rows: list[torch.Tensor] = []
    for start in range(0, half, size):
        rows += [tensor[row] for row in range(start, start + size)]
        rows += [tensor[half + row] for row in range(start, start + size)]
    assert torch.equal(glu.interleave_tensor(tensor, size), torch.stack(rows))
    assert torch.equal(glu.deinterleave_tensor(torch.stack(rows), size), tensor)


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (12, 0), (12, -1), (7, 1), (12, 12)])
def test_rows_that_cannot_be_divided_are_refused_by_shape_and_size(rows: int, size: int) -> None:
    for change in (glu.interleave_tensor, glu.deinterleave_tensor):
        with pytest.raises(CheckpointMismatchError) as raised:
            change(torch.zeros(rows, 3), size)
        assert str(raised.value) == (
            f"a gated linear_fc1 of shape [{rows}, 3] cannot be interleaved in blocks of {size}: expected a positive "
            "number that divides half of its rows on one rank; set the model's moe_mlp_glu_interleave_size "
            "(or moe_shared_expert_glu_interleave_size) to one"
        )


ROUTED, SHARED, DENSE = "layers.0.mlp.experts.", "layers.0.mlp.shared_experts.", "layers.0.mlp."


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ROUTED + "linear_fc1.weight", "routed"),
        (ROUTED + "linear_fc1.weight13", "routed"),
        (ROUTED + "local_experts.1.linear_fc1.bias", "routed"),
        (SHARED + "linear_fc1.weight", "shared"),
        (DENSE + "linear_fc1.weight", "dense"),
        (DENSE + "linear_fc1.bias", "dense"),
        (ROUTED + "linear_fc2.weight", "none"),
        (ROUTED + "linear_fc1._extra_state", "none"),
        (DENSE + "linear_fc1.layer_norm_weight", "none"),
        (DENSE + "linear_fc1.adapter.linear_in.weight", "none"),
        (DENSE + "my_linear_fc1.weight", "none"),
        ("layers.0.self_attention.linear_qkv.weight", "none"),
    ],
)
def test_which_keys_are_gated(key: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def selected_by(name: str) -> bool:
        kinds = ("routed_experts", "shared_experts", "dense")
        return glu.is_gated_fc1_key(key, **{f"include_{other}": other.startswith(name) for other in kinds})

    monkeypatch.setenv(glu.DENSE_VARIABLE, "1")
    assert [name for name in ("routed", "shared", "dense") if selected_by(name)] == [kind][: kind != "none"]
    monkeypatch.delenv(glu.DENSE_VARIABLE)
    assert not selected_by("dense")
    assert glu.is_gated_fc1_key(key) is (kind == "routed")


def sharded(data: torch.Tensor | None) -> ShardedTensor:
    tensor = ShardedTensor.from_rank_offsets(KEY, torch.arange(16.0).reshape(8, 2))
    tensor.data = data
    return tensor


def test_everything_that_holds_a_tensor_is_changed_and_the_rest_is_not() -> None:
    tensor = torch.arange(16.0).reshape(8, 2)
    expected = glu.deinterleave_tensor(tensor, 2)
    halves = [ShardedTensor.from_rank_offsets(KEY, half, (0, i, 2)) for i, half in enumerate(tensor.chunk(2))]
    given_ = {
        "b.experts.linear_fc1.weight": tensor,
        "a.experts.linear_fc1.weight": sharded(tensor),
        "c.experts.linear_fc1.weight": ShardedObject(KEY, tensor, (1,), (0,)),
        "d.experts.linear_fc1.weight": halves,
        "e.experts.linear_fc1.weight": sharded(None),
        "f.experts.linear_fc2.weight": tensor,
        "g.experts.linear_fc1.weight": "no tensor",
    }
    found = glu.process_state_dict(given_, 2, interleave=False)
    assert list(found) == sorted(given_)
    assert torch.equal(found["b.experts.linear_fc1.weight"], expected)
    assert torch.equal(found["a.experts.linear_fc1.weight"].data, expected)
    assert torch.equal(found["c.experts.linear_fc1.weight"].data, expected)
    assert torch.equal(torch.cat([half.data for half in found["d.experts.linear_fc1.weight"]]), expected)
    assert found["e.experts.linear_fc1.weight"].data is None
    assert found["f.experts.linear_fc2.weight"] is tensor
    assert found["g.experts.linear_fc1.weight"] == "no tensor"
    assert torch.equal(tensor, torch.arange(16.0).reshape(8, 2)), "the given tensors must stay as they are"
    with pytest.raises(CheckpointMismatchError, match=r"^b\.experts\.linear_fc1\.weight: a gated linear_fc1 of shape"):
        glu.process_state_dict({"b.experts.linear_fc1.weight": tensor}, 3)


def test_each_kind_of_expert_has_a_size_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(glu.DENSE_VARIABLE, "1")
    tensor = torch.arange(16.0)
    keys = [f"{prefix}linear_fc1.weight" for prefix in (ROUTED, SHARED, DENSE)]
    given_ = dict.fromkeys(keys, tensor)

    def sizes(*sizes: int | None) -> list[int | None]:
        found = glu.process_model_state_dict(given_, *sizes, interleave=True)
        by_size = {None: tensor, 2: glu.interleave_tensor(tensor, 2), 4: glu.interleave_tensor(tensor, 4)}
        return [next(size for size, value in by_size.items() if torch.equal(found[key], value)) for key in keys]

    assert sizes(2, 4) == [2, 4, 2]
    assert sizes(None, 4) == [None, 4, None]
    assert sizes(2, None) == [2, None, 2]
    assert sizes(2, 2) == [2, 2, 2]
    assert sizes(None, None) == [None, None, None]


def test_a_factory_cuts_contiguous_shards_and_rejoins_them_interleaved() -> None:
    parameter = torch.nn.Parameter(torch.arange(16.0).reshape(8, 2))
    plain = apply_swiglu_sharded_factory(ShardedTensor.from_rank_offsets(KEY, parameter), ())
    found = glu.process_state_dict({KEY: plain}, 2, interleave=False)[KEY]
    assert found.data is parameter, "megatron-core looks the parameter's optimizer state up by identity"
    shards = found.build()
    assert [shard.global_offset for shard in shards] == [(0, 0), (4, 0)]
    assert torch.equal(torch.cat([shard.data for shard in shards]), glu.deinterleave_tensor(parameter.data, 2))
    assert torch.equal(found.merge_fn([shard.data for shard in shards]), parameter)
    again = glu.process_state_dict({KEY: found}, 2, interleave=True)[KEY]
    assert again is found, "one factory serves saving and loading; a second pass must not change it"
    assert isinstance(plain, ShardedTensorFactory) and torch.equal(plain.build()[0].data, parameter[:4])


class Config:
    moe_mlp_glu_interleave_size = 8
    moe_shared_expert_glu_interleave_size = 4


class Container:
    model = Config()


def test_the_sizes_come_from_the_model_or_without_one_from_the_configuration() -> None:
    chunk = torch.nn.Module()
    chunk.config = Config()  # type: ignore[assignment]
    assert glu.model_glu_sizes([chunk]) == (8, 4)
    assert glu.model_glu_sizes([], Container()) == (8, 4)
    assert glu.model_glu_sizes([]) == (None, None)
    cfg = tiny_config()
    assert glu.model_glu_sizes([], cfg) == (None, None)
    cfg.model.transformer_overrides = {"moe_mlp_glu_interleave_size": 2}
    assert glu.model_glu_sizes([], cfg) == (2, None)


SWIGLU = {
    "activation": "swiglu",
    "ffn_hidden_size": 64,
    "add_bias_linear": False,
    "share_embeddings_and_output_weights": False,
}
CASES: dict[str, dict[str, Any]] = {
    "dense, TP2": {"tensor_model_parallel_size": 2, "add_bias_linear": True},
    "dense, PP2 with VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "experts, EP2": {"expert_model_parallel_size": 2, "num_moe_experts": 4},
}


def build(model: dict[str, Any], sizes: tuple[int | None, int | None], **checkpoint: Any) -> Run:
    """A run that has not loaded anything, with its gated layers interleaved as `sizes` say."""
    reshardable = {"dist_ckpt_optim_fully_reshardable": True}
    run = setup(tiny_config(model=SWIGLU | model, checkpoint=reshardable | checkpoint))
    config = unwrap_model(run.model)[0].config
    config.moe_mlp_glu_interleave_size, config.moe_shared_expert_glu_interleave_size = sizes
    return run


def load(run: Run, path: Path) -> None:
    run.cfg.checkpoint.load = str(path)
    load_checkpoint(run.state, run.model, run.optimizer, run.scheduler)


def save(run: Run, path: Path, **arguments: Any) -> None:
    run.cfg.checkpoint.save = str(path)
    objects = {"model": run.model, "optimizer": run.optimizer, "opt_param_scheduler": run.scheduler} | arguments
    save_checkpoint(run.state, **objects, num_floating_point_operations_so_far=0)


def fill(run: Run) -> None:
    """Give every parameter, main parameter and moment values that tell each element from the others."""
    groups = run.pg_collection
    with torch.no_grad():
        for chunk in run.model:
            for name, parameter in chunk.named_parameters():
                seed = zlib.crc32(name.encode()) + 1000 * groups.pp.rank()
                if getattr(parameter, "tensor_model_parallel", False):
                    seed += groups.tp.rank()
                if not getattr(parameter, "allreduce", True):
                    seed += 100 * groups.ep.rank()
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        run.optimizer.reload_model_params()
        for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
            part.init_state_fn(part.optimizer, part.config)
            for parameter, moments in part.optimizer.state.items():
                moments["exp_avg"].copy_(2 * parameter)
                moments["exp_avg_sq"].copy_(3 * parameter)


def expanded_state(run: Run) -> dict[str, Any]:
    """What a save would write, with its factories expanded."""
    cfg = run.cfg.checkpoint
    metadata = {**build_sharded_state_dict_metadata(True, cfg), "dp_cp_group": run.pg_collection.dp_cp}
    building = {"metadata": metadata}
    state_dict = generate_state_dict(
        cfg, run.model, run.optimizer, run.scheduler, None, 0, optim_sd_kwargs=building, model_sd_kwargs=building
    )
    apply_factories(state_dict)
    return state_dict


def values(run: Run, size: int | None) -> dict[str, torch.Tensor]:
    """Parameters in the contiguous order, and the optimizer's shards as a save would write them."""
    found: dict[str, torch.Tensor] = {}
    for index, chunk in enumerate(unwrap_model(run.model)):
        for name, parameter in chunk.named_parameters():
            value = parameter.detach().clone()
            gated = size is not None and glu.is_gated_fc1_key(name)
            found[f"{index}.{name}"] = glu.deinterleave_tensor(value, size or 1) if gated else value
    shards, _ = extract_sharded_tensors(expanded_state(run)["optimizer"])
    for shard in nested_values(shards):
        found[f"shard {shard.key} {shard.global_offset}"] = shard.data.detach().clone()
    return found


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def gated(chunk: Any) -> list[torch.Tensor]:
    return [parameter.detach() for name, parameter in chunk.named_parameters() if glu.is_gated_fc1_key(name)]


def round_trip(directory: Path) -> dict[str, Any]:
    """contiguous -> blocks of 4 -> blocks of 8 -> contiguous, through a checkpoint each time."""
    os.environ[glu.DENSE_VARIABLE] = "1"
    found: dict[str, Any] = {}
    for name, model in CASES.items():
        base = directory / name.replace(" ", "")
        first = build(model, (None, None))
        fill(first)
        original = values(first, None)
        save(first, base / "contiguous")

        fours = build(model, (4, 4))
        load(fours, base / "contiguous")
        found[f"{name}: blocks of 4"] = differing(values(fours, 4), original)
        memory, before = gated(unwrap_model(fours.model)[0]), gated(unwrap_model(first.model)[0])
        found[f"{name}: the same in memory"] = [torch.equal(*pair) for pair in zip(memory, before, strict=True)]
        save(fours, base / "fours")

        eights = build(model, (8, 8))
        load(eights, base / "fours")
        found[f"{name}: blocks of 8"] = differing(values(eights, 8), original)
        prebuilt = expanded_state(eights)
        save(
            eights,
            base / "prebuilt",
            model=[],
            optimizer=None,
            opt_param_scheduler=None,
            prebuilt_state_dict=prebuilt,
            pg_collection=eights.pg_collection,
        )

        last = build(model, (None, None))
        load(last, base / "prebuilt")
        found[f"{name}: contiguous again"] = differing(values(last, None), original)
    return found


def test_a_checkpoint_is_contiguous_whatever_the_run_interleaves(tmp_path: Path) -> None:
    for found in run_ranks(round_trip, 2, tmp_path, timeout=180):
        for name in CASES:
            same = found.pop(f"{name}: the same in memory")
            assert same and not any(same), "the run must have its own order in memory"
        assert found == {f"{name}: {step}": [] for name in CASES for step in STEPS}


STEPS = ("blocks of 4", "blocks of 8", "contiguous again")


def change_size(directory: Path) -> tuple[list[str], str, int, str]:
    """Buffers that keep the order of memory: loaded with the size they were saved with, and with another."""
    os.environ[glu.DENSE_VARIABLE] = "1"
    buffers = {"dist_ckpt_optim_fully_reshardable": False}
    first = build({}, (4, None), **buffers)
    fill(first)
    save(first, directory)
    same = build({}, (4, None), **buffers)
    load(same, directory)
    equal = [name for name, value in digests(first).items() if digests(same)[name] != value]
    other = build({}, (None, None), **buffers)
    try:
        load(other, directory)
        message = "loaded"
    except CheckpointMismatchError as error:
        message = str(error)
    model_only = build({}, (None, None), **buffers, load_optim=False)
    load(model_only, directory)
    wrong = build({}, (24, None), **buffers)
    try:
        save(wrong, directory / "never")
        refusal = "saved"
    except CheckpointMismatchError as error:
        refusal = str(error)
    expected = [glu.deinterleave_tensor(tensor, 4) for tensor in gated(unwrap_model(first.model)[0])]
    found = gated(unwrap_model(model_only.model)[0])
    return equal, message, sum(map(torch.equal, found, expected)), refusal


def test_optimizer_buffers_in_another_order_are_refused_and_the_model_alone_loads(tmp_path: Path) -> None:
    (result,) = run_ranks(change_size, 1, tmp_path)
    equal, message, layers, refusal = result
    assert equal == []
    assert message == (
        "the checkpoint's optimizer state is dp_reshardable, which keeps the order of memory: it was saved with "
        "moe_mlp_glu_interleave_size 4 and moe_shared_expert_glu_interleave_size None, and this run has None and None; "
        "keep the sizes, save with checkpoint.dist_ckpt_optim_fully_reshardable: true, or set "
        "checkpoint.load_optim: false"
    )
    assert layers == 4
    assert refusal.startswith(
        "decoder.layers.0.mlp.linear_fc1.weight: a gated linear_fc1 of shape [128, 64] cannot be interleaved in "
        "blocks of 24: "
    )
    assert not (tmp_path / "never" / "iter_0000000").exists()
