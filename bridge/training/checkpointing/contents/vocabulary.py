"""The size of the vocabulary, which the embedding's rows alone do not tell: they are padded.

megatron-core loads an embedding of another height without a word, because padding depends on the tensor-parallel
size: rows that the checkpoint lacks become zeros, and rows that the model lacks are dropped.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = "vocabulary_size"
"""Key in the content metadata."""


def vocabulary_size(cfg: Any, tokenizer: Any | None) -> int | None:
    """Ids that the model has rows for, before padding: `model.vocab_size`, else the tokenizer's; None if unknown."""
    size = getattr(cfg.model, "vocab_size", None) or getattr(tokenizer, "vocab_size", None)
    return size if isinstance(size, int) else None
