"""Tokenizers: text to ids and back, and the files that a checkpoint carries along."""

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.bert import BertWordPieceTokenizer
from bridge.training.tokenizers.errors import MissingTokenizerLibraryError, TokenizerError
from bridge.training.tokenizers.factory import build_tokenizer, tokenizer_from_checkpoint
from bridge.training.tokenizers.gpt2 import GPT2BPETokenizer
from bridge.training.tokenizers.huggingface import HuggingFaceTokenizer
from bridge.training.tokenizers.null import NullTokenizer
from bridge.training.tokenizers.sentencepiece import SentencePieceTokenizer
from bridge.training.tokenizers.tiktoken import TikTokenizer
from bridge.training.tokenizers.training import train_bpe_tokenizer

__all__ = [
    "BertWordPieceTokenizer",
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "MegatronTokenizer",
    "MissingTokenizerLibraryError",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "TokenizerError",
    "build_tokenizer",
    "tokenizer_from_checkpoint",
    "train_bpe_tokenizer",
]
