"""Stock megatron-core and stock torch DCP read our checkpoints in processes that never import bridge."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.utils import unwrap_model

from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import tiny_config

STOCK_MCORE = """
import os, sys
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from megatron.core import dist_checkpointing
directory, out = sys.argv[1:]
tensors = dist_checkpointing.load_plain_tensors(directory)
common = dist_checkpointing.load_common_state_dict(directory)
content = dist_checkpointing.load_content_metadata(directory)
torch.save({"tensors": {k: v for k, v in tensors.items() if torch.is_tensor(v)},
            "common": {k: common[k] for k in ("checkpoint_version", "iteration", "opt_param_scheduler")},
            "content": content}, out)
assert not any(name == "bridge" or name.startswith("bridge.") for name in sys.modules)
"""

STOCK_DCP = """
import sys
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
directory, out = sys.argv[1:]
tensors = {}
_load_state_dict(tensors, FileSystemReader(directory), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
torch.save({k: v for k, v in tensors.items() if torch.is_tensor(v)}, out)
assert not any(name == "bridge" or name.startswith("bridge.") for name in sys.modules)
"""


def train_and_keep(cfg) -> dict[str, torch.Tensor]:
    """Train; return this rank's parameters by name, as numpy so that they can be pickled."""
    run = setup(cfg)
    train(run)
    (model,) = unwrap_model(run.model)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def run_stock(script: str, directory: Path, out: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(directory), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


SAVED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""megatron-core saves the local layer spec's norms under the names of the fused layers."""


def assert_parameters_equal(stock: dict[str, torch.Tensor], parameters: dict[str, object]) -> None:
    for name, expected in parameters.items():
        key, layer = name, None
        if name.startswith("decoder.layers."):  # the layers of a homogeneous model are saved as one stack
            _, _, layer, key = name.split(".", 3)
            for own, saved in SAVED_NAMES.items():
                key = key.replace(own, saved)
            key = f"decoder.layers.{key}"
        found = stock[key] if layer is None else stock[key][int(layer)]
        assert torch.equal(found, torch.from_numpy(expected)), name
    assert len(parameters) > 10


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_stock_programs_read_what_we_write(tmp_path: Path, mode: str) -> None:
    save = tmp_path / "save"
    cfg = tiny_config(train_iters=3, checkpoint={"save": str(save), "async_save": mode == "async"})
    parameters, _ = run_ranks(train_and_keep, 2, cfg)
    checkpoint = save / "iter_0000003"

    by_mcore = run_stock(STOCK_MCORE, checkpoint, tmp_path / "mcore.pt")
    assert_parameters_equal(by_mcore["tensors"], parameters)
    assert by_mcore["common"]["checkpoint_version"] == 3.0
    assert by_mcore["common"]["iteration"] == 3
    assert by_mcore["common"]["opt_param_scheduler"]["num_steps"] == 3 * 8
    assert by_mcore["content"] == {
        "distrib_optim_sharding_type": "dp_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "vocabulary_size": 256,
    }

    by_dcp = run_stock(STOCK_DCP, checkpoint, tmp_path / "dcp.pt")
    assert_parameters_equal(by_dcp, parameters)
    assert set(by_mcore["tensors"]) <= set(by_dcp)
