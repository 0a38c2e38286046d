"""The byte-level BPE of GPT-2, read from its two files by the `tokenizers` library."""

from __future__ import annotations

import os
from pathlib import Path

from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.fast import FastTokenizer, tokenizers_library
from bridge.training.tokenizers.files import locate, parse_json, read_file, read_text

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

_KIND = "GPT2BPETokenizer"
_VOCAB_SETTING = "tokenizer.vocab_file"
_MERGES_SETTING = "tokenizer.merge_file"
_END_TOKEN = "<|endoftext|>"


class GPT2BPETokenizer(FastTokenizer):
    """The tokenizer of GPT-2: `vocab.json` gives tokens their ids, `merges.txt` says how they are built.

    As in Megatron-LM, `<|endoftext|>` ends a document, and is not recognised where it stands in a text.
    """

    def __init__(self, vocab_file: str | os.PathLike[str], merge_file: str | os.PathLike[str]) -> None:
        """Read the two files; each may be named by the directory that holds it.

        Raises:
            MissingTokenizerLibraryError: the package `tokenizers` is not installed.
            TokenizerError: a file cannot be read, or the two make no tokenizer.
        """
        library = tokenizers_library(_KIND)
        vocab_path, merges_path = locate(vocab_file, VOCAB_FILE), locate(merge_file, MERGES_FILE)
        assets = {
            VOCAB_FILE: read_file(_VOCAB_SETTING, vocab_path, f"a {VOCAB_FILE}"),
            MERGES_FILE: read_file(_MERGES_SETTING, merges_path, f"a {MERGES_FILE}"),
        }
        vocab = parse_json(_VOCAB_SETTING, vocab_path, assets[VOCAB_FILE], dict)
        absent = sorted({_END_TOKEN, *library.pre_tokenizers.ByteLevel.alphabet()} - vocab.keys())
        if absent:
            raise TokenizerError(
                f"{_VOCAB_SETTING}: {vocab_path} lacks {', '.join(map(repr, absent[:5]))}; the vocabulary of a "
                f"{_KIND} holds every byte and {_END_TOKEN}"
            )
        merges = _parse_merges(merges_path, read_text(_MERGES_SETTING, merges_path, assets[MERGES_FILE]))
        try:
            tokenizer = library.Tokenizer(library.models.BPE(vocab, merges))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{_MERGES_SETTING}: {merges_path} does not fit {vocab_path}: {error}") from error
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        super().__init__(tokenizer, vocab[_END_TOKEN], assets)


def _parse_merges(path: Path, text: str) -> list[tuple[str, str]]:
    """The pairs of a merges.txt: two words a line, after a first line `#version: ...` that may be missing."""
    merges = []
    # Not splitlines: a token may hold characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"{_MERGES_SETTING}: line {number} of {path} is not a pair of tokens: {line[:60]!r}")
        merges.append((pair[0], pair[1]))
    return merges
