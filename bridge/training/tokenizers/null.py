"""A tokenizer of no language: text is already a row of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import TokenizerError


class NullTokenizer(MegatronTokenizer):
    """Ids written as decimal numbers between blanks, for mock data, tests and benchmarks.

    As in megatron-core, the end-of-document id comes on top of the given size:
    `NullTokenizer(100)` has the ids 0..99, `eod` 100 and a `vocab_size` of 101.
    """

    def __init__(self, vocab_size: int) -> None:
        """Raises:
        TokenizerError: `vocab_size` is less than 1.
        """
        if vocab_size < 1:
            raise TokenizerError(f"tokenizer.vocab_size is {vocab_size}; the NullTokenizer needs at least 1")
        self._eod = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._eod + 1

    @property
    def eod(self) -> int:
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        """The numbers in `text`.

        Raises:
            TokenizerError: a word is no number, or a number is no id.
        """
        ids = []
        for word in text.split():
            if not word.isdecimal() or int(word) > self._eod:
                raise TokenizerError(f"the NullTokenizer expects numbers from 0 to {self._eod}, found {word!r}")
            ids.append(int(word))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def asset_files(self) -> dict[str, bytes]:
        """Nothing: the size stands in the run's configuration."""
        return {}
