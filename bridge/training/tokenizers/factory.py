"""From the configuration to a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.huggingface import HuggingFaceTokenizer
from bridge.training.tokenizers.null import NullTokenizer

if TYPE_CHECKING:
    from bridge.training.config import TokenizerConfig


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


def _build_huggingface(cfg: TokenizerConfig) -> MegatronTokenizer:
    if cfg.tokenizer_model is None:
        raise TokenizerError(
            "tokenizer.tokenizer_model is not set; the HuggingFaceTokenizer needs a directory with a "
            "tokenizer.json, or that file"
        )
    tokenizer = HuggingFaceTokenizer(cfg.tokenizer_model)
    if cfg.vocab_size is not None and cfg.vocab_size != tokenizer.vocab_size:
        raise TokenizerError(
            f"tokenizer.vocab_size is {cfg.vocab_size}, but {cfg.tokenizer_model} has {tokenizer.vocab_size} "
            "ids; leave tokenizer.vocab_size out to take the tokenizer's own size"
        )
    return tokenizer


def _build_null(cfg: TokenizerConfig) -> MegatronTokenizer:
    if cfg.vocab_size is None:
        raise TokenizerError("tokenizer.vocab_size is not set; the NullTokenizer needs it")
    return NullTokenizer(cfg.vocab_size)


_KINDS: dict[str, Callable[[TokenizerConfig], MegatronTokenizer]] = {
    "HuggingFaceTokenizer": _build_huggingface,
    "NullTokenizer": _build_null,
}
