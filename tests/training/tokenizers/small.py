"""A small tokenizer of each kind, trained or built with the library that the kind belongs to."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tokenizers

from bridge.training.config import TokenizerConfig
from bridge.training.tokenizers import train_bpe_tokenizer

TEXTS = [
    "the cat sat on the mat; the cat sat\r\n",
    "def f(x):\n    return x + 1\n",
    "größer, ≥ 1 — 猫  Naïve CAFÉ",
    "The quick brown fox jumps over the lazy dog 0123456789",
] * 4


def huggingface(directory: Path) -> TokenizerConfig:
    train_bpe_tokenizer(TEXTS, 300, directory)
    return TokenizerConfig(tokenizer_model=str(directory))


def sentencepiece_model(directory: Path) -> TokenizerConfig:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "some-name.model").write_bytes(model.getvalue())
    return TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(directory / "some-name.model"))


def gpt2(directory: Path) -> TokenizerConfig:
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(directory), "small")
    return TokenizerConfig(
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=str(directory / "small-vocab.json"),
        merge_file=str(directory / "small-merges.txt"),
    )


def bert(directory: Path, lower_case: bool) -> TokenizerConfig:
    trained = tokenizers.BertWordPieceTokenizer(lowercase=lower_case)
    trained.train_from_iterator(TEXTS, vocab_size=200, show_progress=False)
    trained.save_model(str(directory), "small")
    return TokenizerConfig(
        tokenizer_type="BertWordPieceLowerCase" if lower_case else "BertWordPieceCase",
        vocab_file=str(directory / "small-vocab.txt"),
    )


def tiktoken_ranks(directory: Path, merges: tuple[str, ...] = (" t", "he", " the", "at", " cat", "ca")) -> Path:
    tokens = [bytes([value]) for value in range(256)] + [merge.encode() for merge in merges]
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate(tokens)
    ]
    file = directory / "small.json"
    file.write_text(json.dumps(entries))
    return file


def tiktoken_file(directory: Path) -> TokenizerConfig:
    return TokenizerConfig(
        tokenizer_type="TikTokenizer",
        tokenizer_model=str(tiktoken_ranks(directory)),
        tiktoken_pattern="v1",
        tiktoken_num_special_tokens=20,
    )


KINDS: dict[str, Callable[[Path], TokenizerConfig]] = {
    "HuggingFaceTokenizer": huggingface,
    "SentencePieceTokenizer": sentencepiece_model,
    "GPT2BPETokenizer": gpt2,
    "BertWordPieceLowerCase": lambda directory: bert(directory, lower_case=True),
    "BertWordPieceCase": lambda directory: bert(directory, lower_case=False),
    "TikTokenizer": tiktoken_file,
    "NullTokenizer": lambda _: TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
}
"""Kind → makes its files in a directory and returns the configuration that reads them."""

FILES: dict[str, set[str]] = {
    "HuggingFaceTokenizer": {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"},
    "SentencePieceTokenizer": {"tokenizer.model"},
    "GPT2BPETokenizer": {"vocab.json", "merges.txt"},
    "BertWordPieceLowerCase": {"vocab.txt"},
    "BertWordPieceCase": {"vocab.txt"},
    "TikTokenizer": {"tokenizer.json"},
    "NullTokenizer": set(),
}
"""Kind → the files that a checkpoint holds of it."""
