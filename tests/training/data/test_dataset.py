from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from bridge.training.config import ConfigContainer, DatasetConfig
from bridge.training.data import DatasetError, TrainDataIterator, build_train_dataset
from bridge.training.tokenizers import NullTokenizer
from tests.distributed.launch import init_ranks, run_ranks

SEQ_LENGTH = 8
TOKENIZER = NullTokenizer(999)
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def write_dataset(prefix: Path, lengths: list[int], first_token: int = 0) -> str:
    """Documents that count up from `first_token` throughout and end with the end-of-document token."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    token = first_token
    for length in lengths:
        builder.add_document([*range(token, token + length - 1), TOKENIZER.eod], [length])
        token += length - 1
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def config(seq_length: int = SEQ_LENGTH, **dataset: Any) -> ConfigContainer:
    cfg = ConfigContainer(dataset=DatasetConfig(**{"split": "1,0,0", **dataset}))
    cfg.model.seq_length = seq_length
    return cfg


def tokens(dataset: Any, count: int | None = None) -> list[list[int]]:
    return [dataset[index]["tokens"].tolist() for index in range(len(dataset) if count is None else count)]


def test_it_serves_what_megatrons_own_builder_serves(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data" / "text", [30, 50, 7, 80])
    ours = build_train_dataset(config(path=path, seed=5, split="80,20,0"), TOKENIZER, 60)

    class Tokenizer:
        vocab_size, eod, unique_identifiers = 1000, 999, "x"

    stock_config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=SEQ_LENGTH,
        blend=([path], None),
        split="80,20,0",
        path_to_cache=str(tmp_path / "stock"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    stock = BlendedMegatronDatasetBuilder(GPTDataset, [60, 1, 0], lambda: True, stock_config).build()[0]
    assert len(ours) == len(stock) >= 60
    for index in range(60):
        for key in KEYS:
            assert torch.equal(ours[index][key], stock[index][key])


def test_every_token_is_seen_once_an_epoch(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [9, 16, 24])
    dataset = build_train_dataset(config(path=path), TOKENIZER, 6)
    seen = sorted(token for sample in tokens(dataset) for token in sample if token != TOKENIZER.eod)
    assert len(seen) == len(set(seen))
    assert len(seen) >= 6 * SEQ_LENGTH - 3


def test_labels_are_the_next_tokens_and_blends_say_nothing_of_their_parts(tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / name, [40, 40]) for name in "ab"]
    dataset = build_train_dataset(config(path=paths, weights=[1, 1]), TOKENIZER, 4)
    batch = next(TrainDataIterator(dataset, 4, 0, 1))
    assert tuple(batch) == KEYS
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].sum() == 4 * SEQ_LENGTH


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), samples=st.integers(1, 80))
def test_there_are_always_enough_samples(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], samples: int
) -> None:
    path = write_dataset(tmp_path_factory.mktemp("data") / "text", lengths)
    dataset = build_train_dataset(config(path=path), TOKENIZER, samples)
    assert len(dataset) >= samples
    assert dataset[samples - 1]["tokens"].shape == (SEQ_LENGTH,)


def test_a_blend_draws_by_weight(tmp_path: Path) -> None:
    low = write_dataset(tmp_path / "low", [200, 200], first_token=0)
    high = write_dataset(tmp_path / "high", [200, 200], first_token=500)
    dataset = build_train_dataset(config(path=[low, high], weights=[30, 10]), TOKENIZER, 80)
    high_samples = sum(max(t for t in sample if t != TOKENIZER.eod) >= 500 for sample in tokens(dataset, 80))
    assert high_samples == 20
    # More than an epoch of the first (49 samples) was needed: weights repeat data.
    assert len(dataset) == 80


def test_a_blend_by_size_ends_with_an_error_before_training_does(tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / name, [81]) for name in "ab"]
    assert len(build_train_dataset(config(path=paths), TOKENIZER, 20)) == 20
    with pytest.raises(DatasetError, match=r"hold 20 samples and training needs 21: .* set dataset.weights"):
        build_train_dataset(config(path=paths), TOKENIZER, 21)


def test_the_weight_of_a_single_path_changes_nothing(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [40])
    plain = build_train_dataset(config(path=path), TOKENIZER, 9)
    weighted = build_train_dataset(config(path=[path], weights=[0.2]), TOKENIZER, 9)
    assert tokens(plain) == tokens(weighted)


def test_mock_data_needs_no_files() -> None:
    cfg = config(seq_length=16, mock=True)
    first, again = (build_train_dataset(cfg, TOKENIZER, 12) for _ in range(2))
    assert len(first) >= 12
    assert tokens(first, 12) == tokens(again, 12)
    assert max(max(sample) for sample in tokens(first, 12)) < TOKENIZER.vocab_size


def test_the_seed_changes_the_order(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [400])
    orders = [tokens(build_train_dataset(config(path=path, seed=seed), TOKENIZER, 40)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_document_ends_can_reset_positions_mask_loss_and_attention(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [4, 13])
    cfg = config(path=path, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    dataset = build_train_dataset(cfg, TOKENIZER, 2)
    batch = next(TrainDataIterator(dataset, 2, 0, 1))
    assert batch["attention_mask"].shape == (2, 1, SEQ_LENGTH, SEQ_LENGTH)
    sample = int((batch["tokens"] == TOKENIZER.eod).any(dim=1).nonzero()[0])
    end = int((batch["tokens"][sample] == TOKENIZER.eod).nonzero()[0])
    assert batch["loss_mask"][sample, end] == 0
    if end + 1 < SEQ_LENGTH:
        assert batch["position_ids"][sample, end + 1] == 0
        assert batch["attention_mask"][sample, 0, end + 1, end]
    plain = next(TrainDataIterator(build_train_dataset(config(path=path), TOKENIZER, 2), 2, 0, 1))
    assert tuple(plain) == KEYS


def test_changed_data_under_the_same_name_gets_new_indices(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [100])
    cfg = config(path=path, path_to_cache=str(tmp_path / "cache"))
    build_train_dataset(cfg, TOKENIZER, 5)
    write_dataset(tmp_path / "text", [30, 20])
    samples = tokens(build_train_dataset(cfg, TOKENIZER, 5))
    assert max(token for sample in samples for token in sample if token != TOKENIZER.eod) < 50
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_indices_are_built_once_and_published_whole(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [100])
    cfg = config(path=path)
    first = build_train_dataset(cfg, TOKENIZER, 30)
    (published,) = (tmp_path / "text" / "cache").iterdir()
    built = {file.name: file.stat().st_mtime_ns for file in published.iterdir()}
    assert sum(name.endswith(".npy") for name in built) == 3
    assert tokens(build_train_dataset(cfg, TOKENIZER, 30)) == tokens(first)
    assert {file.name: file.stat().st_mtime_ns for file in published.iterdir()} == built


def _killed_while_saving(body: Callable[[], Any], complete: int) -> None:
    """Run `body` in a child that is killed in the middle of an array, after some complete ones."""
    child = os.fork()
    if child == 0:
        save, left = np.save, iter(range(complete))

        def save_or_die(file: Any, array: Any, **options: Any) -> None:
            if next(left, None) is None:
                Path(file).write_bytes(b"half an array")
                os.kill(os.getpid(), signal.SIGKILL)
            save(file, array, **options)

        np.save = save_or_die
        try:
            body()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_run_was_building_is_never_read(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [100])
    cfg = config(path=path)
    expected = tokens(build_train_dataset(config(path=path, path_to_cache=str(tmp_path / "c")), TOKENIZER, 30))
    for complete in (0, 1, 2):
        _killed_while_saving(lambda: build_train_dataset(cfg, TOKENIZER, 30), complete)
    cache = tmp_path / "text" / "cache"
    assert all(folder.name.startswith(".building-") for folder in cache.iterdir())
    for folder in cache.iterdir():
        os.utime(folder, (0, 0))
    assert tokens(build_train_dataset(cfg, TOKENIZER, 30)) == expected
    assert [folder.name.startswith(".building-") for folder in cache.iterdir()] == [False]


def test_the_position_knows_whether_the_order_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One epoch is shuffled alike whatever is asked for; from two on, megatron-core shuffles them together."""
    path = write_dataset(tmp_path / "text", [400])
    short, longer, epochs = (build_train_dataset(config(path=path), TOKENIZER, count) for count in (20, 40, 120))
    state = TrainDataIterator(short, 1, 0, 1, consumed_samples=10).save_state()
    TrainDataIterator(longer, 1, 0, 1).load_state(state)
    assert tokens(short) == tokens(longer)
    assert not caplog.records
    TrainDataIterator(epochs, 1, 0, 1).load_state(state)
    assert "The training data is in another order" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, "dataset.path is not set"),
        ({"path": []}, "dataset.path is not set"),
        ({"path": ["a", "b"], "weights": [1.0]}, "dataset.weights has 1 entries and dataset.path has 2"),
        ({"path": ["a", "b"], "weights": [1.0, 0.0]}, r"dataset.weights is \[1.0, 0.0\]; expected positive"),
        ({"path": "a", "split": "0,1,0"}, "dataset.split is '0,1,0'; expected up to three numbers"),
        ({"path": "a", "split": "all"}, "dataset.split is 'all'"),
        ({"path": "a", "split": "1,1,1,1"}, "dataset.split is '1,1,1,1'"),
        ({"path": "nowhere/text"}, r"dataset.path: nowhere/text.idx does not exist"),
    ],
)
def test_settings_that_cannot_be_used_are_errors(dataset: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        build_train_dataset(config(**dataset), TOKENIZER, 5)


def test_a_dataset_in_the_folder_is_pointed_at(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text_document", [10])
    with pytest.raises(DatasetError, match=f"did you mean {path}?"):
        build_train_dataset(config(path=str(tmp_path)), TOKENIZER, 5)


def test_a_file_of_another_format_is_an_error(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [10])
    Path(f"{path}.idx").write_bytes(b"not an index, but long enough to be one")
    with pytest.raises(DatasetError, match=f"{path} is no indexed dataset: bad header"):
        build_train_dataset(config(path=path), TOKENIZER, 5)


def test_an_empty_training_part_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [10])
    with pytest.raises(DatasetError, match=r"has 1 documents, of which dataset.split leaves 0"):
        build_train_dataset(config(path=path, split="1,99,0"), TOKENIZER, 5)


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"asked for 0 samples; train.train_iters"):
        build_train_dataset(config(mock=True), TOKENIZER, 0)


def test_a_cache_that_cannot_be_made_names_the_setting(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "text", [10])
    (tmp_path / "file").write_text("in the way")
    cfg = config(path=path, path_to_cache=str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"set dataset.path_to_cache to a directory that every rank"):
        build_train_dataset(cfg, TOKENIZER, 5)


def in_group(body: Callable[[], Any]) -> Any:
    """Run `body` on a rank of `run_ranks`, inside a process group."""
    init_ranks(timeout=30)
    return body()


def test_ranks_share_one_dataset_and_split_its_samples(tmp_path: Path) -> None:
    paths = [
        write_dataset(tmp_path / "a", [100, 50]),
        write_dataset(tmp_path / "b", [70, 90], first_token=400),
    ]
    cfg = config(path=paths, weights=[2.0, 1.0], path_to_cache=str(tmp_path / "cache"))

    def read() -> list[list[list[int]]]:
        dataset = build_train_dataset(cfg, TOKENIZER, 40)
        iterator = TrainDataIterator(dataset, 2, dist.get_rank(), dist.get_world_size())
        return [next(iterator)["tokens"].tolist() for _ in range(10)]

    first, second = run_ranks(in_group, 2, read)
    together = [sample for block in zip(first, second, strict=True) for part in block for sample in part]
    assert together == tokens(build_train_dataset(cfg, TOKENIZER, 40), 40)
    # A second start finds the indices, the blend's among them.
    assert run_ranks(in_group, 2, read) == [first, second]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failure_on_the_first_rank_is_raised_on_all(tmp_path: Path) -> None:
    cfg = config(path=str(tmp_path / "missing"))

    def fail() -> str:
        with pytest.raises(DatasetError) as caught:
            build_train_dataset(cfg, TOKENIZER, 40)
        return str(caught.value)

    message = f"dataset.path: {tmp_path}/missing.idx does not exist (the path is given without .idx)"
    assert run_ranks(in_group, 2, fail) == [message, message]


def test_a_failure_on_another_rank_is_raised_on_all_and_names_it(tmp_path: Path) -> None:
    """Rank 1 does not see the directory of the indices, as on a node with a disk of its own."""
    cfg = config(path=write_dataset(tmp_path / "text", [100]))
    build_train_dataset(cfg, TOKENIZER, 40)

    def fail() -> str:
        if dist.get_rank() == 1:
            os.chdir("/")
            cfg.dataset.path = "text"
        with pytest.raises(DatasetError) as caught:
            build_train_dataset(cfg, TOKENIZER, 40)
        return str(caught.value)

    first, second = run_ranks(in_group, 2, fail)
    assert first == second
    assert first.startswith("rank 1: megatron-core could not build the dataset: AssertionError: One or both")
