"""The mean of several iterations: its values, the checkpoint that it becomes, and what a run makes of that."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.checkpointing.conversion.plan import Piece, Tensor
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    DirectoryInUseError,
)
from bridge.training.checkpointing.export import averaging
from bridge.training.checkpointing.export.averaging import Averaged
from bridge.training.checkpointing.export.exporting import Options
from bridge.training.checkpointing.export.mean import AveragedStore, iterations_of
from bridge.training.checkpointing.export.plan import whole
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRACKER
from bridge.training.checkpointing.safety.safe_globals import load_torch_file
from bridge.training.checkpointing.source import require_whole
from tests.cli.commands import copied, flip, run_all
from tests.cli.exported import elsewhere, of_model, stock_tensors, tensors_in
from tests.cli.test_rescue import claimed
from tests.distributed.launch import run_ranks
from tests.faults.killing import run_until
from tests.training.tiny import run_to_end, tiny_config

MIB = 1 << 20
NAME = "iter_0000006"


def average(*arguments: Any, **options: Any) -> Averaged:
    """Take a mean in another process."""
    averaged: Averaged = elsewhere(averaging.average, *arguments, **options)
    return averaged


def mean_of(save: Path, *iterations: int) -> dict[str, torch.Tensor]:
    """The mean of what torch reads, summed in the order of the iterations."""
    found = [of_model(save / f"iter_{iteration:07d}") for iteration in iterations]
    return {key: sum(each[key] for each in found[1:]).add(found[0][key]).div(len(found)) for key in found[0]}


def require_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        # The order of the summands may differ.
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8)


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_the_mean_is_a_checkpoint_like_any_other(trained: Path, tmp_path: Path) -> None:
    averaged = average(trained, tmp_path / "mean", last=3, memory=4 * MIB)
    path = tmp_path / "mean" / NAME
    assert (averaged.path, averaged.iteration, averaged.iterations) == (path, 6, (2, 4, 6))
    assert averaged.peak_bytes <= 4 * MIB
    require_whole(path, "full")
    require_close(stock_tensors(path), mean_of(trained, 2, 4, 6))
    assert not torch.equal(
        stock_tensors(path)["decoder.final_layernorm.weight"],
        of_model(trained / NAME)["decoder.final_layernorm.weight"],
    )
    manifest, newest = read_manifest(path), read_manifest(trained / NAME)
    assert manifest is not None
    assert newest is not None
    assert (manifest.averaged, newest.averaged, manifest.metrics) == ((2, 4, 6), (), {})
    assert (manifest.iteration, manifest.checkpoint_format) == (6, "torch_dist")
    assert manifest.total_bytes == averaged.total_bytes
    files = {"common.pt", "metadata.json", ".metadata", "run_config.yaml", "train_state.pt", "manifest.json"}
    assert {name for name in files_in(path) if not name.endswith(".distcp")} == files
    common = load_torch_file(path / "common.pt", "common")
    assert common.keys() == {"checkpoint_version", "iteration", "content_metadata"}
    assert {each.name for each in (tmp_path / "mean").iterdir()} == {NAME, TRACKER, LEGACY_TRACKER}
    assert (tmp_path / "mean" / LEGACY_TRACKER).read_text() == "6"


def started_from(setting: str, path: Path) -> Any:
    from bridge.training.setup import setup

    options = {"pretrained_checkpoint": str(path)} if setting == "pretrained_checkpoint" else {"load": str(path)}
    if setting == "finetune":
        options["finetune"] = True
    try:
        run = setup(tiny_config(train_iters=8, checkpoint=options))
    except CheckpointError as error:
        return error
    (chunk,) = run.model
    parameters = {name.rpartition("module.")[2]: value.detach() for name, value in chunk.named_parameters()}
    return run.state.train_state.step, parameters


def test_a_run_starts_from_the_mean(trained: Path, tmp_path: Path) -> None:
    average(trained, tmp_path / "mean", steps=(4, 6))
    expected = mean_of(trained, 4, 6)
    for setting in ("pretrained_checkpoint", "finetune"):
        ((step, parameters),) = run_ranks(started_from, 1, setting, tmp_path / "mean")
        assert step == 0
        for key in ("embedding.word_embeddings.weight", "decoder.final_layernorm.bias"):
            torch.testing.assert_close(parameters[key], expected[key], rtol=1e-6, atol=1e-8)
        layers = [parameters[f"decoder.layers.{n}.mlp.linear_fc2.weight"] for n in range(4)]
        stacked = expected["decoder.layers.mlp.linear_fc2.weight"]
        torch.testing.assert_close(torch.stack(layers), stacked, rtol=1e-6, atol=1e-8)


def test_the_mean_is_exported(trained: Path, tmp_path: Path) -> None:
    options = Options(shard_bytes=150_000, dtype="bf16")
    exported = elsewhere(averaging.export_average, trained, tmp_path / "out", options, steps=(2, 4, 6), memory=4 * MIB)
    assert exported.iterations == (2, 4, 6)
    found = tensors_in(tmp_path / "out")
    average(trained, tmp_path / "mean", last=3)
    assert all(
        torch.equal(found[key], value.bfloat16()) for key, value in stock_tensors(tmp_path / "mean" / NAME).items()
    )
    assert len(list((tmp_path / "out").iterdir())) > 3


class Held:
    """A store of tensors in memory."""

    objects: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, *values: torch.Tensor) -> None:
        self._values = values
        self.tensors = {
            str(n): Tensor(str(n), tuple(v.shape), str(v.dtype).removeprefix("torch."), (1,) * v.ndim)
            for n, v in enumerate(values)
        }

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        return [self._values[int(piece.tensor.key)].clone() for piece in pieces]

    def read_objects(self, keys: Sequence[str]) -> dict[str, Any]:
        raise KeyError(*keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32, torch.float64])
def test_sums_are_taken_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(50, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.zeros(50, dtype=wide)
    for value in values:
        total += value.to(wide)
    stores = [Held(value) for value in values]
    tensors = stores[0].tensors
    (found,) = AveragedStore(stores, tensors).read([whole(tensors["0"])])
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.float64), (total / 5).to(dtype).to(torch.float64))


def test_what_has_no_mean_must_be_the_same() -> None:
    stores = [Held(torch.tensor([1, 2])), Held(torch.tensor([1, 2])), Held(torch.tensor([1, 3]))]
    tensors = stores[0].tensors
    (found,) = AveragedStore(stores[:2], tensors).read([whole(tensors["0"])])
    assert found.tolist() == [1, 2]
    with pytest.raises(CheckpointMismatchError, match="SRC: 0 is of the type int64, which has no mean, and differs"):
        AveragedStore(stores, tensors).read([whole(tensors["0"])])


def test_iterations_are_named_or_counted(trained: Path, tmp_path: Path) -> None:
    assert iterations_of(trained, (6, 2, 6), None) == [2, 6]
    assert iterations_of(trained, (), 2) == [4, 6]
    rolled_back = copied(trained, tmp_path / "run")
    shutil.copy(trained / "iter_0000004" / "train_state.pt", rolled_back / TRACKER)
    assert iterations_of(rolled_back, (), 2) == [2, 4]
    wrong: list[tuple[type[CheckpointError], str, Path, tuple[int, ...], int | None]] = [
        (CheckpointMismatchError, "two iterations or more", trained, (6, 6), None),
        (CheckpointMismatchError, "two iterations or more", trained, (), 1),
        (CheckpointMismatchError, "one of them", trained, (6, 4), 2),
        (CheckpointMismatchError, "one of them", trained, (), None),
        (CheckpointNotFoundError, "--last is 4, and .* has 3 checkpoints", trained, (), 4),
        (CheckpointMismatchError, "is one checkpoint", trained / NAME, (6, 4), None),
        (CheckpointNotFoundError, "does not exist", tmp_path / "no", (6, 4), None),
    ]
    for error, message, source, steps, last in wrong:
        with pytest.raises(error, match=message):
            iterations_of(source, steps, last)


def test_checkpoints_of_other_models_have_no_mean(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    model = {"ffn_hidden_size": 128, "share_embeddings_and_output_weights": False}
    cfg = tiny_config(train_iters=2, model=model, checkpoint={"save": str(other), "save_interval": 2})
    run_ranks(run_to_end, 1, cfg)
    shutil.copytree(trained / "iter_0000004", other / "iter_0000004")
    with pytest.raises(CheckpointMismatchError) as caught:
        average(other, tmp_path / "mean", steps=(2, 4))
    assert str(caught.value) == (
        "SRC: a mean needs the same tensors: only iter_0000002 has output_layer.weight; "
        "decoder.layers.mlp.linear_fc1.bias is float32 [4, 128] in iter_0000002 and float32 [4, 256] in iter_0000004; "
        "decoder.layers.mlp.linear_fc1.weight is float32 [4, 128, 64] in iter_0000002 and float32 [4, 256, 64] in "
        "iter_0000004; decoder.layers.mlp.linear_fc2.weight is float32 [4, 64, 128] in iter_0000002 and float32 "
        "[4, 64, 256] in iter_0000004"
    )
    assert not (tmp_path / "mean").exists()


def test_nothing_is_published_of_a_mean_that_fails(trained: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"
    damaged = copied(trained, tmp_path / "run")
    flip(damaged / "iter_0000004" / "__0_0.distcp")
    with pytest.raises(CheckpointDamagedError, match=r"SRC: .*iter_0000004 is damaged: __0_0\.distcp has xxh3"):
        average(damaged, mean, last=2)
    assert not mean.exists()
    with pytest.raises(CheckpointMismatchError, match="which is never replaced; name another"):
        average(trained, trained, last=2)
    with pytest.raises(CheckpointSaveError, match="--memory-gib: a process needs 1 MiB"):
        average(trained, mean, last=2, memory=MIB)
    average(trained, mean, last=2)
    with pytest.raises(CheckpointSaveError, match="has a checkpoint of iteration 6; give --force to replace it"):
        average(trained, mean, last=3)
    average(trained, mean, last=3, force=True)
    manifest = read_manifest(mean / NAME)
    assert manifest is not None
    assert manifest.averaged == (2, 4, 6)
    with claimed(mean), pytest.raises(DirectoryInUseError, match="is in use"):
        average(trained, mean, last=2, force=True)


def test_killed_at_any_time_it_leaves_a_whole_checkpoint_or_none(trained: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"

    def work() -> None:
        averaging.average(trained, mean, last=2)

    _, count = run_until(None, mean, work, 1)
    assert count > 8
    for operation in range(1, count + 1, 2):
        shutil.rmtree(mean)
        run_until(operation, mean, work, 1)
        mean.mkdir(exist_ok=True)
        assert {path.name for path in mean.iterdir() if path.name.startswith("iter_")} <= {NAME}
        if (mean / NAME).exists():
            require_whole(mean / NAME, "full")
        else:
            assert not (mean / TRACKER).exists()


def test_the_command_line(trained: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"
    plain, as_json, quiet, inspected, listed, both, option, few = run_all(
        ["average", trained, mean, "--step", 2, "--step", 6],
        ["average", trained, tmp_path / "out", "--last", 3, "--format", "safetensors", "--json"],
        ["average", trained, mean, "--last", 3, "--quiet", "--force", "--memory-gib", 0.1, "--no-verify"],
        ["inspect", mean],
        ["ls", mean],
        ["average", trained, mean, "--last", 3, "--step", 4],
        ["average", trained, mean, "--last", 3, "--dtype", "bf16"],
        ["average", trained, mean, "--last", 1],
    )
    assert plain.status == 0, plain.err
    first, *rest = plain.out.splitlines()
    assert first.startswith(f"published the mean of iterations 2, 6 as {mean / NAME}: 15 tensors, ")
    assert rest == [
        "the trackers name iteration 6",
        "To start a run from it: checkpoint.pretrained_checkpoint",
    ]
    assert as_json.json["iterations"] == [2, 4, 6]
    assert (quiet.status, len(quiet.out.splitlines())) == (0, 2)
    assert quiet.err.endswith(f"WARNING replaced the checkpoint that was in {mean / NAME}\n")
    assert len(quiet.err.splitlines()) == 1
    assert (inspected.status, listed.status) == (0, 0)
    assert "the mean of iterations 2, 4, 6\n" in inspected.out
    assert "  committed, a mean  <- a run resumes here\n" in listed.out
    assert (both.status, option.status, few.status) == (2, 2, 1)
    assert option.err.startswith("error: --dtype is for --format safetensors.")
    assert few.err == "error: a mean is taken of two iterations or more; name others, or more of them\n"
