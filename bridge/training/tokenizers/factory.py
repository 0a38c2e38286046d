"""From the configuration to a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.bert import BertWordPieceTokenizer
from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.gpt2 import GPT2BPETokenizer
from bridge.training.tokenizers.huggingface import HuggingFaceTokenizer
from bridge.training.tokenizers.null import NullTokenizer
from bridge.training.tokenizers.sentencepiece import SentencePieceTokenizer
from bridge.training.tokenizers.tiktoken import TikTokenizer

if TYPE_CHECKING:
    from bridge.training.config import TokenizerConfig

_FILE_SETTINGS = ("tokenizer_model", "vocab_file", "merge_file")


def build_tokenizer(cfg: TokenizerConfig) -> MegatronTokenizer:
    """The tokenizer that `cfg` describes.

    Raises:
        MissingTokenizerLibraryError: the package behind the kind is not installed.
        TokenizerError: an unknown kind, a missing setting, or files that cannot be used.
    """
    build = _KINDS.get(cfg.tokenizer_type)
    if build is None:
        raise TokenizerError(f"tokenizer.tokenizer_type is {cfg.tokenizer_type!r}; expected one of {', '.join(_KINDS)}")
    return build(cfg)


def with_files_in(cfg: TokenizerConfig, directory: str | os.PathLike[str]) -> TokenizerConfig:
    """`cfg` with all its files in `directory`, the `iter_N/tokenizer` of a checkpoint for one."""
    moved = {name: os.fspath(directory) for name in _FILE_SETTINGS if getattr(cfg, name) is not None}
    return replace(cfg, **moved)  # type: ignore[arg-type]  # a mapping of strings only


def tokenizer_from_checkpoint(checkpoint: str | os.PathLike[str]) -> MegatronTokenizer:
    """The tokenizer that a run was using when it saved `checkpoint`, from nothing but its files.

    Args:
        checkpoint: an `iter_N` directory, saved with `checkpoint.save_tokenizer_assets`.

    Raises:
        TokenizerError: the checkpoint does not say which tokenizer it was, or lacks its files.
        MissingTokenizerLibraryError: as `build_tokenizer`.
    """
    # Imported late: they bring YAML along, and, with the checkpoint's names, torch.
    from bridge.training.checkpointing.contents.run_config import read_run_config
    from bridge.training.checkpointing.layout import RUN_CONFIG, TOKENIZER_DIRECTORY
    from bridge.training.config import ConfigError, TokenizerConfig
    from bridge.training.config.serialization import from_plain

    path = Path(checkpoint)
    section = (read_run_config(path) or {}).get("tokenizer")
    if section is None:
        raise TokenizerError(f"{path} does not say which tokenizer it was saved with: {RUN_CONFIG} has no 'tokenizer'")
    try:
        cfg = from_plain(TokenizerConfig, section, "tokenizer")
    except ConfigError as error:
        raise TokenizerError(f"{path / RUN_CONFIG}: {error}") from error
    return build_tokenizer(with_files_in(cfg, path / TOKENIZER_DIRECTORY))


def _build_huggingface(cfg: TokenizerConfig) -> MegatronTokenizer:
    path = _needed(cfg, "tokenizer_model", "a directory with a tokenizer.json, or that file")
    tokenizer = HuggingFaceTokenizer(path)
    if cfg.vocab_size is not None and cfg.vocab_size != tokenizer.vocab_size:
        raise TokenizerError(
            f"tokenizer.vocab_size is {cfg.vocab_size}, but {cfg.tokenizer_model} has {tokenizer.vocab_size} "
            "ids; leave tokenizer.vocab_size out to take the tokenizer's own size"
        )
    return tokenizer


def _build_sentencepiece(cfg: TokenizerConfig) -> MegatronTokenizer:
    return SentencePieceTokenizer(_needed(cfg, "tokenizer_model", "a tokenizer.model"))


def _build_gpt2(cfg: TokenizerConfig) -> MegatronTokenizer:
    return GPT2BPETokenizer(_needed(cfg, "vocab_file", "a vocab.json"), _needed(cfg, "merge_file", "a merges.txt"))


def _build_bert_lower_case(cfg: TokenizerConfig) -> MegatronTokenizer:
    return BertWordPieceTokenizer(_needed(cfg, "vocab_file", "a vocab.txt"), lower_case=True)


def _build_bert_case(cfg: TokenizerConfig) -> MegatronTokenizer:
    return BertWordPieceTokenizer(_needed(cfg, "vocab_file", "a vocab.txt"), lower_case=False)


def _build_tiktoken(cfg: TokenizerConfig) -> MegatronTokenizer:
    return TikTokenizer(
        _needed(cfg, "tokenizer_model", "a tokenizer.json of tiktoken"),
        pattern=cfg.tiktoken_pattern,
        vocab_size=cfg.vocab_size,
        num_special_tokens=cfg.tiktoken_num_special_tokens,
        special_tokens=cfg.tiktoken_special_tokens,
    )


def _build_null(cfg: TokenizerConfig) -> MegatronTokenizer:
    if cfg.vocab_size is None:
        raise TokenizerError("tokenizer.vocab_size is not set; the NullTokenizer needs it")
    return NullTokenizer(cfg.vocab_size)


def _needed(cfg: TokenizerConfig, field: str, what: str) -> str:
    value: str | None = getattr(cfg, field)
    if value is None:
        raise TokenizerError(f"tokenizer.{field} is not set; the {cfg.tokenizer_type} needs {what}")
    return value


_KINDS: dict[str, Callable[[TokenizerConfig], MegatronTokenizer]] = {
    "HuggingFaceTokenizer": _build_huggingface,
    "SentencePieceTokenizer": _build_sentencepiece,
    "GPT2BPETokenizer": _build_gpt2,
    "BertWordPieceLowerCase": _build_bert_lower_case,
    "BertWordPieceCase": _build_bert_case,
    "TikTokenizer": _build_tiktoken,
    "NullTokenizer": _build_null,
}
