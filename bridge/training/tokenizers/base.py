"""What every tokenizer offers to the data pipeline, the model setup and the checkpoint layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class MegatronTokenizer(ABC):
    """Turns text into token ids and back, and knows the files that it is made of.

    A kind of tokenizer is one module with one subclass, listed in `factory.py`.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: every id lies in `range(vocab_size)`."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id of the token that ends a document."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added before or after."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""

    @abstractmethod
    def asset_files(self) -> dict[str, bytes]:
        """The files that make a checkpoint self-contained: file name to content, no directories.

        The content is what this tokenizer was built from, not what its source may hold by now.
        """

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, in order; a kind that can use several cores overrides it."""
        return [self.tokenize(text) for text in texts]
