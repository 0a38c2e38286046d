"""Tokenizers in Hugging Face's `tokenizer.json` format, read by the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.fast import FastTokenizer, tokenizers_library
from bridge.training.tokenizers.files import locate, parse_json, read_file

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

COMPANION_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""Further names under which `transformers` keeps parts of a tokenizer: vocabularies, and the chat template."""

END_OF_DOCUMENT = "<|endoftext|>"
"""The end-of-document token of the tokenizers that this project trains."""

_END_TOKENS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
"""What well-known model families call their end token, for a tokenizer.json that comes alone."""

_KIND = "HuggingFaceTokenizer"
_SETTING = "tokenizer.tokenizer_model"


class HuggingFaceTokenizer(FastTokenizer):
    """A tokenizer read from a directory with a `tokenizer.json`, or from that file itself.

    `tokenizer_config.json` and `special_tokens_map.json` beside it are taken along, and so are the vocabulary
    files of a directory. Where the first two are missing, they are made, so that
    `transformers.AutoTokenizer` opens what `asset_files` returns.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the files under `path`.

        Raises:
            MissingTokenizerLibraryError: the package `tokenizers` is not installed.
            TokenizerError: there is no tokenizer, it cannot be parsed, or it has no end token.
        """
        library = tokenizers_library(_KIND)
        file = locate(path, TOKENIZER_FILE)
        assets = _read_assets(file, with_companions=Path(path).is_dir())
        try:
            tokenizer = library.Tokenizer.from_str(assets[TOKENIZER_FILE].decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for a file it cannot parse
            raise TokenizerError(f"{_SETTING}: {file} is no tokenizer in Hugging Face's format: {error}") from error
        end_token = _find_end_token(tokenizer, file, assets)
        assets.setdefault(CONFIG_FILE, _as_json(tokenizer_config(end_token)))
        assets.setdefault(SPECIAL_TOKENS_FILE, _as_json({"eos_token": end_token}))
        super().__init__(tokenizer, tokenizer.token_to_id(end_token), assets)


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


def _read_assets(file: Path, with_companions: bool) -> dict[str, bytes]:
    """The tokenizer's files that exist; `file`, under the name tokenizer.json, must."""
    expected = f"a {TOKENIZER_FILE}, or a directory that holds one"
    assets = {TOKENIZER_FILE: read_file(_SETTING, file, expected)}
    for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE, *(COMPANION_FILES if with_companions else ())):
        if (file.parent / name).is_file():
            assets[name] = read_file(_SETTING, file.parent / name, expected)
    return assets


def _find_end_token(tokenizer: Any, file: Path, assets: Mapping[str, bytes]) -> str:
    declared = [
        _token_text(parse_json(_SETTING, file.parent / name, assets[name], dict).get("eos_token"))
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE)
        if name in assets
    ]
    for token in (*declared, *_END_TOKENS):
        if token is not None and tokenizer.token_to_id(token) is not None:
            return token
    raise TokenizerError(
        f"{_SETTING}: {file} has no end-of-document token: expected an 'eos_token' in "
        f"{CONFIG_FILE} or {SPECIAL_TOKENS_FILE} beside it, or one of {', '.join(_END_TOKENS)} in its "
        "vocabulary"
    )


def _token_text(value: object) -> str | None:
    """A token of transformers' files: a string, or an object with the string under 'content'."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
