"""The factory's errors, the default manager, and a custom manager that receives every call of a run."""

import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing import (
    CheckpointManager,
    DefaultCheckpointManager,
    create_checkpoint_manager,
)
from bridge.training.config import CheckpointConfig
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config

MODULE = """
from bridge.training.checkpointing import DefaultCheckpointManager

class Recording(DefaultCheckpointManager):
    calls = []

    def save(self, ctx, callback_manager):
        self.calls.append(("save", ctx.state.train_state.step))
        super().save(ctx, callback_manager)

    def load(self, ctx):
        result = super().load(ctx)
        self.calls.append(("load", result[0]))
        return result

    def finalize_async_saves(self, state, blocking=False, terminate=False):
        self.calls.append(("finalize", blocking, terminate))
        super().finalize_async_saves(state, blocking=blocking, terminate=terminate)

class NoLoad:
    def __init__(self, checkpoint_config):
        pass

    def save(self, ctx, callback_manager):
        pass

class NoArguments:
    pass

a_number = 5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's package `mine<n>` beside the recipe, with a module `managers`."""
    name = f"mine{abs(hash(str(tmp_path)))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "managers.py").write_text(MODULE)
    (tmp_path / name / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_the_default_manager_implements_the_protocol() -> None:
    config = CheckpointConfig(save="/somewhere")
    manager = create_checkpoint_manager(config)
    assert type(manager) is DefaultCheckpointManager
    assert isinstance(manager, CheckpointManager)
    assert manager.checkpoint_config is config
    assert manager.checkpointing_context == {}


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("managers", ValueError, "is not a dotted path such as 'mypackage.checkpoint.MyCheckpointManager'"),
        ("{package}.managers.", ValueError, "is not a dotted path"),
        ("{package}.absent.Manager", ImportError, "cannot import '{package}.absent'"),
        ("{package}.broken.Manager", ImportError, "No module named 'a_package_that_nobody_has'"),
        ("{package}.managers.Absent", AttributeError, "the module '{package}.managers' has no 'Absent'"),
        ("{package}.managers.a_number", TypeError, "is int, not a class"),
        (
            "{package}.managers.NoLoad",
            TypeError,
            "does not implement the CheckpointManager protocol: it has no load, finalize_async_saves",
        ),
        ("{package}.managers.NoArguments", TypeError, "takes no arguments"),
    ],
)
def test_what_cannot_be_a_manager_is_refused(package: str, path: str, error: type[Exception], message: str) -> None:
    config = CheckpointConfig(custom_manager_class=path.format(package=package))
    with pytest.raises(error) as caught:
        create_checkpoint_manager(config)
    assert message.format(package=package) in str(caught.value)


def run_and_report(cfg: Any, module: str) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    return run_to_end(cfg), sys.modules[module].Recording.calls


def test_a_custom_manager_receives_every_call_of_a_run(tmp_path: Path, package: str) -> None:
    save = str(tmp_path / "save")
    checkpoint = {
        "save": save,
        "load": save,
        "save_interval": 2,
        "async_save": True,
        "custom_manager_class": f"{package}.managers.Recording",
    }
    cfg = tiny_config(train_iters=3, checkpoint=checkpoint)
    poll, last = ("finalize", False, False), ("finalize", True, True)
    for _, calls in run_ranks(run_and_report, 2, cfg, f"{package}.managers"):
        assert calls == [("load", 0), poll, poll, ("save", 2), poll, ("save", 3), last]
    cfg = tiny_config(train_iters=4, checkpoint=checkpoint)
    for outcome, calls in run_ranks(run_and_report, 2, cfg, f"{package}.managers"):
        assert calls == [("load", 3), poll, ("save", 4), last]
        assert outcome["saved"] == [("iter_0000004", 4, "persistent")]
