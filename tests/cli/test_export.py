"""Exported files hold what the checkpoint holds, under either names, and nothing half is ever left in their place."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bridge.cli.application import parse
from bridge.cli.tensors import bytes_of
from bridge.training.checkpointing.additions import add_file
from bridge.training.checkpointing.conversion.plan import Piece, PlanError, Tensor
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    DirectoryInUseError,
    NotACheckpointError,
)
from bridge.training.checkpointing.export import exporting
from bridge.training.checkpointing.export.exporting import Exported, Options
from bridge.training.checkpointing.export.hugging_face import FAMILIES, layout_for
from bridge.training.checkpointing.export.plan import Target, files_of, pieces_of, whole
from bridge.training.checkpointing.export.publishing import published
from tests.cli.commands import copied, flip, run, run_all
from tests.cli.exported import elsewhere, of_model, tensors_in
from tests.cli.transformer import logits_of
from tests.distributed.launch import init_ranks, run_ranks
from tests.faults.killing import run_until
from tests.training import fsdp
from tests.training.checkpointing.formats import zarr_states as states
from tests.training.tiny import run_to_end, tiny_config

MIB = 1 << 20
LLAMA = {
    "activation": "swiglu",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "rotary_base": 5000,
    "share_embeddings_and_output_weights": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "starcoder2": {"layernorm_epsilon": 1e-3, "num_query_groups": 2},
    "llama with biases": {**LLAMA, "add_bias_linear": True, "kv_channels": 8},
    "stablelm": {**LLAMA, "normalization": "LayerNorm", "rotary_percent": 0.5, "num_query_groups": None},
}
SPREAD = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
EXPERTS = {
    "num_moe_experts": 4,
    "expert_model_parallel_size": 2,
    "activation": "swiglu",
    "add_bias_linear": False,
}


def train(root: Path, models: dict[str, dict[str, Any]]) -> None:
    for name, model in models.items():
        # Steps that are large for once: biases and norms have to leave what they begin with.
        cfg = tiny_config(
            train_iters=2,
            model={"num_layers": 2, **model},
            optimizer={"lr": 0.05},
            checkpoint={"save": str(root / name), "save_interval": 2},
        )
        run_to_end(cfg)


def logits(root: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tokens, and what Megatron's model makes of them, for each of `MODELS`."""
    from bridge.training.setup import setup

    found = {}
    tokens = torch.randint(0, 255, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(16, 16).triu(1).bool()[None, None]
    for name, model in MODELS.items():
        cfg = tiny_config(model={"num_layers": 2, **model}, checkpoint={"load": str(root / name), "finetune": True})
        (chunk,) = setup(cfg).model
        chunk.eval()
        with torch.no_grad():
            found[name] = tokens, chunk(tokens, torch.arange(16).expand(2, -1), mask)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of models of every kind, some of them spread over four ranks."""
    root = tmp_path_factory.mktemp("models")
    spread = {name: {**MODELS[name], **SPREAD} for name in ("llama", "starcoder2")}
    run_ranks(train, 4, root, {**spread, "experts": EXPERTS})
    run_ranks(train, 1, root, {name: model for name, model in MODELS.items() if name not in spread})
    return root


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks with values of all types, of another program: `torch_dist` and `zarr`."""
    root = tmp_path_factory.mktemp("stored")
    run_ranks(save_states, 2, root)
    return root


def save_states(root: Path) -> None:
    init_ranks()
    n, rank = states.world()
    for name in ("torch_dist", "zarr"):
        states.save(states.shards(n, rank), root / name / "iter_0000003", name)


def save_large(root: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    init_ranks()
    tensors = {"rows": torch.randn(64 << 10, 256), "wide": torch.randn(2, 8 << 20)}
    state: dict[str, Any] = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in tensors.items()}
    states.save({**state, "iteration": 3}, root / "iter_0000003", "torch_dist")


def export(*arguments: Any, **options: Any) -> Exported:
    """Export in another process."""
    exported: Exported = elsewhere(exporting.export, *arguments, **options)
    return exported


def require_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (value.dtype, value.shape) == (second[key].dtype, second[key].shape), key
        assert torch.equal(value.reshape(-1).view(torch.uint8), second[key].reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("name", ["llama", "starcoder2", "experts"])
def test_files_hold_the_models_tensors_bit_for_bit(models: Path, tmp_path: Path, name: str) -> None:
    exported = export(models / name, tmp_path / "out", memory=2 * MIB)
    expected = of_model(models / name / "iter_0000002")
    assert not [key for key in expected if "optimizer" in key]
    require_same(tensors_in(tmp_path / "out"), expected)
    assert (exported.tensors, exported.iterations, exported.verified) == (len(expected), (2,), True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert exported.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert exported.peak_bytes <= 2 * MIB
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "iterations": "[2]"}


def test_every_type_arrives_from_every_format(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    for name in ("torch_dist", "zarr"):
        export(stored / name, tmp_path / name, Options(include=("*",)), memory=4 * MIB)
        found = tensors_in(tmp_path / name)
        values = states.values()
        assert found.keys() == values.keys()
        # The padded tensor is stored larger than it is.
        require_same({**found, "padded": found["padded"][: len(values["padded"])]}, values)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("torch_dist", "zarr")]
    assert contents[0] == contents[1]


def test_tensors_of_megatron_fsdp_keep_their_names(tmp_path: Path) -> None:
    pytest.importorskip("einops")
    run_ranks(fsdp.run_to_end, 2, fsdp.fsdp_config(train_iters=1, save_interval=1, save=str(tmp_path / "run")))
    export(tmp_path / "run", tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    require_same(found, of_model(tmp_path / "run" / "iter_0000001"))
    assert all(key.startswith("model.module.") for key in found)
    with pytest.raises(CheckpointMismatchError, match=r"holds no tensor embedding\.word_embeddings\.weight"):
        export(tmp_path / "run", tmp_path / "hf", Options(hf_layout=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_values_are_converted_as_torch_converts_them(stored: Path, tmp_path: Path, dtype: str) -> None:
    export(stored / "torch_dist", tmp_path / "as_is", Options(include=("*",)))
    export(stored / "torch_dist", tmp_path / "out", Options(dtype=dtype, include=("*",)))
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    expected = {k: v.to(wanted) if v.is_floating_point() else v for k, v in tensors_in(tmp_path / "as_is").items()}
    require_same(tensors_in(tmp_path / "out"), expected)


def test_large_models_are_divided_into_files_with_an_index(models: Path, tmp_path: Path) -> None:
    limit = 70_000
    exported = export(models / "llama", tmp_path / "out", Options(shard_bytes=limit))
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert exported.files.keys() == {*files, "model.safetensors.index.json"}
    expected = of_model(models / "llama" / "iter_0000002")
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in expected.values())}
    assert index["weight_map"] == {key: name for name in files for key in load_file(out / name)}
    require_same(tensors_in(out), expected)
    sizes = {name: [value.nbytes for value in load_file(out / name).values()] for name in files}
    assert all(sum(each) <= limit or len(each) == 1 for each in sizes.values())
    in_order = [[expected[key].nbytes for key in load_file(out / name)] for name in files]
    # Each begins where the one before was full.
    assert all(sum(a) + b[0] > limit for a, b in pairwise(in_order))


def test_transformers_computes_what_megatron_computes(models: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(logits, 1, models)
    for name, (tokens, expected) in found.items():
        out = tmp_path / name
        exported = export(models / name, out, Options(hf_layout=True, shard_bytes=100_000), memory=2 * MIB)
        config = json.loads((out / "config.json").read_text())
        assert exported.model_type == config["model_type"] == name.split()[0]
        assert config["torch_dtype"] == "float32"
        assert sum(value.nbytes for value in tensors_in(out).values()) == exported.value_bytes
        assert exported.value_bytes == sum(v.nbytes for v in of_model(models / name / "iter_0000002").values())
        computed = logits_of(config, tensors_in(out), tokens)
        assert torch.allclose(computed, expected, rtol=0, atol=1e-5), name
        assert expected.abs().max() > 0.1


TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM
directory, tokens, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model.eval()(torch.load(tokens)).logits, out)
"""


@pytest.mark.slow
def test_transformers_itself_loads_it(models: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    (found,) = run_ranks(logits, 1, models)
    for name, (tokens, expected) in found.items():
        export(models / name, tmp_path / name, Options(hf_layout=True))
        torch.save(tokens, tmp_path / "tokens.pt")
        # In a process that bridge has prepared for megatron-core on a CPU, its buffers would stay uninitialized.
        places = [str(tmp_path / each) for each in (name, "tokens.pt", "logits.pt")]
        subprocess.run([sys.executable, "-c", TRANSFORMERS, *places], check=True, timeout=120)
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5), name


def config_with(**model: Any) -> dict[str, Any]:
    cfg = tiny_config(model={**LLAMA, **model})
    return cfg.to_dict()


MISFITS = [
    ({"position_embedding_type": "learned_absolute"}, "model.position_embedding_type is 'learned_absolute'"),
    ({"num_moe_experts": 4}, "model.num_moe_experts is 4, and only dense models fit"),
    ({"activation": "gelu"}, "model.activation is 'gelu' with model.normalization 'RMSNorm'"),
    ({"rotary_percent": 0.5}, "model.rotary_percent is 0.5, and LlamaForCausalLM rotates everything"),
    ({"transformer_overrides": {"qk_layernorm": True}}, "model.transformer_overrides.qk_layernorm is True"),
    ({"normalization": "LayerNorm", "add_bias_linear": True}, "model.add_bias_linear is true, and StableLmForCausalLM"),
    ({"normalization": "LayerNorm", "kv_channels": 8}, "model.kv_channels is 8, and heads of StableLmForCausalLM"),
]


@pytest.mark.parametrize(("model", "message"), MISFITS)
def test_what_transformers_cannot_express_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        layout_for(config_with(**model), {}, "iter_0000002")
    assert "--hf-layout: the model in iter_0000002 has no equivalent in transformers: " in str(caught.value)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; leave out --hf-layout to export it under megatron-core's names")


def test_all_that_does_not_fit_is_named_at_once() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        layout_for(config_with(rotary_percent=0.5, num_moe_experts=2, position_embedding_type="none"), {}, "here")
    assert len(re.findall(r"model\.\w+ is", str(caught.value))) == 3
    assert len(FAMILIES) == 3


def test_adapters_have_to_be_merged_first() -> None:
    adapter = Tensor("decoder.layers.mlp.linear_fc2.adapter.linear_in.weight", (4, 16, 64), "float32", (1, 1, 1))
    with pytest.raises(CheckpointMismatchError, match="in transformers: it holds adapters, which have to be merged"):
        layout_for(config_with(), {adapter.key: adapter}, "here")


def test_a_layout_needs_a_configuration_and_tensors_that_agree() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"has no run_config\.yaml"):
        layout_for(None, {}, "here")
    with pytest.raises(CheckpointMismatchError, match="is not that of a GPT as this version describes it"):
        layout_for({"_target_": "megatron.bridge.training.config.ConfigContainer"}, {}, "here")
    words = Tensor("embedding.word_embeddings.weight", (256, 32), "float32", (1, 1))
    with pytest.raises(CheckpointMismatchError, match=re.escape("has the shape [256, 32], and after its run_config")):
        layout_for(config_with(), {words.key: words}, "here")


def test_tensors_without_a_place_are_named(models: Path, tmp_path: Path) -> None:
    save = copied(models / "llama", tmp_path / "run")
    recorded = save / "iter_0000002" / "run_config.yaml"
    (save / "iter_0000002" / "manifest.json").unlink()
    text = recorded.read_text().replace("_target_: bridge.training.config.ConfigContainer\n", "")
    recorded.write_text(
        text.replace("share_embeddings_and_output_weights: false", "share_embeddings_and_output_weights: true")
    )
    with pytest.raises(CheckpointMismatchError, match=r"LlamaForCausalLM has no place for output_layer\.weight of"):
        export(save, tmp_path / "out", Options(hf_layout=True))


def test_nothing_is_left_of_an_export_that_fails(models: Path, tmp_path: Path) -> None:
    save = copied(models / "llama", tmp_path / "run")
    flip(next((save / "iter_0000002").glob("*.distcp")))
    for options in ({}, {"memory": 2 * MIB}):
        with pytest.raises(CheckpointDamagedError, match=r"iter_0000002 is damaged: __\d_0\.distcp has xxh3"):
            export(save, tmp_path / "out", **options)
    next((save / "iter_0000002").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointDamagedError, match="is missing"):
        export(save, tmp_path / "out", verify_source=False)
    source = models / "llama"
    refused: list[tuple[type[CheckpointError], str, tuple[Any, ...], dict[str, Any]]] = [
        (CheckpointNotFoundError, "SRC: .* does not exist", (tmp_path / "no", tmp_path / "out"), {}),
        (CheckpointNotFoundError, "7", (source, tmp_path / "out"), {"step": 7}),
        (CheckpointMismatchError, "no tensor in .* matches", (source, tmp_path / "out", Options(include=("x",))), {}),
        (CheckpointMismatchError, "leave one out", (source, tmp_path / "out", Options(None, True, ("*",))), {}),
        (CheckpointSaveError, "--memory-gib: a process needs 1 MiB", (source, tmp_path / "out"), {"memory": 1000}),
        (NotACheckpointError, "lies in the checkpoint", (source, source / "iter_0000002" / "out"), {}),
        (CheckpointSaveError, "DST: .* exists; give --force", (source, tmp_path), {}),
    ]
    for error, message, arguments, options in refused:
        with pytest.raises(error, match=message):
            export(*arguments, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_only_exports_are_replaced(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(models / "llama", out)
    with pytest.raises(CheckpointSaveError, match=r"DST: .* exists; give --force to replace it"):
        export(models / "starcoder2", out)
    export(models / "starcoder2", out, Options(force=True, hf_layout=True))
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointSaveError, match=re.escape("holds what no export has written (tokenizer.json)")):
        export(models / "llama", out, Options(force=True))
    assert (out / "tokenizer.json").exists()


def test_the_tokenizer_comes_along_for_transformers(models: Path, tmp_path: Path) -> None:
    save, out = copied(models / "llama", tmp_path / "run"), tmp_path / "out"
    path = save / "iter_0000002"
    for name, data in {"tokenizer.json": b"{}", "merges.txt": b"a b", "config.json": b"its own", "deep/x": b""}.items():
        add_file(path, f"tokenizer/{name}", data)
    exported = export(save, out, Options(hf_layout=True, shard_bytes=100_000))
    beside = {"tokenizer.json": b"{}", "merges.txt": b"a b"}
    assert {name: (out / name).read_bytes() for name in beside} == beside
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"  # the model's
    assert exported.files == {each.name: each.stat().st_size for each in out.iterdir()}
    assert not (out / "deep").exists()
    # What an export has put there, another one replaces; what somebody else has, none.
    export(models / "starcoder2", out, Options(force=True))
    assert {each.name for each in out.iterdir()} == {"model.safetensors"}
    export(save, out, Options(force=True, hf_layout=True))
    (out / "vocab.json").write_bytes(b"{}")
    with pytest.raises(CheckpointSaveError, match=re.escape("holds what no export has written (vocab.json)")):
        export(save, out, Options(force=True, hf_layout=True))
    assert (out / "vocab.json").exists()


def test_two_exports_do_not_write_into_one_another(models: Path, tmp_path: Path) -> None:
    with published(tmp_path / "out", force=False) as directory:
        (directory / "model.safetensors").write_bytes(b"")
        with pytest.raises(DirectoryInUseError, match=r"another export writes .*out; wait until it has ended"):
            export(models / "llama", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_killed_at_any_time_it_leaves_all_or_nothing(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "places" / "out"
    out.parent.mkdir()

    def replace() -> None:
        exporting.export(models / "llama", out, Options(force=out.exists(), shard_bytes=10**9, hf_layout=True))

    replace_whole = [{"model.safetensors", "config.json"}, {"model.safetensors"}]
    for begin in ("absent", "there"):
        operation, killed = 0, True
        while killed:
            shutil.rmtree(out, ignore_errors=True)
            if begin == "there":
                out.mkdir()
                (out / "model.safetensors").write_bytes(b"old")
            operation += 1
            killed, _ = run_until(operation, out.parent, replace, 1)
            if out.exists():
                names = {path.name for path in out.iterdir()}
                assert names in replace_whole[: 1 if begin == "absent" else 2]
                if names == replace_whole[0]:
                    assert len(load_file(out / "model.safetensors")) == 21
            else:
                assert begin == "absent"
                assert {path.name for path in out.parent.iterdir()} <= {".out.exporting"}
        assert operation > 4
        assert [path.name for path in out.parent.iterdir() if not path.name.startswith(".trash-")] == ["out"]


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    run_ranks(save_large, 1, tmp_path / "run")  # four times the budget, in two tensors

    def measure(hwm: str = "VmHWM") -> tuple[int, int]:
        from bridge.training.checkpointing.conversion.processes import give_memory_back

        give_memory_back()
        exporting.export(tmp_path / "run", tmp_path / "warm", Options(include=("rows",)), memory=2 * MIB)
        Path("/proc/self/clear_refs").write_text("5")
        before = status(hwm)
        exported = exporting.export(tmp_path / "run", tmp_path / "out", memory=32 * MIB)
        return status(hwm) - before, exported.peak_bytes

    ((grown, held),) = run_ranks(measure, 1)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 128 * MIB
    assert held <= 32 * MIB
    assert grown < 32 * MIB


def status(field: str) -> int:
    """Bytes that Linux counts for this process."""
    (found,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) << 10


def test_the_command_line(models: Path, tmp_path: Path) -> None:
    llama, out = models / "llama", tmp_path / "out"
    plain, as_json, quiet, again, unknown, missing = run_all(
        ["export", llama, out, "--format", "safetensors", "--dtype", "bf16", "--hf-layout"],
        ["export", llama, tmp_path / "json", "--json", "--step", 2, "--shard-gb", 0.0001, "--no-verify"],
        ["export", llama, out, "--quiet", "--force", "--include", "*norm*", "--memory-gib", 0.01],
        ["export", llama, out],
        ["export", llama, out, "--format", "gguf"],
        ["export", tmp_path / "no", out],
    )
    assert plain.status == 0, plain.err
    assert plain.out.startswith(f"exported iteration 2 as a llama of transformers to {out}: 21 tensors, ")
    assert as_json.json["tensors"] == len(of_model(llama / "iter_0000002"))
    assert as_json.json["files"].keys() == {path.name for path in (tmp_path / "json").iterdir()}
    assert as_json.json["verified"] is False
    assert (quiet.status, quiet.err) == (0, "")
    assert all("norm" in key for key in tensors_in(out))
    assert (again.status, again.err) == (
        1,
        f"error: DST: {out} exists; give --force to replace it, or name another directory\n",
    )
    assert unknown.status == 2
    assert missing.err == f"error: SRC: {tmp_path / 'no'} does not exist\n"
    assert run("export", llama).status == 2


@pytest.mark.parametrize("option", ["--memory-gib", "--shard-gb"])
@pytest.mark.parametrize("number", ["nan", "inf", "-1", "0", "much"])
@pytest.mark.parametrize("command", ["export", "average"])
def test_amounts_are_finite_numbers_above_0(command: str, option: str, number: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a") as raised:
        parse([command, "SRC", "DST", option, number])
    assert raised.value.param is not None
    assert option in raised.value.param.opts


def test_amounts_that_nothing_has_are_no_limit() -> None:
    assert bytes_of(1e308, 2**30) == 2**62
    assert bytes_of(0.5, 2**30) == 2**29


def tensor(*shape: int, chunk: tuple[int, ...] | None = None) -> Tensor:
    return Tensor("key", shape, "float32", chunk or (1,) * len(shape))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (96, [((0, 0, 0), (2, 3, 4))]),
        (95, [((0, 0, 0), (1, 3, 4)), ((1, 0, 0), (1, 3, 4))]),
        (40, [((n, r, 0), (1, s, 4)) for n in (0, 1) for r, s in ((0, 2), (2, 1))]),
        (8, [((n, r, c), (1, 1, 2)) for n in (0, 1) for r in (0, 1, 2) for c in (0, 2)]),
    ],
)
def test_pieces_follow_one_another(limit: int, expected: list[Any]) -> None:
    stored = tensor(2, 3, 4)
    target = Target("name", (2, 3, 4), "float32", (whole(stored),))
    pieces = list(pieces_of(target, limit))
    assert [(piece.offset, piece.shape) for piece in pieces] == expected
    values = torch.arange(24).reshape(2, 3, 4)
    flat = torch.cat([_cut(values, piece).flatten() for piece in pieces])
    assert torch.equal(flat, values.flatten())


def _cut(values: torch.Tensor, piece: Piece) -> torch.Tensor:
    return values[tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.shape, strict=True))]


def test_chunks_that_do_not_fit_are_named() -> None:
    target = Target("name", (4, 4), "float32", (whole(tensor(4, 4, chunk=(4, 4))),))
    with pytest.raises(PlanError, match="key has chunks of 64 bytes, and 32 is the most that can be held"):
        list(pieces_of(target, 32))


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4], 8, [[0, 1]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([20, 4, 4], 8, [[0], [1, 2]]),
        ([4, 20, 4], 8, [[0], [1], [2]]),
        ([], 8, []),
    ],
)
def test_files_are_filled_in_order(sizes: list[int], limit: int, expected: list[list[int]]) -> None:
    targets = [Target(str(number), (size,), "uint8", ()) for number, size in enumerate(sizes)]
    files = files_of(targets, limit)
    assert [[int(each.name) for each in group] for group in files.values()] == expected
    if len(expected) == 1:
        assert list(files) == ["model.safetensors"]


def test_wider_types_come_first_in_a_file() -> None:
    targets = [Target(dtype, (1,), dtype, ()) for dtype in ("uint8", "float32", "bfloat16", "int64", "bool")]
    ((_, group),) = files_of(targets, 100).items()
    assert [each.name for each in group] == ["int64", "float32", "bfloat16", "uint8", "bool"]
