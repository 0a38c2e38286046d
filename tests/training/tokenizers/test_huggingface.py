from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.tokenizers import (
    HuggingFaceTokenizer,
    MissingTokenizerLibraryError,
    TokenizerError,
    train_bpe_tokenizer,
)

TEXTS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat; the cat sat\r\n", "größer, ≥ 1 — 猫"]
ASSETS = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe_tokenizer(TEXTS, 300, directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(directory)


def test_the_trained_tokenizer_has_the_size_asked_for_and_an_end_token(
    tokenizer: HuggingFaceTokenizer,
) -> None:
    assert tokenizer.vocab_size == 300
    assert tokenizer.detokenize([tokenizer.eod]) == "<|endoftext|>"


def test_common_words_become_one_token(tokenizer: HuggingFaceTokenizer) -> None:
    assert len(tokenizer.tokenize(" the cat sat")) < len(" the cat sat") / 2


def test_any_text_comes_back_exactly(tokenizer: HuggingFaceTokenizer) -> None:
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert tokenizer.tokenize_batch([text, text]) == [ids, ids]
        assert all(0 <= token < tokenizer.vocab_size for token in ids)

    check()


def test_training_again_gives_the_same_files(directory: Path, tmp_path: Path) -> None:
    again = train_bpe_tokenizer(iter(TEXTS), 300, tmp_path / "made" / "on the way")
    assert again.asset_files() == HuggingFaceTokenizer(directory).asset_files()


def test_little_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    assert train_bpe_tokenizer(["abab"], 4000, tmp_path).vocab_size == 257 + 2


def test_a_vocabulary_too_small_for_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"the vocabulary size is 256; .* at least 257"):
        train_bpe_tokenizer(TEXTS, 256, tmp_path)


def test_assets_are_the_files_that_it_was_read_from(directory: Path, tmp_path: Path) -> None:
    for name in ASSETS:
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    tokenizer = HuggingFaceTokenizer(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ASSETS}
    (tmp_path / "tokenizer.json").write_text("something else by now")
    assert tokenizer.asset_files() == before


def test_a_lone_file_gets_the_assets_that_it_lacks(directory: Path, tmp_path: Path) -> None:
    lone = tmp_path / "other-name.json"
    lone.write_bytes((directory / "tokenizer.json").read_bytes())
    tokenizer = HuggingFaceTokenizer(lone)
    assets = tokenizer.asset_files()
    assert set(assets) == ASSETS
    assert json.loads(assets["special_tokens_map.json"]) == {"eos_token": "<|endoftext|>"}
    assert json.loads(assets["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    for name, content in assets.items():
        (tmp_path / name).write_bytes(content)
    assert HuggingFaceTokenizer(tmp_path).tokenize(TEXTS[1]) == tokenizer.tokenize(TEXTS[1])


def test_transformers_opens_the_assets(directory: Path, tokenizer: HuggingFaceTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.eos_token_id == tokenizer.eod
    assert [theirs(text)["input_ids"] for text in TEXTS] == tokenizer.tokenize_batch(TEXTS)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": " the", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": " the"}),
    ],
)
def test_the_end_token_that_the_files_declare_wins(directory: Path, tmp_path: Path, file: str, content: object) -> None:
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text())
    tokenizer_json["model"]["vocab"][" the"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    (tmp_path / file).write_text(json.dumps(content))
    assert HuggingFaceTokenizer(tmp_path).eod == 300


def test_gaps_in_the_ids_count_towards_the_size(directory: Path, tmp_path: Path) -> None:
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text())
    tokenizer_json["model"]["vocab"]["far away"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    assert HuggingFaceTokenizer(tmp_path).vocab_size == 5001


def test_documents_are_never_cut_or_padded(directory: Path, tmp_path: Path) -> None:
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text())
    tokenizer_json["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer_json["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.tokenize(TEXTS[0]) == HuggingFaceTokenizer(directory).tokenize(TEXTS[0])


def test_a_tokenizer_without_end_token_is_an_error(directory: Path, tmp_path: Path) -> None:
    content = (directory / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="has no end-of-document token: expected an 'eos_token'"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["missing", "missing/tokenizer.json", "."])
def test_a_missing_file_is_an_error_that_names_the_setting(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.tokenizer_model: .*No such file"):
        HuggingFaceTokenizer(tmp_path / name)


def test_a_file_of_another_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer in Hugging Face's format"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_companion_file_is_an_error(directory: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json (is not valid JSON|holds list)"):
        HuggingFaceTokenizer(tmp_path)


def test_without_the_library_the_error_tells_how_to_install_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingTokenizerLibraryError, match=r'pip install "bridge\[data\]"') as caught:
        HuggingFaceTokenizer(directory)
    assert isinstance(caught.value, ImportError)
