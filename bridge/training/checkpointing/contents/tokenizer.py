"""The tokenizer's part: the files that make a checkpoint usable without the place it was trained at."""

from __future__ import annotations

from typing import Any

from bridge.training.checkpointing.contents import Sidecar
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.layout import TOKENIZER_DIRECTORY


def tokenizer_sidecars(tokenizer: Any | None) -> list[Sidecar]:
    """Capture the tokenizer's files; none where the run has no tokenizer.

    Raises:
        CheckpointSaveError: the tokenizer cannot give its files.
    """
    if tokenizer is None:
        return []
    try:
        assets = tokenizer.asset_files()
    except Exception as error:
        raise CheckpointSaveError(
            f"the files of {type(tokenizer).__name__} could not be collected: {type(error).__name__}: {error}; "
            "to save without them set checkpoint.save_tokenizer_assets: false"
        ) from error
    return [Sidecar(f"{TOKENIZER_DIRECTORY}/{name}", data) for name, data in sorted(assets.items())]
