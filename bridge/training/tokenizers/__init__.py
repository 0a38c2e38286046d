"""Tokenizers: text to ids and back, and the files that a checkpoint carries along."""

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import MissingTokenizerLibraryError, TokenizerError
from bridge.training.tokenizers.factory import build_tokenizer
from bridge.training.tokenizers.huggingface import HuggingFaceTokenizer
from bridge.training.tokenizers.null import NullTokenizer
from bridge.training.tokenizers.training import train_bpe_tokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "MegatronTokenizer",
    "MissingTokenizerLibraryError",
    "NullTokenizer",
    "TokenizerError",
    "build_tokenizer",
    "train_bpe_tokenizer",
]
