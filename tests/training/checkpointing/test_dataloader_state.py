"""The position in the data, through real checkpoints: saved once for each data-parallel rank, restored exactly,
divided anew among another number of ranks, or refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader

from bridge.training.checkpointing import CheckpointError, CheckpointSaveError, maybe_save_dataloader_state
from bridge.training.checkpointing.contents.dataloader import (
    DataloaderState,
    dataloader_sidecar,
    read_dataloader_state,
    saved_data_parallel_size,
)
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.integrity import find_damage, read_manifest
from bridge.training.config import ConfigContainer
from bridge.training.data import (
    DatasetError,
    DataStateError,
    IteratorBuilder,
    IteratorRequest,
    StatefulLoaderIterator,
    build_train_iterator,
    collate,
    restore_position,
)
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import init_model_parallel, run_ranks
from tests.training.checkpointing.test_saving import save
from tests.training.tiny import digests, tiny_config


class Recorder:
    """Passes an iterator's batches on and keeps their tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[str] = []
        for name in ("save_state", "load_state", "reshard_state"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def __iter__(self) -> Recorder:
        return self

    def __next__(self) -> Any:
        batch = next(self.inner)
        self.seen.append(str(batch["tokens"].tolist()))
        return batch


def torchdata_loader(request: IteratorRequest) -> StatefulLoaderIterator:
    """A shuffled share of the samples for each data-parallel rank; a bit more than one epoch in 6 iterations."""
    mine = [request.dataset[index] for index in range(request.data_parallel_rank, 40, request.data_parallel_size)]
    loader = StatefulDataLoader(
        mine,  # type: ignore[arg-type]
        request.micro_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=request.num_workers,
        generator=torch.Generator().manual_seed(5 + request.data_parallel_rank),
        collate_fn=collate,
    )
    return StatefulLoaderIterator(loader)


def run_recorded(cfg: ConfigContainer, build: IteratorBuilder) -> dict[str, Any]:
    """Train, and tell what this rank was fed and how it ended."""
    run = setup(cfg, iterator_builder=lambda request: Recorder(build(request)))  # type: ignore[arg-type, return-value]
    started_at = run.state.train_state.step
    train(run)
    recorder = run.train_data_iterator
    return {
        "started at": started_at,
        "seen": None if recorder is None else recorder.seen,
        "digests": {name: value for name, value in digests(run).items() if name != "data iterator"},
    }


RUNS: list[tuple[str, int, dict[str, int], IteratorBuilder, int]] = [
    ("torchdata, DP2", 2, {}, torchdata_loader, 0),
    ("torchdata, DP2, workers", 2, {}, torchdata_loader, 2),
    ("torchdata, PP4", 4, {"pipeline_model_parallel_size": 4}, torchdata_loader, 0),
    (
        "torchdata, PP2 with VPP2",
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        torchdata_loader,
        0,
    ),
    ("ours, TP2", 2, {"tensor_model_parallel_size": 2}, build_train_iterator, 0),
    ("ours, DP2, workers", 2, {}, build_train_iterator, 2),
]
SLOW = {"torchdata, DP2", "torchdata, PP4"}
"""Of those: what the rest has some of, too."""


@pytest.mark.parametrize(
    ("world_size", "model", "build", "workers"),
    [pytest.param(*rest, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, *rest in RUNS],
)
def test_the_batches_after_a_resume_are_those_of_the_uninterrupted_run(
    tmp_path: Path, world_size: int, model: dict[str, int], build: IteratorBuilder, workers: int
) -> None:
    """Fed the same batches, and therefore equal bit for bit in everything; pipeline stages in the middle have none."""

    def config(**checkpoint: Any) -> ConfigContainer:
        return tiny_config(
            train_iters=6,
            model=model,
            dataset={"num_workers": workers},
            checkpoint={"save": str(tmp_path), "save_interval": 2, "async_save": workers > 0, **checkpoint},
        )

    expected = run_ranks(run_recorded, world_size, config(), build)
    resume = {"load": str(tmp_path), "ckpt_step": 4, "load_dataloader_state": "require"}
    found = run_ranks(run_recorded, world_size, config(**resume), build)
    data_parallel = world_size if not model else 1
    saved = sorted(path.name for path in (tmp_path / "iter_0000004/dataloader_state").iterdir())
    assert saved == [f"train_dataloader_dprank{rank:03d}.pt" for rank in range(data_parallel)]
    for rank in range(world_size):
        assert found[rank]["started at"] == 4
        assert found[rank]["digests"] == expected[rank]["digests"]
        if expected[rank]["seen"] is None:
            assert found[rank]["seen"] is None
            assert 0 < rank < world_size - 1
        else:
            third = len(expected[rank]["seen"]) // 3
            assert found[rank]["seen"] == expected[rank]["seen"][2 * third :]


def first_tokens(cfg: ConfigContainer, build: IteratorBuilder) -> list[Any] | str:
    """What the next iteration would be fed, or why there is no run."""
    try:
        run = setup(cfg, iterator_builder=build)
    except DatasetError as error:
        return f"{type(error).__name__}: {error}"
    batches = cfg.train.global_batch_size // cfg.train.micro_batch_size // dist.get_world_size()
    return [next(run.train_data_iterator)["tokens"].tolist() for _ in range(batches)]


def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Our iterator goes on with the same samples, divided anew. torchdata's loader cannot, and says what to do."""

    def save_with(name: str, build: IteratorBuilder) -> None:
        run_ranks(run_recorded, 2, tiny_config(train_iters=2, checkpoint={"save": str(tmp_path / name)}), build)

    def resume(name: str, build: IteratorBuilder, world_size: int, **checkpoint: Any) -> list[Any]:
        settings = {"load": str(tmp_path / name), "load_optim": False, **checkpoint}
        return run_ranks(first_tokens, world_size, tiny_config(train_iters=4, checkpoint=settings), build)

    save_with("ours", build_train_iterator)
    (alone,) = resume("ours", build_train_iterator, 1)
    first, second = resume("ours", build_train_iterator, 2)
    assert alone == [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert resume("ours", build_train_iterator, 1, load_dataloader_state="ignore") == [alone]

    save_with("torchdata", torchdata_loader)
    assert resume("torchdata", torchdata_loader, 1) == [
        "DataStateError: the checkpoint holds the states of 2 data iterators, this run has 1 data-parallel ranks, and "
        "StatefulLoaderIterator has no reshard_state() to divide the data anew; keep the data-parallel size, or to "
        "start it without a saved position set checkpoint.load_dataloader_state: ignore"
    ]
    (started_anew,) = resume("torchdata", torchdata_loader, 1, load_dataloader_state="ignore")
    assert isinstance(started_anew, list)

    # Another kind of iterator: refused on every rank, also by ranks that could have taken it.
    for outcome in resume("torchdata", build_train_iterator, 2):
        assert outcome.startswith("DataStateError: rank 0: a saved data position must hold the integer")


class Counter:
    """A stateful iterator with the least that it takes."""

    def __init__(self, position: Any = 0) -> None:
        self.position = position

    def save_state(self) -> Any:
        return {"position": self.position}

    def load_state(self, state: Any) -> None:
        self.position = state["position"]


class Divisible(Counter):
    def reshard_state(self, states: list[Any], rank: int, size: int) -> None:
        self.position = (states, rank, size)


def test_what_becomes_of_an_iterator() -> None:
    same = DataloaderState(({"position": 5},), saved_size=2, rank=1, size=2)
    changed = DataloaderState(({"position": 5}, {"position": 6}), saved_size=2, rank=1, size=4)

    one, other = Counter(), Counter()
    restore_position([one, None, other, one], same)  # the chunks of a virtual pipeline
    assert (one.position, other.position) == (5, 5)
    restore_position(None, same)  # a pipeline stage in the middle
    restore_position(one, None)  # nothing was saved
    assert one.position == 5

    divisible = Divisible()
    restore_position(divisible, changed)
    assert divisible.position == ([{"position": 5}, {"position": 6}], 1, 4)
    with pytest.raises(DataStateError, match=r"Counter has no reshard_state\(\) to divide the data anew; keep"):
        restore_position(one, changed)
    with pytest.raises(DataStateError, match=r"has no load_state\(\) to take it; to start it .*: ignore$"):
        restore_position(iter([]), same)
    with pytest.raises(DataStateError, match=r"Counter could not take the state .*: KeyError: 'position'; to start"):
        restore_position(one, DataloaderState(({},), 2, 1, 2))


class Group:
    """A process group as far as saving looks at it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


def groups(**ranks: int) -> Any:
    return SimpleNamespace(**{name: Group(ranks.get(name, 0)) for name in ("tp", "pp", "cp", "dp")})


def test_one_rank_of_those_that_share_the_data_saves() -> None:
    assert dataloader_sidecar(Counter(), groups(dp=12)).name == "dataloader_state/train_dataloader_dprank012.pt"  # type: ignore[union-attr]
    for name in ("tp", "pp", "cp"):
        assert dataloader_sidecar(Counter(), groups(**{name: 1})) is None
    for stateless in (None, iter([]), [None, iter([])]):
        assert dataloader_sidecar(stateless, groups()) is None
    first = dataloader_sidecar([None, Counter(3), Counter(4)], groups())
    assert first == dataloader_sidecar(Counter(3), groups())


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved() -> None:
    with pytest.raises(CheckpointSaveError, match=r"save_state\(\) of the data iterator Counter gave what a load"):
        dataloader_sidecar(Counter(Counter()), groups())


def test_the_documented_function(tmp_path: Path) -> None:
    """2 x 2 ranks: the files lie where a load looks, one for each data-parallel rank; failures reach every rank."""

    def attempt() -> dict[str, Any]:
        init_model_parallel(tp=2)
        rank = dist.get_rank()
        maybe_save_dataloader_state([], Counter(rank), 3)  # no path, no file
        maybe_save_dataloader_state([], Counter(rank), 3, str(tmp_path))
        maybe_save_dataloader_state([], Counter(rank), 3, str(tmp_path))  # again
        maybe_save_dataloader_state(None, iter([]), 4, str(tmp_path))  # no state, no file
        states = [read_dataloader_state(tmp_path / "iter_0000003", r, 2).states for r in range(2)]
        resharded = read_dataloader_state(tmp_path / "iter_0000003", 3, 4)
        try:
            maybe_save_dataloader_state([], Counter(Counter() if rank == 2 else 0), 5, str(tmp_path))
            failure = "none"
        except CheckpointError as error:
            failure = f"{type(error).__name__}: {error}"
        return {"states": states, "resharded": resharded, "failure": failure}

    for outcome in run_ranks(attempt, 4):
        assert outcome["states"] == [({"position": 0},), ({"position": 2},)]
        assert outcome["resharded"] == DataloaderState(({"position": 0}, {"position": 2}), 2, 3, 4)
        assert outcome["resharded"].size_changed
        assert outcome["failure"].startswith(
            "CheckpointSaveError: saving the state of the data iterators failed on rank 2: save_state() of"
        )
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    directory = "iter_0000003/dataloader_state"
    assert {name for name in files if "iter_0000005" not in name} == {
        f"{directory}/train_dataloader_dprank000.pt",
        f"{directory}/train_dataloader_dprank001.pt",
    }


def test_context_parallel_ranks_share_one_state(tmp_path: Path) -> None:
    def attempt() -> None:
        init_model_parallel(context_parallel_size=2)
        maybe_save_dataloader_state([], Counter(dist.get_rank()), 1, str(tmp_path))

    run_ranks(attempt, 2)
    assert saved_data_parallel_size(tmp_path / "iter_0000001") == 1
    assert read_dataloader_state(tmp_path / "iter_0000001", 0, 1).states == ({"position": 0},)


def test_the_state_of_a_published_checkpoint_stays(tmp_path: Path) -> None:
    def attempt() -> str:
        run = setup(tiny_config(checkpoint={"save": str(tmp_path)}))
        save(run)
        maybe_save_dataloader_state(run.model, run.train_data_iterator, 0, str(tmp_path))
        try:
            maybe_save_dataloader_state(run.model, Counter(), 0, str(tmp_path))
        except CheckpointSaveError as error:
            return str(error)
        return "replaced"

    for outcome in run_ranks(attempt, 2):
        assert "is published and its manifest lists another dataloader_state/train_dataloader_dprank00" in outcome
    manifest = read_manifest(tmp_path / "iter_0000000")
    assert manifest is not None
    assert find_damage(tmp_path / "iter_0000000", manifest.files, checksums=True) == []


def test_a_rank_whose_file_is_missing_is_damage(tmp_path: Path) -> None:
    directory = tmp_path / "dataloader_state"
    assert saved_data_parallel_size(tmp_path) == 0
    directory.mkdir()
    for rank in (0, 2):
        torch.save({"dataloader_state_dict": rank}, directory / f"train_dataloader_dprank{rank:03d}.pt")
    (directory / "notes.txt").write_text("no state")
    assert saved_data_parallel_size(tmp_path) == 3
    assert read_dataloader_state(tmp_path, 2, 3) == DataloaderState((2,), 3, 2, 3)
    for rank, size in ((1, 3), (0, 2)):
        with pytest.raises(CheckpointDamagedError, match=r"dprank001\.pt is not a readable data iterator state"):
            read_dataloader_state(tmp_path, rank, size)
