from __future__ import annotations

import pytest

from bridge.training.tokenizers import NullTokenizer, TokenizerError


def test_the_end_of_document_comes_on_top_of_the_given_size() -> None:
    tokenizer = NullTokenizer(100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)


def test_text_is_a_row_of_numbers() -> None:
    tokenizer = NullTokenizer(100)
    assert tokenizer.tokenize("3 0 100") == [3, 0, 100]
    assert tokenizer.detokenize([3, 0, 100]) == "3 0 100"
    assert tokenizer.tokenize_batch(["1", "2 3"]) == [[1], [2, 3]]


def test_it_leaves_nothing_to_store() -> None:
    assert NullTokenizer(100).asset_files() == {}


@pytest.mark.parametrize("word", ["101", "-1", "one", "1.5"])
def test_other_words_are_errors(word: str) -> None:
    with pytest.raises(TokenizerError, match=f"numbers from 0 to 100, found '{word}'"):
        NullTokenizer(100).tokenize(f"7 {word}")


def test_it_needs_a_size() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.vocab_size is 0"):
        NullTokenizer(0)
