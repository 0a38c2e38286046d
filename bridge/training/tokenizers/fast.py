"""What the kinds of tokenizer that the `tokenizers` library runs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import MissingTokenizerLibraryError


def tokenizers_library(kind: str) -> ModuleType:
    """The `tokenizers` package, needed by tokenizers of `kind`.

    Raises:
        MissingTokenizerLibraryError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise MissingTokenizerLibraryError(
            f"the {kind} needs the package 'tokenizers': pip install \"bridge[data]\""
        ) from error
    return tokenizers


class FastTokenizer(MegatronTokenizer):
    """A tokenizer that the `tokenizers` library runs, with the files that it was built from."""

    def __init__(self, tokenizer: Any, eod: int, assets: dict[str, bytes]) -> None:
        """Args:
        tokenizer: a `tokenizers.Tokenizer`. Truncation and padding are switched off: documents are never cut.
        eod: id of the token that ends a document.
        assets: file name to content.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._eod = eod
        self._assets = assets
        # Ids may have gaps, so the number of entries would be too small for an embedding.
        self._vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eod(self) -> int:
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def asset_files(self) -> dict[str, bytes]:
        return dict(self._assets)
