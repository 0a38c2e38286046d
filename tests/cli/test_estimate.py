"""estimate: the bytes of the tensors to the last one, against saves of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.catalog import estimate, read_contents
from bridge.training.checkpointing.catalog.estimating import most_kept, saves_of
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.config import ConfigContainer
from bridge.training.gpt import padded_vocab_size
from tests.cli.commands import run, run_all, write_recipe
from tests.distributed.launch import run_ranks
from tests.training.tiny import LAYOUTS, run_to_end, tiny_config

TOLERANCE = 0.15
"""Of what lies beside the values, as a share of a checkpoint of half a MiB."""

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "flat buffers, TP2": ("TP2", {}),
    "flat buffers, PP2, tied embeddings": ("PP2", {"model": {"make_vocab_size_divisible_by": 7}}),
    "fully reshardable, swiglu, grouped queries, untied": (
        "TP2",
        {
            "model": {
                "activation": "swiglu",
                "num_query_groups": 2,
                "normalization": "RMSNorm",
                "share_embeddings_and_output_weights": False,
                "add_bias_linear": False,
            },
            "checkpoint": {"dist_ckpt_optim_fully_reshardable": True},
        },
    ),
    "experts": ("EP2", {}),
    "no distributed optimizer, bf16, positions": (
        "one rank",
        {
            "model": {"precision": "bf16", "position_embedding_type": "learned_absolute"},
            "ddp": {"use_distributed_optimizer": False},
        },
    ),
    "flat buffers, sizes that are padded": (
        "one rank",
        {"model": {"hidden_size": 40, "ffn_hidden_size": 50, "num_attention_heads": 4, "kv_channels": 10}},
    ),
    "model alone": ("one rank", {"checkpoint": {"save_optim": False, "save_rng": False}}),
}


def config(name: str, save_dir: Path) -> tuple[int, ConfigContainer]:
    layout, settings = RUNS[name]
    size, model = LAYOUTS[layout]
    sections = {key: dict(values) for key, values in settings.items()}
    sections["model"] = {**model, **sections.get("model", {})}
    sections["checkpoint"] = {"save": str(save_dir), "save_interval": 2, **sections.get("checkpoint", {})}
    return size, tiny_config(train_iters=2, **sections)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_what_a_run_saves(name: str, tmp_path: Path) -> None:
    size, cfg = config(name, tmp_path / "run")
    run_ranks(run_to_end, size, cfg)
    path = tmp_path / "run" / "iter_0000002"
    found = estimate(cfg, size, padded_vocab_size(cfg.model, 255))
    contents, manifest = read_contents(path), read_manifest(path)
    assert manifest is not None
    by_part = {part: size for part, (_, _, size) in contents.parts().items()}
    objects = {each.part: 0 for each in contents.objects}
    for each in contents.objects:
        objects[each.part] += each.total_bytes
    assert found.model_bytes == by_part["model"] - objects.get("model", 0)
    assert found.optimizer_bytes == by_part.get("optimizer", 0) - objects.get("optimizer", 0)
    beside = [each for each in manifest.files if not each.name.startswith("tokenizer/")]
    total = sum(each.size for each in beside)
    assert found.total_bytes == pytest.approx(total, rel=TOLERANCE)
    assert found.files == len(beside) + 1
    assert found.payload_files == sum(each.name.endswith(".distcp") for each in beside)


def test_the_command_needs_neither_ranks_nor_the_tokenizer(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {num_layers: 32, hidden_size: 4096, num_attention_heads: 32, tensor_model_parallel_size: 8,"
        " pipeline_model_parallel_size: 2, precision: bf16}\n"
        "train: {train_iters: 1000, micro_batch_size: 1, global_batch_size: 64}\n"
        "dataset: {mock: true}\n"
        "tokenizer: {tokenizer_type: NullTokenizer, vocab_size: 31999}\n"
        "checkpoint: {save: runs/x, save_interval: 100, most_recent_k: 2}\n"
    )
    found, text, wrong, missing = run_all(
        ["estimate", "--recipe", recipe, "--world-size", 64, "--gib-per-second", 10, "--json"],
        ["estimate", "--recipe", recipe],
        ["estimate", "--recipe", recipe, "--world-size", 24],
        ["estimate", "--recipe", tmp_path / "missing.yaml"],
    )
    assert found.status == 0
    values = found.json
    assert (values["data_parallel_size"], values["payload_files"]) == (4, 64)
    assert values["model_bytes"] == 2 * values["parameters"]
    assert (values["saves"], values["most_kept"]) == (10, 3)
    assert values["seconds"] == pytest.approx(values["total_bytes"] / 10 / 2**30)
    assert "on 16 ranks, 1 of them data parallel" in text.out
    assert (wrong.status, missing.status) == (1, 1)
    assert wrong.err.startswith("error: ")
    assert str(tmp_path / "missing.yaml") in missing.err


def test_a_tokenizer_that_is_not_there_can_be_replaced_by_its_size(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    tokenizer = ["--set", "tokenizer.tokenizer_type=HuggingFaceTokenizer"]
    tokenizer += ["--set", f"tokenizer.tokenizer_model={tmp_path}/nowhere", "--set", "tokenizer.vocab_size=null"]
    without, given, same = run_all(
        ["estimate", "--recipe", recipe, *tokenizer],
        ["estimate", "--recipe", recipe, *tokenizer, "--vocab-size", 255, "--json"],
        ["estimate", "--recipe", recipe, "--json"],
    )
    assert (without.status, without.out) == (1, "")
    assert without.err.startswith("error: the recipe's tokenizer cannot be loaded: ")
    assert without.err.endswith("; give --vocab-size, or set model.vocab_size\n")
    assert given.json == same.json


def test_what_is_kept_at_the_same_time() -> None:
    def kept(**settings: Any) -> int | None:
        cfg = tiny_config(train_iters=100, checkpoint={"save_interval": 10, **settings})
        return most_kept(cfg, saves_of(cfg))

    assert kept() == 10
    assert kept(most_recent_k=3) == 4
    assert kept(most_recent_k=1, save_retain_interval=50) == 3
    assert kept(retain_every_hours=1.0) is None
    assert saves_of(tiny_config(train_iters=25, checkpoint={"save_interval": 10})) == [10, 20, 25]
    assert saves_of(tiny_config(train_iters=25, checkpoint={"save_interval": 0})) == []


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", "optimizer: {optimizer: sgd}\nddp: {use_distributed_optimizer: false}\n"
    )
    found = run("estimate", "--recipe", recipe)
    assert (found.status, found.out) == (1, "")
    assert found.err.startswith(
        "error: the checkpoint cannot be counted from the recipe: optimizer.optimizer is sgd. Save once, and see "
    )
