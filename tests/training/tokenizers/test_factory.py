from __future__ import annotations

from pathlib import Path

import pytest

from bridge.training.config import TokenizerConfig
from bridge.training.tokenizers import NullTokenizer, TokenizerError, build_tokenizer, train_bpe_tokenizer


def test_builds_what_the_configuration_names(tmp_path: Path) -> None:
    trained = train_bpe_tokenizer(["some text"], 260, tmp_path)
    for model in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        built = build_tokenizer(TokenizerConfig(tokenizer_model=model))
        assert built.asset_files() == trained.asset_files()
    null = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=9))
    assert isinstance(null, NullTokenizer)
    assert null.vocab_size == 10


def test_a_size_that_is_not_the_tokenizers_is_an_error(tmp_path: Path) -> None:
    train_bpe_tokenizer([], 257, tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.vocab_size is 300, but .* has 257 ids"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path), vocab_size=300))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (TokenizerConfig(), "tokenizer.tokenizer_model is not set"),
        (TokenizerConfig(tokenizer_type="NullTokenizer"), "tokenizer.vocab_size is not set"),
        (
            TokenizerConfig(tokenizer_type="Guesswork"),
            "'Guesswork'; expected one of HuggingFaceTokenizer, SentencePieceTokenizer, ",
        ),
    ],
)
def test_a_missing_or_unknown_setting_is_an_error(cfg: TokenizerConfig, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        build_tokenizer(cfg)
