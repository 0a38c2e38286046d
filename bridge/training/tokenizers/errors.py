"""What the tokenizers raise."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded or trained as asked; the message names the setting that changes it."""


class MissingTokenizerLibraryError(TokenizerError, ImportError):
    """The optional package behind a tokenizer is not installed; the message tells how to install it."""
