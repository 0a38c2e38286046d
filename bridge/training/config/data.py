"""What is trained on: the dataset, and the tokenizer that it was made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class DatasetConfig:
    """Megatron's indexed datasets, or synthetic data."""

    path: str | list[str] | None = None
    """Path of an indexed dataset without `.bin` or `.idx`, or a list of them to blend."""

    weights: list[float] | None = None
    """Share of each dataset in a blend; None blends by size."""

    mock: bool = False
    """Whether to train on synthetic data, for benchmarks."""

    split: str = "99,1,0"
    """Relative sizes of the training, validation and test parts."""

    seed: int = 1234
    """Seed of the order of samples."""

    path_to_cache: str | None = None
    """Directory of the sample indices; None is a directory beside the dataset."""

    num_workers: int = 0
    """Processes that load data on each rank; 0 loads in the training process."""

    reset_position_ids: bool = False
    """Whether positions count from the start of a document instead of the sequence."""

    reset_attention_mask: bool = False
    """Whether attention stops at the boundary of a document."""

    eod_mask_loss: bool = False
    """Whether the end-of-document token is left out of the loss."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer whose assets travel with a checkpoint."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """`HuggingFaceTokenizer` reads a `tokenizer.json`; `NullTokenizer` only has a size."""

    tokenizer_model: str | None = None
    """Directory that holds `tokenizer.json`, or that file itself."""

    vocab_size: int | None = None
    """Tokens of the NullTokenizer."""
