"""Runs under torch FSDP2: they train like DDP, resume bit for bit, and share their checkpoints with every other run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bridge.training.checkpointing.contents.torch_fsdp2 import model_section
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.config import LoRAConfig
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training import tiny
from tests.training.checkpointing.tiers import test_tier_resume as tiers
from tests.training.checkpointing.tiers.keepers import end_all_keepers_below
from tests.training.torch_fsdp2 import MOE, UNEVEN, fsdp2_config, run_to_end

BF16 = {"grad_reduce_in_fp32": False}
STATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uneven": (UNEVEN, {}),
    "experts": (MOE, {}),
    "bf16": (UNEVEN | {"precision": "bf16"}, BF16),
}
"""Settings of `model` and `ddp`."""

Found = dict[str, Any]


def config(name: str, **settings: Any) -> Any:
    model, ddp = STATES[name]
    return fsdp2_config(model=model | settings.pop("model", {}), ddp=ddp | settings.pop("ddp", {}), **settings)


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """What is not equal to the last bit, or there on one side only."""
    common = found.keys() & expected.keys()
    return [
        *sorted(found.keys() ^ expected.keys()),
        *(key for key in sorted(common) if not torch.equal(found[key], expected[key])),
    ]


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[key].double() - expected[key].double()).abs().max()) for key in expected)


def train_save_and_resume(root: Path) -> Found:
    """The same run under DDP, whole, and in two parts."""
    found: Found = {}
    for name in STATES:
        path = str(root / name)
        plain = run_to_end(config(name, sharded=False))
        whole = run_to_end(config(name))
        first = run_to_end(config(name, train_iters=2, save=path))
        resumed = run_to_end(config(name, load=path))
        found[name] = {
            "losses": max(abs(one - other) for one, other in zip(whole["losses"], plain["losses"], strict=True)),
            "state": largest(whole["whole"], plain["whole"]),
            "resumed": (resumed["started at"], whole["digests"] == resumed["digests"]),
            "saved": first["whole"],
        }
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Found]]:
    """Checkpoints of 2 ranks, and what each found."""
    root = tmp_path_factory.mktemp("trained")
    return root, run_ranks(train_save_and_resume, 2, root, timeout=240)


def test_it_trains_like_ddp_and_resumes_bit_for_bit(trained: tuple[Path, list[Found]]) -> None:
    for rank in trained[1]:
        assert [rank[name]["resumed"] for name in STATES] == [(2, True)] * len(STATES)
        assert max(rank[name]["losses"] for name in ("uneven", "experts")) < 1e-5
        assert max(rank[name]["state"] for name in ("uneven", "experts")) < 1e-5
        assert rank["bf16"]["losses"] < 1e-2


def load_elsewhere(root: Path, saved: Found) -> Found:
    """Load under another number of ranks, sharded and not: what is different then."""
    found = {}
    for name in STATES:
        for sharded in (True, False):
            other = run_to_end(config(name, train_iters=3, sharded=sharded, load=str(root / name)))
            found[f"{name}, {sharded}"] = other["started at"], differences(other["begun with"], saved[name])
    return found


UNCHANGED = {f"{name}, {sharded}": (2, []) for name in STATES for sharded in (True, False)}


def test_a_checkpoint_loads_under_more_ranks_and_under_ddp(trained: tuple[Path, list[Found]]) -> None:
    root, found = trained
    saved = {name: found[0][name]["saved"] for name in STATES}
    assert run_ranks(load_elsewhere, 4, root, saved, timeout=240) == [UNCHANGED] * 4


def train_and_save(root: Path) -> Found:
    return {name: run_to_end(config(name, train_iters=2, save=str(root / name)))["whole"] for name in STATES}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (4, 1)])
def test_a_checkpoint_loads_under_any_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    saved = run_ranks(train_and_save, before, tmp_path)
    for rank in saved:
        assert [differences(rank[name], saved[0][name]) for name in STATES] == [[]] * len(STATES)
    assert run_ranks(load_elsewhere, after, tmp_path, saved[0]) == [UNCHANGED] * after


def save_in_other_ways(root: Path) -> Found:
    """Under 2 ranks: snapshots, other readers, other optimizers, adapters, gradients that are not numbers."""
    found: Found = {}
    background: dict[str, Any] = {"async_save": True, "ckpt_assume_constant_structure": True, "save_interval": 1}
    path = str(root / "background")
    run = setup(config("uneven", save=path, **background))
    seen: dict[int, dict[str, str]] = {}
    tiers.keep_digests(run, seen)
    train(run)
    for how, reading in {
        "direct": {},
        "stock": {"io_backend": "stock"},
        "shared": {"fully_parallel_load": True},
    }.items():
        for step in (1, 3):
            loaded = tiny.digests(setup(config("uneven", load=path, ckpt_step=step, **reading)))
            found[f"{how}, {step}"] = [key for key in seen[step] if seen[step][key] != loaded.get(key)]

    plain = run_to_end(config("uneven", sharded=False, train_iters=2, save=str(root / "plain")))
    distributed: dict[str, Any] = {"ddp": {"use_distributed_optimizer": True}, "sharded": False}
    whole = {"dist_ckpt_optim_fully_reshardable": True}
    run_to_end_only(
        config(
            "uneven", train_iters=3, load=str(root / "plain"), save=str(root / "distributed"), **distributed, **whole
        )
    )
    found["from DDP"] = differences(
        run_to_end(config("uneven", load=str(root / "plain")))["begun with"], plain["whole"]
    )
    sharded = run_to_end(config("uneven", load=str(root / "distributed")))
    unsharded = run_to_end(config("uneven", load=str(root / "distributed"), sharded=False))
    found["from a distributed optimizer"] = differences(sharded["begun with"], unsharded["begun with"])
    run_to_end_only(config("uneven", train_iters=4, load=str(root / "background"), ckpt_step=3, **distributed))

    main = {"load_optim": False, "load_main_params_from_ckpt": True}
    loaded = {kind: run_to_end(config("bf16", load=path, sharded=kind, **main)) for kind in (True, False)}
    found["main parameters"] = largest(loaded[True]["begun with"], loaded[False]["begun with"])

    found["adapters"] = adapters(root)
    run = setup(config("uneven"))
    with torch.no_grad():
        if torch.distributed.get_rank() == 1:
            next(iter(run.model[0].parameters())).to_local().fill_(float("nan"))
    with pytest.raises(RuntimeError, match="found a gradient that is NaN or infinite"):
        train(run)
    (chunk,) = run.model
    for parameter in chunk.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)  # its square is no number of 32 bits
    chunk.finish_grad_sync()
    return found


def run_to_end_only(cfg: Any) -> None:
    train(setup(cfg))


def adapters(root: Path) -> tuple[int, bool]:
    def lora(**settings: Any) -> Any:
        cfg = config("uneven", pretrained_checkpoint=str(root / "plain"), **settings)
        cfg.peft = LoRAConfig(dim=3, dropout=0.1)
        return cfg

    whole = run_to_end(lora())
    run_to_end(lora(train_iters=2, save=str(root / "adapters")))
    resumed = run_to_end(lora(load=str(root / "adapters")))
    return resumed["started at"], whole["digests"] == resumed["digests"]


@pytest.mark.slow
def test_other_ways_to_save_and_load(tmp_path: Path) -> None:
    expected = {f"{how}, {step}": [] for how in ("direct", "stock", "shared") for step in (1, 3)}
    expected |= {"from DDP": [], "from a distributed optimizer": [], "main parameters": 0.0, "adapters": (2, True)}
    assert run_ranks(save_in_other_ways, 2, tmp_path, timeout=240) == [expected] * 2


def train_with_tensor_parallelism(root: Path) -> Found:
    model = UNEVEN | {"hidden_size": 30, "num_attention_heads": 2, "ffn_hidden_size": 34}
    path, split = str(root), model | {"tensor_model_parallel_size": 2}
    whole = run_to_end(fsdp2_config(model=split))
    plain = run_to_end(fsdp2_config(model=split, sharded=False))
    run_to_end(fsdp2_config(model=split, train_iters=2, save=path))
    resumed = run_to_end(fsdp2_config(model=split, load=path))
    sharded = run_to_end(fsdp2_config(model=model, train_iters=3, load=path))
    unsharded = run_to_end(fsdp2_config(model=model, train_iters=3, load=path, sharded=False))
    return {
        "like DDP": largest(whole["whole"], plain["whole"]) < 1e-5,
        "resumed": (resumed["started at"], whole["digests"] == resumed["digests"]),
        "without tensor parallelism": differences(sharded["begun with"], unsharded["begun with"]),
    }


def test_it_goes_together_with_tensor_parallelism(tmp_path: Path) -> None:
    expected = {"like DDP": True, "resumed": (2, True), "without tensor parallelism": []}
    assert run_ranks(train_with_tensor_parallelism, 4, tmp_path, timeout=240) == [expected] * 4


def crash_and_go_on(root: Path) -> Found:
    """From a local checkpoint and from memory: which kind was loaded, and what is different from what was saved."""
    found: Found = {}
    for kind in ("local", "in_memory"):

        def of_kind(kind: str = kind) -> Any:
            cfg = tiers.config(root / kind, kind, model=UNEVEN)
            cfg.dist.use_torch_fsdp2, cfg.ddp.use_distributed_optimizer = True, False
            cfg.scheduler.lr_decay_iters = 8
            return cfg

        seen = tiers.run_and_lose(of_kind(), 2)[2]
        run = setup(of_kind())
        loaded = tiny.digests(run)
        found[kind] = run.state.loaded_kind, [key for key in seen if seen[key] != loaded.get(key)]
    return found


@pytest.mark.slow
def test_it_goes_on_from_local_disks_and_from_memory(tmp_path: Path) -> None:
    for kind in ("local", "in_memory"):
        (tmp_path / kind).mkdir()
    try:
        found = run_ranks(crash_and_go_on, 2, tmp_path)
    finally:
        end_all_keepers_below(tmp_path)
    assert found == [{"local": ("local", []), "in_memory": ("in_memory", [])}] * 2


class Odd(torch.nn.Module):
    """A model of one parameter that is saved in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))

    def sharded_state_dict(self) -> dict[str, Any]:
        def turned(key: str, data: torch.Tensor, replica_id: Any, flattened_range: Any) -> Any:
            return ShardedTensor.from_rank_offsets(key, data.t().contiguous(), replica_id=replica_id)

        if self.form == "turned":
            entry = ShardedTensorFactory("weight", self.weight, turned, torch.t, (0, 0, 0))
        elif self.form == "flat":
            entry = ShardedTensor.from_rank_offsets("weight", self.weight.detach().view(-1), replica_id=(0, 0, 0))
        else:
            entry = ShardedTensor.from_rank_offsets("weight", self.weight, replica_id=0)
        return {"weight": entry}


def describe_odd_models() -> Found:
    init_ranks()
    found = {}
    for form in ("turned", "flat", "without a place"):
        model = Odd(form)
        values = model.weight.detach().clone()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(CheckpointSaveError) as refused:
            entry = model_section(model, {})["weight"]
            entry.build()
        found[form] = str(refused.value)
        assert torch.equal(model.weight.to_local(), values)
    return found


def test_parts_that_cannot_be_described_are_refused_and_the_model_is_as_before() -> None:
    assert run_ranks(describe_odd_models, 1) == [
        {
            "turned": "weight is saved in another form than its own, which FSDP2 has divided by rows",
            "flat": "weight is made of a parameter that FSDP2 has divided, in an unknown way",
            "without a place": "weight has the replica id 0, which does not end with the rank among those that share "
            "it",
        }
    ]
