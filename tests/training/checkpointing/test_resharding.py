"""Saved under one layout, loaded under another: a selection of the documented matrix, and all of it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.utils import unwrap_model

from bridge.training.checkpointing import load_checkpoint
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.config import load_config
from bridge.training.setup import setup
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.consolidated import consolidate
from tests.training.resharding import (
    BEGIN,
    DENSE,
    DOCUMENT,
    END,
    FORMS_TITLE,
    MODELS,
    MOE,
    SAVED_AT,
    TABLES,
    Cell,
    Saved,
    answer,
    config,
    documented,
    form_cells,
    form_names,
    generate,
    run_matrix,
    save_all,
)
from tests.training.tiny import digests, run_to_end, tiny_config

SELECTION = {
    "`fully_reshardable`, tied embeddings, bf16": [
        ("TP2 PP2", "one rank"),
        ("TP2 PP2", "CP2"),
        ("TP2 PP2", "PP2 VPP2"),
        ("TP2 PP2", "DP2"),
        ("CP2", "TP2 PP2"),
    ],
    "`fully_reshardable`, memory-efficient, tied embeddings, fp32": [("TP2 PP2", "DP2")],
    "`fully_reshardable`, experts, bf16": [("PP2 EP2", "one rank"), ("one rank", "EP2")],
    "`dp_reshardable`, tied embeddings, bf16": [("DP2", "DP4"), ("DP2", "one rank"), ("DP2", "TP2")],
    "`dp_reshardable`, experts, fp32": [("EP2", "EP4")],
    "Not distributed, untied embeddings, bf16": [("TP2", "PP2")],
    "Not distributed, experts, fp32": [("EP2", "one rank")],
}
SELECTED_FORMS = [
    ("plain, fp32", "distributed, fp32"),
    ("plain, bf16", "distributed, fp32"),
    ("fully_reshardable, bf16", "plain, bf16"),
    ("fully_reshardable, fp32", "plain, bf16"),
    ("dp_reshardable, bf16", "plain, bf16"),
]


def test_a_selection_of_the_matrix_is_as_documented(tmp_path: Path) -> None:
    tables = {table.title: table for table in TABLES}
    cells, expected = [], []
    for title, pairs in SELECTION.items():
        names = [layout.name for layout in tables[title].layouts]
        for saved, loaded in pairs:
            cells.append(tables[title].cells()[names.index(saved) * len(names) + names.index(loaded)])
            expected.append((title, saved, loaded))
    by_name = dict(zip(form_names(), form_cells(), strict=True))
    for saved, loaded in SELECTED_FORMS:
        cells.append(by_name[saved, loaded])
        expected.append((FORMS_TITLE, saved, loaded))
    # Both at once: other parts because of the experts, and another kind of optimizer.
    ep2, dp2 = MOE[2], MOE[1]
    cells.append(Cell(Saved(MODELS["MoE bf16"], ep2, "plain"), dp2, "fully_reshardable"))
    cells.append(Cell(Saved(MODELS["MoE bf16"], dp2, "fully_reshardable"), ep2, "plain"))
    # Gated layers are saved as two tensors made of one.
    tp2, vpp = DENSE[1], DENSE[3]
    cells.append(Cell(Saved(MODELS["swiglu bf16"], tp2, "fully_reshardable"), vpp, "plain"))
    cells.append(Cell(Saved(MODELS["swiglu bf16"], vpp, "plain"), tp2, "dp_reshardable"))
    found = [answer(refusal) for refusal in run_matrix(cells, tmp_path)]
    table = documented()
    assert dict(zip(expected, found, strict=False)) == {key: table[key] for key in expected}
    assert found[len(expected) :] == ["yes"] * 4


@pytest.mark.slow
def test_the_whole_matrix_is_as_documented(tmp_path: Path) -> None:
    assert generate(tmp_path).strip() == DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()


def test_the_matrix_has_every_cell_and_only_buffers_are_refused() -> None:
    table = documented()
    expected = {
        (each.title, saved.name, loaded.name) for each in TABLES for saved in each.layouts for loaded in each.layouts
    }
    assert set(table) == expected | {(FORMS_TITLE, *names) for names in form_names()}
    refused = {key for key, text in table.items() if text != "yes"}
    assert {table[key] for key in refused} == {"no"}
    assert {title for title, _, _ in refused} == {
        "`dp_reshardable`, tied embeddings, bf16",
        "`dp_reshardable`, experts, fp32",
        FORMS_TITLE,
    }


COMMANDS = [
    shlex.split(block.replace("\\\n", " "))
    for block in re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
]
"""The commands of the documented workflow."""


def documented_runs(recipe: Path, ending: list[list[str]]) -> list[dict[str, Any]]:
    """Run each list of overrides on this rank, one after the other."""
    init_ranks()
    return [run_to_end(load_config(recipe, overrides=overrides)) for overrides in ending]


def test_the_documented_workflow_changes_model_parallelism(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
                "train": {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 40},
                "dataset": {"mock": True},
                "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 127},
            }
        )
    )
    overrides = [
        [word.replace("runs/reshard", str(tmp_path / "save")) for word in command if re.match(r"[a-z_]+\.\w+=", word)]
        for command in COMMANDS
    ]
    assert len(overrides) == 4
    runs = run_ranks(documented_runs, 2, recipe, overrides, timeout=300)[0]
    assert [run["started at"] for run in runs] == [0, 20, 21, 22]
    assert [run["iteration"] for run in runs] == [20, 21, 22, 40]
    kinds = []
    for iteration in (20, 21, 22, 40):
        common = torch.load(tmp_path / "save" / f"iter_{iteration:07d}" / "common.pt", weights_only=True)
        kinds.append(common["content_metadata"]["distrib_optim_sharding_type"])
    assert kinds == ["dp_reshardable", "fully_reshardable", "fully_reshardable", "dp_reshardable"]


def refused(cfg: Any) -> tuple[str, dict[str, str], dict[str, str]]:
    """The error of loading, and everything of the run before and after it."""
    load, cfg.checkpoint.load = cfg.checkpoint.load, None
    run = setup(cfg)
    before = digests(run)
    cfg.checkpoint.load = load
    with pytest.raises(CheckpointMismatchError) as caught:
        load_checkpoint(run.state, run.model, run.optimizer, run.scheduler)
    return str(caught.value), before, digests(run)


def test_a_refusal_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    saved = Saved(MODELS["untied fp32"], DENSE[1], "dp_reshardable")
    run_ranks(save_all, 2, [saved], tmp_path)
    cfg = config(saved.model, DENSE[2], "dp_reshardable", tmp_path / "x", load=str(saved.directory(tmp_path)))
    (message, before, after), _ = run_ranks(refused, 2, cfg)
    assert "the tensor size was 2 and is 1, the pipeline size was 1 and is 2" in message
    assert before == after


def test_other_buckets_are_refused_with_the_settings_that_divide_them(tmp_path: Path) -> None:
    saved = tiny_config(
        train_iters=2,
        ddp={"overlap_grad_reduce": True, "bucket_size": 5000},
        checkpoint={"save": str(tmp_path)},
    )
    run_ranks(run_to_end, 2, saved)
    cfg = tiny_config(train_iters=2, checkpoint={"load": str(tmp_path)})
    (message, _, _), _ = run_ranks(refused, 2, cfg)
    assert "Global shape mismatch" in message
    assert (
        "; the optimizer's buffers were divided into other buckets: keep ddp.bucket_size, ddp.overlap_grad_reduce and "
        "ddp.grad_reduce_in_fp32 as they were, or save with checkpoint.dist_ckpt_optim_fully_reshardable: true"
    ) in message


STOCK = """
import hashlib, json, os, sys
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
directory = sys.argv[1]
parallel_state.initialize_model_parallel(1, 1)
config = TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=4, use_cpu_initialization=True,
                           bf16=True, params_dtype=torch.bfloat16)
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=256, max_sequence_length=20,
                 share_embeddings_and_output_weights=True, position_embedding_type="learned_absolute").bfloat16()
content = dist_checkpointing.load_content_metadata(directory)
loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=content)}, directory)
model.load_state_dict(loaded["model"])
def digest(tensor):
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]
tensors = dist_checkpointing.load_plain_tensors(directory)
json.dump({"parameters": {name: digest(value) for name, value in model.named_parameters()},
           "tensors": {name: digest(value) for name, value in tensors.items() if torch.is_tensor(value)}}, sys.stdout)
assert not any(name == "bridge" or name.startswith("bridge.") for name in sys.modules)
"""
"""TP2 x PP2 at TP1 x PP1, with nothing of bridge: the model through its own state dict, the rest as plain tensors."""


def loaded_parameters(cfg: Any) -> tuple[dict[str, str], dict[str, str]]:
    """What one rank holds after loading: digests of its parameters, and of the whole tensors by kind and key."""
    run = setup(cfg)
    assert run.state.train_state.step == SAVED_AT
    whole = consolidate(run)
    assert whole is not None
    (model,) = unwrap_model(run.model)
    parameters = {
        name: hashlib.sha256(value.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, value in model.named_parameters()
    }
    return parameters, whole


def test_stock_megatron_core_loads_under_other_sizes_what_we_load(tmp_path: Path) -> None:
    saved = Saved(MODELS["tied bf16"], next(layout for layout in DENSE if layout.name == "TP2 PP2"), "memory-efficient")
    run_ranks(save_all, 4, [saved], tmp_path)
    directory = saved.directory(tmp_path)
    cfg = config(saved.model, DENSE[0], "dp_reshardable", tmp_path / "x", load=str(directory))
    ((parameters, whole),) = run_ranks(loaded_parameters, 1, cfg)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK, str(directory / f"iter_{SAVED_AT:07d}")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    stock = json.loads(done.stdout)
    assert stock["parameters"] == parameters
    kinds = {"model": "", "main": "optimizer.state.param.", "exp_avg": "optimizer.state.exp_avg."}
    compared = 0
    for name, digest in whole.items():
        kind, _, key = name.partition(" ")
        if kind in kinds:
            assert stock["tensors"][kinds[kind] + key] == digest, name
            compared += 1
    assert compared > 30
