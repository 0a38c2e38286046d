"""The one process-wide value: run in processes of its own, so that no other test sees it."""

from pathlib import Path

from bridge.training.checkpointing.contents.version import get_checkpoint_version, set_checkpoint_version
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config


def set_and_get() -> tuple[float | None, float | None, float | None, str]:
    before = get_checkpoint_version()
    set_checkpoint_version(3.0)
    first = get_checkpoint_version()
    set_checkpoint_version(3.0)
    try:
        set_checkpoint_version(2.0)
    except CheckpointMismatchError as error:
        return before, first, get_checkpoint_version(), str(error)
    return before, first, get_checkpoint_version(), "taken"


def test_a_version_is_kept_and_another_one_refused() -> None:
    assert run_ranks(set_and_get, 1) == [
        (
            None,
            3.0,
            3.0,
            "the checkpoint is of version 2.0, and this process has loaded one of version 3.0; "
            "load checkpoints of different versions in processes of their own",
        )
    ]


def versions(save: Path) -> tuple[float | None, float | None]:
    run_to_end(tiny_config(train_iters=2, checkpoint={"save": str(save)}))
    before = get_checkpoint_version()
    setup(tiny_config(checkpoint={"load": str(save)}))
    return before, get_checkpoint_version()


def test_a_load_sets_the_version(tmp_path: Path) -> None:
    assert run_ranks(versions, 1, tmp_path) == [(None, 3.0)]
