"""The WordPiece tokenizers of BERT, read from their `vocab.txt` by the `tokenizers` library."""

from __future__ import annotations

import os

from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.fast import FastTokenizer, tokenizers_library
from bridge.training.tokenizers.files import locate, read_file, read_text

VOCAB_FILE = "vocab.txt"

_SETTING = "tokenizer.vocab_file"
_REQUIRED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ADDED = ("[BOS]", "[EOS]")
_END_TOKEN = "[EOS]"


class BertWordPieceTokenizer(FastTokenizer):
    """The tokenizer of BERT: words and pieces of words, one on each line of `vocab.txt`.

    As in Megatron-LM, `[BOS]` and `[EOS]` get the ids after the file's unless it has them, and special tokens
    are not recognised where they stand in a text. `[EOS]` ends a document.
    """

    def __init__(self, vocab_file: str | os.PathLike[str], *, lower_case: bool) -> None:
        """Read the file, or the `vocab.txt` of a directory.

        Args:
            vocab_file: one token a line, in the order of their ids.
            lower_case: whether text is put into lower case, without accents, before it is looked up.

        Raises:
            MissingTokenizerLibraryError: the package `tokenizers` is not installed.
            TokenizerError: the file cannot be read, holds a token twice, or lacks a special token.
        """
        library = tokenizers_library("BertWordPieceTokenizer")
        path = locate(vocab_file, VOCAB_FILE)
        content = read_file(_SETTING, path, f"a {VOCAB_FILE}")
        # Not splitlines: a token may be a character that it takes for the end of a line.
        lines = read_text(_SETTING, path, content).removesuffix("\n").split("\n")
        tokens = [line.removesuffix("\r") for line in lines]
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
            raise TokenizerError(f"{_SETTING}: {path} holds {twice!r} on more than one line")
        absent = [token for token in _REQUIRED if token not in vocab]
        if absent:
            raise TokenizerError(f"{_SETTING}: {path} lacks {', '.join(absent)}, which the vocabulary of BERT holds")
        for token in _ADDED:
            vocab.setdefault(token, len(vocab))
        tokenizer = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lower_case)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece()
        super().__init__(tokenizer, vocab[_END_TOKEN], {VOCAB_FILE: content})
