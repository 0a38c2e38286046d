"""One run for all command lines: it is copied where it is to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of iterations 2, 4 and 6 of a run on two data-parallel ranks. Only to be read."""
    save_dir = tmp_path_factory.mktemp("trained") / "run"
    cfg = tiny_config(train_iters=6, checkpoint={"save": str(save_dir), "save_interval": 2})
    run_ranks(run_to_end, 2, cfg)
    return save_dir
