"""Tokenizers in Hugging Face's `tokenizer.json` format, read by the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import MissingTokenizerLibraryError, TokenizerError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

END_OF_DOCUMENT = "<|endoftext|>"
"""The end-of-document token of the tokenizers that this project trains."""

_END_TOKENS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
"""What well-known model families call their end token, for a tokenizer.json that comes alone."""


def tokenizers_library() -> ModuleType:
    """The `tokenizers` package.

    Raises:
        MissingTokenizerLibraryError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise MissingTokenizerLibraryError(
            "the HuggingFaceTokenizer needs the package 'tokenizers': pip install \"bridge[data]\""
        ) from error
    return tokenizers


class HuggingFaceTokenizer(MegatronTokenizer):
    """A tokenizer read from a directory with a `tokenizer.json`, or from that file itself.

    `tokenizer_config.json` and `special_tokens_map.json` beside it are taken along; where they are
    missing, `asset_files` makes them, so that `transformers.AutoTokenizer` opens what it returns.
    Truncation and padding that the file may ask for are switched off: documents are never cut.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the files under `path`.

        Raises:
            MissingTokenizerLibraryError: the package `tokenizers` is not installed.
            TokenizerError: there is no tokenizer, it cannot be parsed, or it has no end token.
        """
        library = tokenizers_library()
        source = Path(path)
        file = source / TOKENIZER_FILE if source.is_dir() else source
        self._assets = _read_assets(file)
        try:
            self._tokenizer = library.Tokenizer.from_str(self._assets[TOKENIZER_FILE].decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for a file it cannot parse
            raise TokenizerError(
                f"tokenizer.tokenizer_model: {file} is no tokenizer in Hugging Face's format: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps, so the number of entries would be too small for an embedding.
        self._vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        end_token = self._find_end_token(file)
        self._eod: int = self._tokenizer.token_to_id(end_token)
        self._complete_assets(end_token)

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
        """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        return dict(self._assets)

    def _find_end_token(self, file: Path) -> str:
        declared = [
            _token_text(_parse(self._assets[name], file.parent / name).get("eos_token"))
            for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE)
            if name in self._assets
        ]
        for token in (*declared, *_END_TOKENS):
            if token is not None and self._tokenizer.token_to_id(token) is not None:
                return token
        raise TokenizerError(
            f"tokenizer.tokenizer_model: {file} has no end-of-document token: expected an 'eos_token' in "
            f"{CONFIG_FILE} or {SPECIAL_TOKENS_FILE} beside it, or one of {', '.join(_END_TOKENS)} in its "
            "vocabulary"
        )

    def _complete_assets(self, end_token: str) -> None:
        self._assets.setdefault(CONFIG_FILE, _as_json(tokenizer_config(end_token)))
        self._assets.setdefault(SPECIAL_TOKENS_FILE, _as_json({"eos_token": end_token}))


def tokenizer_config(end_token: str) -> dict[str, Any]:
    """The least that `transformers` needs beside a tokenizer.json to open it as a fast tokenizer."""
    return {
        "clean_up_tokenization_spaces": False,
        "eos_token": end_token,
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _read_assets(file: Path) -> dict[str, bytes]:
    """The tokenizer's files that exist; `file`, under the name tokenizer.json, must."""
    try:
        assets = {TOKENIZER_FILE: file.read_bytes()}
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
            if (file.parent / name).is_file():
                assets[name] = (file.parent / name).read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"tokenizer.tokenizer_model: expected a {TOKENIZER_FILE}, or a directory that holds one; "
            f"cannot read {error.filename}: {error.strerror}"
        ) from error
    return assets


def _parse(content: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise TokenizerError(f"tokenizer.tokenizer_model: {file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"tokenizer.tokenizer_model: {file} holds {type(value).__name__}, not an object")
    return value


def _token_text(value: object) -> str | None:
    """A token of transformers' files: a string, or an object with the string under 'content'."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
