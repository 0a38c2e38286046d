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
    """The tokenizer whose assets travel with a checkpoint.

    Each kind has its own files and settings, and a setting of another kind is refused. Where a file is
    expected, a directory that holds it under its usual name will do: `iter_N/tokenizer` of a checkpoint is one.
    """

    tokenizer_type: Literal[
        "HuggingFaceTokenizer",
        "SentencePieceTokenizer",
        "GPT2BPETokenizer",
        "BertWordPieceLowerCase",
        "BertWordPieceCase",
        "TikTokenizer",
        "NullTokenizer",
    ] = "HuggingFaceTokenizer"
    """The kind, by the names that Megatron-LM has for them."""

    tokenizer_model: str | None = None
    """`tokenizer.json` of Hugging Face or of tiktoken, or the `tokenizer.model` of SentencePiece."""

    vocab_file: str | None = None
    """`vocab.json` of the GPT-2 tokenizer, or `vocab.txt` of the BERT tokenizers."""

    merge_file: str | None = None
    """`merges.txt` of the GPT-2 tokenizer."""

    vocab_size: int | None = None
    """Tokens of the NullTokenizer. Also how many ids of a TikTokenizer are used; None uses up to 131072."""

    tiktoken_pattern: Literal["v1", "v2"] = "v2"
    """How a TikTokenizer splits text before it merges bytes: as the first or the second Tekken pattern does."""

    tiktoken_num_special_tokens: int = 1000
    """Ids that a TikTokenizer sets aside, below those of its file, for special tokens."""

    tiktoken_special_tokens: list[str] | None = None
    """Special tokens of a TikTokenizer, from id 0 on; None is `<unk> <s> </s> <mask> <pad> <cls> <sep>`."""
