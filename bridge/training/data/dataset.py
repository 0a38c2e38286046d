"""The training dataset: megatron-core's GPT datasets over indexed text, or mock data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split

from bridge.training.data.agreement import on_every_rank, on_first_rank
from bridge.training.data.blend import Blend, blend_from_config
from bridge.training.data.errors import DatasetError
from bridge.training.data.index_cache import cached_indices
from bridge.training.tokenizers.base import MegatronTokenizer

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer


class _DatasetTokenizer:
    """The little of a tokenizer that megatron-core's datasets read."""

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod
        self.unique_identifiers = {"vocab_size": self.vocab_size, "eod": self.eod}


def build_train_dataset(cfg: ConfigContainer, tokenizer: MegatronTokenizer, num_samples: int) -> Any:
    """Build the dataset that training draws its samples from.

    Call it on every rank of the default process group, or without one. Rank 0 builds megatron-core's
    document, sample and shuffle indices, which every rank then maps from a directory that all of them
    see: `dataset.path_to_cache`, by default beside the (first) dataset. They are published whole, and
    named by everything that they depend on, the state of the .idx files included, so neither a killed run
    nor changed data leaves indices that are wrong.

    Args:
        cfg: the sections dataset and model (for `seq_length`) are read.
        tokenizer: for the size of the vocabulary and the end-of-document id.
        num_samples: samples that training will consume, `train_iters * global_batch_size`; the data is
            repeated in as many epochs as that takes.

    Returns:
        A megatron-core GPTDataset, MockGPTDataset or BlendedDataset with at least `num_samples` samples.

    Raises:
        DatasetError: on every rank alike, when a setting, a file, or the building itself is at fault.
    """
    blend = None if cfg.dataset.mock else blend_from_config(cfg.dataset)
    if num_samples < 1:
        raise DatasetError(
            f"the training data was asked for {num_samples} samples; train.train_iters * "
            "train.global_batch_size must be at least 1"
        )
    config = _megatron_config(cfg, tokenizer, blend)
    if blend is not None:
        config.path_to_cache = on_first_rank(
            lambda: str(
                cached_indices(
                    config,
                    blend,
                    cfg.dataset.path_to_cache,
                    num_samples,
                    build=lambda building: _build(building, num_samples),
                )
            )
        )
    dataset = on_every_rank(lambda: _build(config, num_samples))
    if len(dataset) < num_samples:
        raise DatasetError(
            f"the datasets hold {len(dataset)} samples and training needs {num_samples}: a blend without "
            "dataset.weights is drawn once; set dataset.weights to repeat it, or lower train.train_iters"
        )
    return dataset


def _megatron_config(cfg: ConfigContainer, tokenizer: MegatronTokenizer, blend: Blend | None) -> Any:
    try:
        config = GPTDatasetConfig(
            random_seed=cfg.dataset.seed,
            sequence_length=cfg.model.seq_length,
            blend=None if blend is None else (list(blend.paths), blend.weights and list(blend.weights)),
            split=None if blend is None else cfg.dataset.split,
            tokenizer=_DatasetTokenizer(tokenizer),
            reset_position_ids=cfg.dataset.reset_position_ids,
            reset_attention_mask=cfg.dataset.reset_attention_mask,
            eod_mask_loss=cfg.dataset.eod_mask_loss,
            # Attention is causal anyway; a mask is worth its memory only where documents are kept apart.
            create_attention_mask=cfg.dataset.reset_attention_mask,
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise _split_error(cfg.dataset.split) from error
    train_part = config.split_matrix[0]
    if train_part is None or not train_part[1] > 0:
        raise _split_error(cfg.dataset.split)
    # The other splits are not built here, and megatron-core never comes back from building an empty one.
    config.split_matrix = [train_part, None, None]
    return config


def _split_error(split: object) -> DatasetError:
    return DatasetError(
        f"dataset.split is {split!r}; expected up to three numbers for training, validation and test, such "
        "as '99,1,0', the first above zero"
    )


class _LocalBuilder(BlendedMegatronDatasetBuilder):  # type: ignore[misc]  # megatron-core is untyped
    """megatron-core's builder without its barriers, in which a failing rank leaves the others waiting."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            # With a cache it asks for its rank, which only exists in a process group.
            *args_before, config = args
            config = copy.copy(config)
            config.path_to_cache = None
            return cls(*args_before, config)
        return cls(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[Any]
    ) -> list[list[Any]]:
        per_prefix = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*per_prefix, strict=True)]


def _build(config: Any, num_samples: int) -> Any:
    """Build on this rank alone; indices come from `config.path_to_cache` where they are there."""
    kind = MockGPTDataset if config.mock else GPTDataset
    builder = _LocalBuilder(kind, [num_samples, 0, 0], lambda: True, config)
    return builder.build()[Split.train.value]
