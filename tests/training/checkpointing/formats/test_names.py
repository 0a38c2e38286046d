"""Directory names of keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats.names import directory_name, key_of

NAMES = {
    "decoder.layers.mlp.linear_fc1.weight": "decoder.layers.mlp.linear_fc1.weight",
    "gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0.param": (
        "gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0.param"
    ),
    "a/b": "a%2Fb",
    "..": "%2E.",
    "../../etc/passwd": "%2E.%2F..%2Fetc%2Fpasswd",
    ".metadata": "%2Emetadata",
    "common.pt": "%63ommon.pt",
    "manifest.json": "%6Danifest.json",
    "tokenizer": "%74okenizer",
    "100%": "100%25",
    "a\0b": "a%00b",
}


@pytest.mark.parametrize("key", NAMES)
def test_a_key_has_a_plain_name(key: str) -> None:
    assert directory_name(key) == NAMES[key]
    assert key_of(NAMES[key]) == key


@given(st.text(min_size=1, max_size=20))
def test_a_name_stays_in_its_directory_and_leads_back_to_the_key(key: str) -> None:
    try:
        name = directory_name(key)
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    assert key_of(name) == key
    assert "/" not in name
    assert not name.startswith(".")


@pytest.mark.parametrize("key", ["", "k" * 256, "ü" * 43])
def test_some_keys_have_none(key: str) -> None:
    with pytest.raises(CheckpointSaveError, match="cannot be a directory's name"):
        directory_name(key)
