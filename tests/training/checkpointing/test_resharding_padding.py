"""megatron-core's fully reshardable state is wrong where buckets are padded; what is saved here is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from bridge.training.checkpointing.contents.bucket_padding import is_padded_between_buckets, padding_between_buckets
from bridge.training.checkpointing.contents.optimizer import generate_optimizer_state_dict
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.tiny import tiny_config

PP2 = {"pipeline_model_parallel_size": 2}
BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 5000}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "the model of the matrix": (
        {
            **PP2,
            "num_layers": 4,
            "hidden_size": 16,
            "seq_length": 20,
            "position_embedding_type": "learned_absolute",
        },
        {},
        True,
    ),
    "tied, hidden size 64": ({**PP2, "hidden_size": 64}, {}, True),
    "tied, hidden size 128": ({**PP2, "hidden_size": 128}, {}, False),
    "untied, hidden size 64": ({**PP2, "hidden_size": 64, "share_embeddings_and_output_weights": False}, {}, False),
    "no pipeline, hidden size 64": ({"hidden_size": 64}, {}, False),
    "small buckets, hidden size 64": ({"hidden_size": 64}, BUCKETS, True),
}
"""Model and DDP settings on two ranks, and whether megatron-core gets it wrong."""


def wrong_tensors(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[bool, set[str], set[str]]]:
    """For each case: is a buffer padded between buckets, and what would stock megatron-core and we save wrong?"""
    init_ranks()
    found = []
    for model, ddp in cases:
        run = setup(tiny_config(train_iters=2, model={"num_layers": 2, **model}, ddp=ddp))
        train(run)
        (chunk,) = run.model
        (part,) = run.optimizer.chained_optimizers
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": run.pg_collection.dp_cp,
        }

        sections = {"model": chunk.module.sharded_state_dict(metadata=metadata)}
        stock = run.optimizer.sharded_state_dict(sections["model"], metadata=metadata)
        ours = generate_optimizer_state_dict(
            run.optimizer, None, sections, is_loading=False, optim_sd_kwargs={"metadata": metadata}
        )["optimizer"]
        padded = any(map(is_padded_between_buckets, part.buffers))
        found.append((padded, _wrong(part, stock["param_state"]), _wrong(part, ours["param_state"])))
    return found


def _wrong(part: Any, param_state: dict[int, Any]) -> set[str]:
    """Names of what differs from the state that the optimizer holds on this rank."""
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    wrong = set()
    for index, parameter in enumerate(parameters):
        if parameter not in part.model_param_gbuf_map:
            continue
        held = part._get_model_param_range_map(parameter)["param"]
        for kind, expected in part._get_main_param_and_optimizer_states(parameter).items():
            sharded = param_state[index][kind]
            assert not isinstance(sharded, ShardedTensorFactory)
            if not torch.equal(sharded.data.flatten()[held.start : held.end], expected.detach()):
                wrong.add(f"{kind} {sharded.key}")
    return wrong


def test_saved_state_is_right_exactly_where_megatron_core_is_wrong_too() -> None:
    ranks = run_ranks(wrong_tensors, 2, [(model, ddp) for model, ddp, _ in CASES.values()])
    for number, (name, (_, _, stock_is_wrong)) in enumerate(CASES.items()):
        padded = [rank[number][0] for rank in ranks]
        stock = [rank[number][1] for rank in ranks]
        assert any(padded) is stock_is_wrong, name
        assert [bool(wrong) for wrong in stock] == padded, name  # the condition is exact
        assert [rank[number][2] for rank in ranks] == [set(), set()], name
    by_rank = [rank[1][1] for rank in ranks]
    assert any("exp_avg optimizer.state.exp_avg.embedding.word_embeddings.weight" in wrong for wrong in by_rank)


def test_a_gathered_buffer_of_unknown_order_is_not_saved() -> None:
    buckets = [SimpleNamespace(grad_data=torch.zeros(128), numel_unpadded=64, offset=0)] * 2
    buffer = SimpleNamespace(buckets=buckets, numel=256, numel_unpadded=128)
    gathered = {0: {"fp32": {name: torch.zeros(100) for name in ("param", "exp_avg", "exp_avg_sq")}}}
    optimizer = SimpleNamespace(buffers=[buffer], get_parameter_state_dp_zero=lambda: gathered)
    with pytest.raises(CheckpointSaveError) as caught, padding_between_buckets([optimizer]):
        optimizer.get_parameter_state_dp_zero()
    assert str(caught.value) == (
        "megatron-core gathered 100 elements of a buffer that has 128 without padding; which belong to which parameter "
        "is not known, so the optimizer state is not written. Set checkpoint.dist_ckpt_optim_fully_reshardable: false, "
        "or avoid several buckets in a buffer with model.share_embeddings_and_output_weights: false and "
        "ddp.overlap_grad_reduce: false"
    )
