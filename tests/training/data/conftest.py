from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests fork this process, and forking with the tokenizers' threads about is not safe."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
