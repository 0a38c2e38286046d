"""Every kind of tokenizer, built by its own library, against that library or megatron-core used directly."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer as McoreSentencePiece
from megatron.core.tokenizers.text.libraries import TikTokenTokenizer as McoreTikToken

from bridge.training.config import TokenizerConfig
from bridge.training.config.rules import tokenizer_rules
from bridge.training.tokenizers import (
    MegatronTokenizer,
    MissingTokenizerLibraryError,
    TokenizerError,
    build_tokenizer,
)
from bridge.training.tokenizers.factory import with_files_in
from tests.training.tokenizers.small import FILES, KINDS, TEXTS, tiktoken_ranks

REAL_KINDS = [kind for kind in KINDS if kind != "NullTokenizer"]
OTHER_TEXTS = ["", " ", "the mat sat", "A cat's café\n\n\tx  =  1", "</s><|endoftext|>[SEP]", "naïve 猫 \u2028 e\u0301"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def built(configs: dict[str, TokenizerConfig]) -> dict[str, MegatronTokenizer]:
    return {kind: build_tokenizer(cfg) for kind, cfg in configs.items()}


def test_every_documented_kind_is_here() -> None:
    assert list(KINDS) == list(get_args(get_type_hints(TokenizerConfig)["tokenizer_type"]))
    assert KINDS.keys() == FILES.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_breaks_no_rule(configs: dict[str, TokenizerConfig], kind: str) -> None:
    assert [str(violation) for violation in tokenizer_rules(configs[kind])] == []


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_ids_lie_below_the_size_and_the_end_of_a_document_is_one_of_them(
    built: dict[str, MegatronTokenizer], kind: str
) -> None:
    tokenizer = built[kind]
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.tokenize_batch(TEXTS) == [tokenizer.tokenize(text) for text in TEXTS]


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "GPT2BPETokenizer", "TikTokenizer"])
def test_byte_level_kinds_give_any_text_back_exactly(built: dict[str, MegatronTokenizer], kind: str) -> None:
    tokenizer = built[kind]

    @given(st.text())
    def check(text: str) -> None:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_of_the_kind(built: dict[str, MegatronTokenizer], kind: str) -> None:
    assert set(built[kind].asset_files()) == FILES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_enough_to_build_an_equal_tokenizer(
    configs: dict[str, TokenizerConfig], built: dict[str, MegatronTokenizer], kind: str, tmp_path: Path
) -> None:
    for name, content in built[kind].asset_files().items():
        (tmp_path / name).write_bytes(content)
    again = build_tokenizer(with_files_in(configs[kind], tmp_path))
    assert_equal(again, built[kind])


def assert_equal(one: MegatronTokenizer, other: MegatronTokenizer) -> None:
    assert type(one) is type(other)
    assert one.asset_files() == other.asset_files()
    assert (one.vocab_size, one.eod) == (other.vocab_size, other.eod)
    texts = ["1 2 3"] if type(one).__name__ == "NullTokenizer" else [*TEXTS, *OTHER_TEXTS]
    for text in texts:
        assert one.tokenize(text) == other.tokenize(text)
        assert one.detokenize(one.tokenize(text)) == other.detokenize(one.tokenize(text))


def test_gpt2_agrees_with_the_library(configs: dict[str, TokenizerConfig], built: dict[str, MegatronTokenizer]) -> None:
    cfg = configs["GPT2BPETokenizer"]
    peer = tokenizers.ByteLevelBPETokenizer(cfg.vocab_file, cfg.merge_file)
    for text in [*TEXTS, *OTHER_TEXTS]:
        assert built["GPT2BPETokenizer"].tokenize(text) == peer.encode(text).ids
    assert built["GPT2BPETokenizer"].eod == peer.token_to_id("<|endoftext|>")
    assert built["GPT2BPETokenizer"].vocab_size == peer.get_vocab_size()


@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_bert_agrees_with_the_library(
    configs: dict[str, TokenizerConfig], built: dict[str, MegatronTokenizer], kind: str
) -> None:
    peer = tokenizers.BertWordPieceTokenizer(configs[kind].vocab_file, lowercase=kind == "BertWordPieceLowerCase")
    tokenizer = built[kind]
    for text in [*TEXTS, *OTHER_TEXTS]:
        if "[SEP]" not in text:  # Megatron-LM's kind does not look for special tokens in a text, this class does
            assert tokenizer.tokenize(text) == peer.encode(text, add_special_tokens=False).ids
    # Megatron-LM appends [BOS] and [EOS].
    assert tokenizer.vocab_size == peer.get_vocab_size() + 2
    assert tokenizer.eod == peer.get_vocab_size() + 1
    assert tokenizer.detokenize([tokenizer.eod]) == "[EOS]"


def test_bert_tells_cases_apart_only_when_asked_to(built: dict[str, MegatronTokenizer]) -> None:
    lower, cased = built["BertWordPieceLowerCase"], built["BertWordPieceCase"]
    assert lower.tokenize("The CAT") == lower.tokenize("the cat")
    assert cased.tokenize("The") != cased.tokenize("the")


def test_sentencepiece_agrees_with_the_library_and_megatron_core(
    configs: dict[str, TokenizerConfig], built: dict[str, MegatronTokenizer]
) -> None:
    path, tokenizer = str(configs["SentencePieceTokenizer"].tokenizer_model), built["SentencePieceTokenizer"]
    peer, mcore = sentencepiece.SentencePieceProcessor(model_file=path), McoreSentencePiece(path)
    for text in [*TEXTS, *OTHER_TEXTS]:
        assert tokenizer.tokenize(text) == peer.encode(text) == mcore.text_to_ids(text)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == peer.decode(peer.encode(text))
    assert tokenizer.vocab_size == peer.vocab_size() == mcore.vocab_size
    assert tokenizer.eod == peer.eos_id() == mcore.eos_id


@pytest.mark.parametrize("pattern", ["v1", "v2"])
@pytest.mark.parametrize("special_tokens", [None, ["<s>", "</s>", "<unk>", "<mask>", "<pad>", "<cls>", "<sep>", "<x>"]])
def test_tiktoken_agrees_with_megatron_core(tmp_path: Path, pattern: str, special_tokens: list[str] | None) -> None:
    file = tiktoken_ranks(tmp_path)
    cfg = TokenizerConfig(
        tokenizer_type="TikTokenizer",
        tokenizer_model=str(file),
        vocab_size=12 + 256 + 4,
        tiktoken_num_special_tokens=12,
        tiktoken_pattern=pattern,  # type: ignore[arg-type]
        tiktoken_special_tokens=special_tokens,
    )
    tokenizer = build_tokenizer(cfg)
    mcore = McoreTikToken(
        str(file), special_tokens=special_tokens, num_special_tokens=12, pattern=pattern, vocab_size=12 + 256 + 4
    )
    for text in [*TEXTS, *OTHER_TEXTS, "<unk>the<SPECIAL_9>"]:
        assert tokenizer.tokenize(text) == mcore.text_to_ids(text)
    assert (tokenizer.vocab_size, tokenizer.eod) == (mcore.vocab_size, mcore.eod)


def test_tiktoken_uses_the_whole_of_a_small_file(tmp_path: Path) -> None:
    cfg = TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_ranks(tmp_path)))
    assert build_tokenizer(cfg).vocab_size == 1000 + 256 + 6


MISSING = [
    ("HuggingFaceTokenizer", "tokenizers", "data"),
    ("GPT2BPETokenizer", "tokenizers", "data"),
    ("BertWordPieceCase", "tokenizers", "data"),
    ("SentencePieceTokenizer", "sentencepiece", "sentencepiece"),
    ("TikTokenizer", "tiktoken", "tiktoken"),
]


@pytest.mark.parametrize(("kind", "library", "extra"), MISSING)
def test_without_its_library_a_kind_says_how_to_install_it(
    configs: dict[str, TokenizerConfig], monkeypatch: pytest.MonkeyPatch, kind: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingTokenizerLibraryError, match=rf"'{library}': pip install \"bridge\[{extra}\]\""):
        build_tokenizer(configs[kind])


SETTINGS = [
    ("HuggingFaceTokenizer", "tokenizer_model"),
    ("SentencePieceTokenizer", "tokenizer_model"),
    ("GPT2BPETokenizer", "vocab_file"),
    ("GPT2BPETokenizer", "merge_file"),
    ("BertWordPieceLowerCase", "vocab_file"),
    ("BertWordPieceCase", "vocab_file"),
    ("TikTokenizer", "tokenizer_model"),
]


@pytest.mark.parametrize(("kind", "setting"), SETTINGS)
def test_a_file_that_is_not_there_or_not_set_is_an_error_that_names_the_setting(
    configs: dict[str, TokenizerConfig], tmp_path: Path, kind: str, setting: str
) -> None:
    with pytest.raises(TokenizerError, match=rf"^tokenizer\.{setting}: expected a .*No such file"):
        build_tokenizer(dataclasses.replace(configs[kind], **{setting: str(tmp_path / "gone")}))
    unset = dataclasses.replace(configs[kind], **{setting: None})
    with pytest.raises(TokenizerError, match=rf"^tokenizer\.{setting} is not set; the {kind} needs a "):
        build_tokenizer(unset)
    assert f"tokenizer.{setting}: null is needed by {kind}; set it" in map(str, tokenizer_rules(unset))


@pytest.mark.parametrize(("kind", "setting"), SETTINGS)
@pytest.mark.parametrize("content", [b"\xff\xfe no text", b"[]", b"{}", b"a b c\n"])
def test_a_file_of_something_else_is_an_error_that_names_the_setting(
    configs: dict[str, TokenizerConfig], tmp_path: Path, kind: str, setting: str, content: bytes
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.(tokenizer_model|vocab_file|merge_file|vocab_size)"):
        build_tokenizer(dataclasses.replace(configs[kind], **{setting: str(file)}))


def bert_vocabulary(edit: Callable[[list[str]], list[str]]) -> Callable[[Path], TokenizerConfig]:
    def make(directory: Path) -> TokenizerConfig:
        cfg = KINDS["BertWordPieceCase"](directory)
        file = Path(str(cfg.vocab_file))
        file.write_text("\n".join(edit(file.read_text().splitlines())) + "\n")
        return cfg

    return make


def gpt2_vocabulary(edit: Callable[[dict[str, int]], Any]) -> Callable[[Path], TokenizerConfig]:
    def make(directory: Path) -> TokenizerConfig:
        cfg = KINDS["GPT2BPETokenizer"](directory)
        file = Path(str(cfg.vocab_file))
        vocab = json.loads(file.read_text())
        edit(vocab)
        file.write_text(json.dumps(vocab))
        return cfg

    return make


def tiktoken_with(**settings: Any) -> Callable[[Path], TokenizerConfig]:
    return lambda directory: dataclasses.replace(KINDS["TikTokenizer"](directory), **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert_vocabulary(lambda tokens: [*tokens, "a"]), "holds 'a' on more than one line"),
        (bert_vocabulary(lambda tokens: [t for t in tokens if t != "[SEP]"]), r"lacks \[SEP\], which the vocabulary"),
        (gpt2_vocabulary(lambda vocab: vocab.pop("<|endoftext|>")), r"lacks '<\|endoftext\|>'; the vocabulary of a"),
        (gpt2_vocabulary(lambda vocab: vocab.pop("Q")), "lacks 'Q'; the vocabulary of a GPT2BPETokenizer holds every"),
        (gpt2_vocabulary(lambda vocab: vocab.pop("at")), r"merges\.txt does not fit .*vocab\.json"),
        (tiktoken_with(vocab_size=1000), r"tokenizer\.vocab_size is 1000; expected 276 .* to 282: "),
        (tiktoken_with(tiktoken_pattern="v3"), "tiktoken_pattern is 'v3'; expected one of v1, v2"),
        (tiktoken_with(tiktoken_num_special_tokens=3), "is 3, too few for 7 special tokens"),
        (tiktoken_with(tiktoken_special_tokens=["<s>"]), "lacks </s>, which ends a document"),
        (tiktoken_with(tiktoken_special_tokens=["</s>", "</s>"]), "names a token twice"),
    ],
)
def test_files_and_settings_that_make_no_tokenizer_are_errors(
    tmp_path: Path, make: Callable[[Path], TokenizerConfig], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        build_tokenizer(make(tmp_path))


def test_a_sentencepiece_model_without_an_end_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    with file.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=stream, vocab_size=60, eos_id=-1, hard_vocab_limit=False
        )
    with pytest.raises(TokenizerError, match="has no end-of-sentence piece"):
        build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path)))


def test_vocabularies_beside_a_huggingface_tokenizer_come_along(tmp_path: Path) -> None:
    cfg = KINDS["HuggingFaceTokenizer"](tmp_path)
    further = {"vocab.json": b"{}", "merges.txt": b"", "added_tokens.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    for name, content in (further | {"README.md": b"no part of it"}).items():
        (tmp_path / name).write_bytes(content)
    assets = build_tokenizer(cfg).asset_files()
    assert assets.keys() == FILES["HuggingFaceTokenizer"] | further.keys()
    assert further.items() <= assets.items()
    # Named by its file, a tokenizer does not claim what happens to lie beside it.
    lone = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "tokenizer.json")))
    assert lone.asset_files().keys() == FILES["HuggingFaceTokenizer"]


def test_a_setting_of_another_kind_is_refused() -> None:
    cfg = TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="v", merge_file="m", tiktoken_pattern="v1")
    assert [str(violation) for violation in tokenizer_rules(cfg)] == [
        "tokenizer.tiktoken_pattern: 'v1' has no effect with GPT2BPETokenizer; leave it at 'v2'"
    ]


def test_the_library_behind_the_ranks_is_the_real_one(built: dict[str, MegatronTokenizer]) -> None:
    ids = built["TikTokenizer"].tokenize(" the cat")
    assert ids == [20 + 256 + 2, 20 + 256 + 4]
    assert isinstance(built["TikTokenizer"]._encoding, tiktoken.Encoding)  # type: ignore[attr-defined]
