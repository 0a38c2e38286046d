"""SentencePiece models, run by the library of that name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import MissingTokenizerLibraryError, TokenizerError
from bridge.training.tokenizers.files import locate, read_file

MODEL_FILE = "tokenizer.model"

_SETTING = "tokenizer.tokenizer_model"


class SentencePieceTokenizer(MegatronTokenizer):
    """A SentencePiece model with the ids of its file and no others; its end-of-sentence piece ends a document.

    These are the ids of Megatron-LM's GPTSentencePieceTokenizer and of megatron-core's SentencePieceTokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read a model file, or the `tokenizer.model` of a directory.

        Raises:
            MissingTokenizerLibraryError: the package `sentencepiece` is not installed.
            TokenizerError: the file cannot be read, or its model has no end-of-sentence piece.
        """
        library = _library()
        file = locate(path, MODEL_FILE)
        self._model = read_file(_SETTING, file, f"a {MODEL_FILE}, or a directory that holds one")
        self._processor = library.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except Exception as error:  # the library raises RuntimeError or, for other contents, its own types
            raise TokenizerError(f"{_SETTING}: {file} is no SentencePiece model: {error}") from error
        self._eod = int(self._processor.eos_id())
        if self._eod < 0:
            raise TokenizerError(
                f"{_SETTING}: {file} has no end-of-sentence piece to end documents with; train the model with an eos_id"
            )

    @property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def eod(self) -> int:
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        return list(self._processor.encode(text, out_type=int))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control pieces, the end of a document among them, have none."""
        return str(self._processor.decode(list(ids)))

    def asset_files(self) -> dict[str, bytes]:
        """tokenizer.model."""
        return {MODEL_FILE: self._model}


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingTokenizerLibraryError(
            "the SentencePieceTokenizer needs the package 'sentencepiece': pip install \"bridge[sentencepiece]\""
        ) from error
    return sentencepiece
