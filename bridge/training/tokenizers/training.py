"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.fast import tokenizers_library
from bridge.training.tokenizers.huggingface import (
    END_OF_DOCUMENT,
    TOKENIZER_FILE,
    HuggingFaceTokenizer,
)

MIN_VOCAB_SIZE = 257
"""One id for each byte and one for the end-of-document token."""


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: str | os.PathLike[str]) -> HuggingFaceTokenizer:
    """Train a byte-level BPE with the end-of-document token `<|endoftext|>` and write it to `out_dir`.

    Every text can be encoded and comes back exactly: the 256 bytes are in the vocabulary. The same
    texts in the same order give the same files. Little text may give fewer than `vocab_size` ids.

    Args:
        texts: documents; read once.
        vocab_size: largest number of ids, the end-of-document token included.
        out_dir: directory for tokenizer.json, tokenizer_config.json and special_tokens_map.json; made if
            missing.

    Raises:
        MissingTokenizerLibraryError: the package `tokenizers` is not installed.
        TokenizerError: `vocab_size` is less than 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(
            f"the vocabulary size is {vocab_size}; a byte-level BPE needs at least {MIN_VOCAB_SIZE}: "
            "256 bytes and the end-of-document token"
        )
    library = tokenizers_library("HuggingFaceTokenizer")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    trained = HuggingFaceTokenizer(directory / TOKENIZER_FILE)
    for name, content in trained.asset_files().items():
        (directory / name).write_bytes(content)
    return trained
