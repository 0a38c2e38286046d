"""Tokenizers of the Tekken family: byte-level BPE run by the `tiktoken` library."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import MissingTokenizerLibraryError, TokenizerError
from bridge.training.tokenizers.files import locate, parse_json, read_file

VOCAB_FILE = "tokenizer.json"

PATTERNS: Mapping[str, str] = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How a text is split before bytes are merged, by the names that Megatron-LM gives the two patterns."""

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
MAX_VOCAB_SIZE = 2**17
"""Ids that are used of a larger file if no size is set."""

_END_TOKEN = "</s>"
_SETTING = "tokenizer.tokenizer_model"


class TikTokenizer(MegatronTokenizer):
    """A byte-level BPE whose file lists byte sequences by rank, run by tiktoken.

    The file is a JSON list of `{"rank": 0, "token_bytes": "<base64>", "token_str": ...}`, the 256 bytes first.
    The special tokens have the first `num_special_tokens` ids, names without a meaning being `<SPECIAL_7>` and
    so on; rank r has the id `num_special_tokens + r`. `</s>` ends a document. Ids and texts are those of
    megatron-core's TikTokenTokenizer; special tokens in a text are recognised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        pattern: str = "v2",
        vocab_size: int | None = None,
        num_special_tokens: int = 1000,
        special_tokens: Sequence[str] | None = None,
    ) -> None:
        """Read the file, or the `tokenizer.json` of a directory.

        Args:
            path: the file or its directory.
            pattern: a name from `PATTERNS`.
            vocab_size: ids in all, special ones included; ranks beyond are left out. None is all of them, at
                most `MAX_VOCAB_SIZE`.
            num_special_tokens: ids for special tokens.
            special_tokens: their names, from id 0 on; None is `SPECIAL_TOKENS`.

        Raises:
            MissingTokenizerLibraryError: the package `tiktoken` is not installed.
            TokenizerError: the file cannot be read, or a setting does not fit it.
        """
        library = _library()
        file = locate(path, VOCAB_FILE)
        self._content = read_file(_SETTING, file, f"a {VOCAB_FILE} of tiktoken, or a directory that holds one")
        entries = parse_json(_SETTING, file, self._content, list)
        names = _special_names(SPECIAL_TOKENS if special_tokens is None else special_tokens, num_special_tokens)
        available = len(entries) + num_special_tokens
        self._vocab_size = min(available, MAX_VOCAB_SIZE) if vocab_size is None else vocab_size
        if not num_special_tokens + 256 <= self._vocab_size <= available:
            raise TokenizerError(
                f"tokenizer.vocab_size is {self._vocab_size}; expected {num_special_tokens + 256} (special tokens and "
                f"bytes) to {available}: {file} has {len(entries)} entries, and "
                f"tokenizer.tiktoken_num_special_tokens is {num_special_tokens}"
            )
        if pattern not in PATTERNS:
            raise TokenizerError(f"tokenizer.tiktoken_pattern is {pattern!r}; expected one of {', '.join(PATTERNS)}")
        ranks = _parse_ranks(file, entries[: self._vocab_size - num_special_tokens])
        self._eod = names[_END_TOKEN]
        self._encoding = library.Encoding(
            name=file.parent.name,
            pat_str=PATTERNS[pattern],
            mergeable_ranks={token: rank + num_special_tokens for token, rank in ranks.items()},
            special_tokens=names,
        )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eod(self) -> int:
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        return list(self._encoding.encode(text, allowed_special="all"))

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._encoding.decode(list(ids)))

    def asset_files(self) -> dict[str, bytes]:
        """tokenizer.json; the pattern and the special tokens stand in the run's configuration."""
        return {VOCAB_FILE: self._content}


def _special_names(given: Sequence[str], count: int) -> dict[str, int]:
    """Names of the special tokens with their ids: those given, then `<SPECIAL_i>` up to `count`."""
    if len(given) > count:
        raise TokenizerError(
            f"tokenizer.tiktoken_num_special_tokens is {count}, too few for {len(given)} special tokens; "
            "raise it, or shorten tokenizer.tiktoken_special_tokens"
        )
    names = {name: index for index, name in enumerate([*given, *(f"<SPECIAL_{i}>" for i in range(len(given), count))])}
    if len(names) != count:
        raise TokenizerError("tokenizer.tiktoken_special_tokens names a token twice; each may occur once")
    if _END_TOKEN not in names:
        raise TokenizerError(f"tokenizer.tiktoken_special_tokens lacks {_END_TOKEN}, which ends a document; add it")
    return names


def _parse_ranks(file: Path, entries: Sequence[Any]) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for index, entry in enumerate(entries):
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
            is_right = entry["rank"] == index and token not in ranks and (index >= 256 or token == bytes([index]))
        except (TypeError, KeyError, ValueError, binascii.Error):
            is_right = False
        if not is_right:
            raise TokenizerError(
                f"{_SETTING}: entry {index} of {file} is not right; expected a new 'token_bytes' in base64 with the "
                f"'rank' {index}, the first 256 being the bytes in order; found {str(entry)[:80]}"
            )
        ranks[token] = index
    return ranks


def _library() -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise MissingTokenizerLibraryError(
            "the TikTokenizer needs the package 'tiktoken': pip install \"bridge[tiktoken]\""
        ) from error
    return tiktoken
