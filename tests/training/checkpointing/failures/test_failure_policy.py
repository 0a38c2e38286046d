"""What follows a failed save: the decisions as tables, and real runs in which storage refuses or a writer dies."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from bridge.training.callbacks import CallbackContext
from bridge.training.checkpointing import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaveContext,
    CheckpointSaveError,
    DirectoryInUseError,
    NotEnoughSpaceError,
    RankLostError,
)
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import is_storage_failure, storage_error
from bridge.training.checkpointing.failures.history import SaveFailures
from bridge.training.checkpointing.failures.policy import FailurePolicy, may_pass
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.transaction import Save
from bridge.training.config import ConfigContainer
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.tiny import SavedCheckpoints, digests, tiny_config

WARN = FailurePolicy("warn", max_failures=2, retries=3, retry_seconds=5.0)
RAISE = FailurePolicy("raise", max_failures=2, retries=3, retry_seconds=5.0)
SMALL = 100_000
"""Bytes: more than a rank's log and small files take, less than its part of a tiny checkpoint."""


def agreed(error: CheckpointError, in_storage: bool) -> CheckpointError:
    error.in_storage = in_storage
    return error


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CheckpointSaveError("x"), True),
        (NotEnoughSpaceError("x"), True),
        (agreed(CheckpointError("x"), in_storage=True), True),
        (agreed(CheckpointError("x"), in_storage=False), False),
        (caused(CheckpointError("x"), FULL), True),
        (agreed(caused(CheckpointError("x"), FULL), in_storage=False), False),  # type: ignore[arg-type]
        (CheckpointError("x"), False),
        (CheckpointDamagedError("x"), False),
        (RankLostError("x"), False),
        (agreed(RankLostError("x"), in_storage=True), False),
        (DirectoryInUseError("x"), False),
    ],
)
def test_failed_saves_and_storage_may_pass_and_nothing_else(error: CheckpointError, expected: bool) -> None:
    assert may_pass(error) is expected
    assert WARN.goes_on(error, failures=1) is expected
    assert not RAISE.goes_on(error, failures=1)


@pytest.mark.parametrize(("failures", "expected"), [(1, True), (2, True), (3, False), (4, False)])
def test_a_number_of_failures_in_a_row_may_pass(failures: int, expected: bool) -> None:
    assert WARN.goes_on(CheckpointSaveError("x"), failures) is expected


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (FULL, [5.0, 10.0, 20.0, None]),
        (OSError(errno.EIO, "x"), [5.0, 10.0, 20.0, None]),
        (OSError(errno.ESTALE, "x"), [5.0, 10.0, 20.0, None]),
        (OSError("without a number"), [5.0, 10.0, 20.0, None]),
        (caused(CheckpointSaveError("x"), FULL), [5.0, 10.0, 20.0, None]),
        (PermissionError(errno.EACCES, "x"), [None]),
        (OSError(errno.EROFS, "x"), [None]),
        (FileNotFoundError(errno.ENOENT, "x"), [None]),
        (OSError(errno.EFBIG, "x"), [None]),
        (CheckpointSaveError("x"), [None]),
        (NotEnoughSpaceError("x"), [None]),
        (ValueError("x"), [None]),
    ],
)
def test_the_wait_doubles_and_what_cannot_heal_is_not_tried_again(error: Exception, waits: list[float | None]) -> None:
    assert [RAISE.wait_before(retry, error) for retry in range(1, len(waits) + 1)] == waits


def test_an_error_of_storage_is_found_behind_others() -> None:
    def fail() -> None:
        try:
            raise FULL
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch does when the file below it fails

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert storage_error(caught.value) is FULL
    assert is_storage_failure(caught.value)
    hidden = RuntimeError("x")
    hidden.__context__, hidden.__suppress_context__ = FULL, True
    assert storage_error(hidden) is None


def test_failures_are_counted_apart_and_a_success_begins_anew() -> None:
    failures, error = SaveFailures(), CheckpointSaveError("x")
    seen = [failures.settle(persistent, error, WARN) for persistent in (True, False, True, False)]
    assert seen == [True] * 4
    assert failures.settle(False, None, WARN)
    assert (failures.in_a_row(True), failures.in_a_row(False)) == (2, 0)
    assert not failures.settle(True, error, WARN)
    assert failures.settle(True, None, WARN)
    assert failures.in_a_row(True) == 0


def test_the_last_failure_is_remembered_until_a_later_save_or_an_exception() -> None:
    failures, first, second = SaveFailures(), CheckpointSaveError("first"), CheckpointSaveError("second")
    failures.settle(True, first, WARN)
    failures.settle(False, None, WARN)
    assert failures.take_passed_over() is first
    assert failures.take_passed_over() is None
    failures.settle(True, first, WARN)
    failures.settle(True, None, WARN)
    assert failures.take_passed_over() is None
    failures.settle(True, first, WARN)
    assert not failures.settle(True, second, RAISE)  # raised, so it need not be told again
    assert failures.take_passed_over() is None


def test_a_step_is_tried_again_until_storage_has_recovered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def step() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return "written"

    policy = FailurePolicy(retries=3, retry_seconds=0.001)
    assert with_retries("writing x", step, policy, rank=7) == "written"
    assert [record.getMessage() for record in caplog.records] == [
        f"rank 7: writing x failed, retry {retry} of 3 in 0.0 s (checkpoint.save_retries, save_retry_seconds): "
        "OSError: [Errno 5] Input/output error"
        for retry in (1, 2)
    ]


def test_what_storage_refuses_for_good_is_one_type_of_error(tmp_path: Path) -> None:
    policy = FailurePolicy(retries=2, retry_seconds=0.001)
    missing = tmp_path / "missing" / "file"
    with pytest.raises(CheckpointSaveError, match=r"^FileNotFoundError: \[Errno 2\] No such file or directory: "):
        with_retries("writing", lambda: missing.write_bytes(b""), policy, rank=0)

    def full() -> None:
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"x")

    with pytest.raises(CheckpointSaveError) as caught:
        with_retries("writing", full, policy, rank=0)
    assert str(caught.value) == "OSError: [Errno 28] No space left on device, in each of 3 tries"
    with pytest.raises(ZeroDivisionError):
        with_retries("writing", lambda: 1 // 0, policy, rank=0)


def agree_on_failures() -> list[tuple[str, bool | None]]:
    init_ranks()
    ranks = Ranks.current()

    def fail_with(*errors: Exception | None) -> Callable[[], None]:
        def action() -> None:
            error = errors[ranks.rank]
            if error is not None:
                raise error

        return action

    bug = ValueError("broken")
    behind = caused(CheckpointSaveError("the writer failed"), FULL)
    actions: list[Callable[[], Any]] = [
        lambda: ranks.run("writing", fail_with(None, FULL)),
        lambda: ranks.run("writing", fail_with(FULL, bug)),
        lambda: ranks.run("writing", fail_with(behind, FULL)),
        lambda: ranks.run("outer", lambda: ranks.run("inner", fail_with(None, FULL))),
        lambda: ranks.first("publishing", fail_with(FULL, None)),
        lambda: ranks.first("publishing", fail_with(bug, None)),
    ]
    seen = []
    for action in actions:
        try:
            action()
        except CheckpointError as error:
            seen.append((type(error).__name__, is_storage_failure(error)))
    return seen


def test_ranks_agree_on_whether_storage_failed() -> None:
    expected = [
        ("CheckpointError", True),
        ("CheckpointError", False),
        ("CheckpointSaveError", True),
        ("CheckpointError", True),
        ("CheckpointError", True),
        ("CheckpointError", False),
    ]
    assert run_ranks(agree_on_failures, 2) == [expected, expected]


# --- real runs ---


def limit_files(size: int | None) -> None:
    """From now on this process, its background writer and what it forks cannot write files larger than `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for process in [psutil.Process(), *psutil.Process().children()]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def outcome_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def train_with_failing_saves(cfg: ConfigContainer, failing: set[int]) -> dict[str, Any]:
    """Train; rank 1 cannot write what is saved after the steps in `failing`."""
    saved = SavedCheckpoints()
    run = setup(cfg, saved.manager)

    def before_saving(context: CallbackContext) -> None:
        if dist.get_rank() == 1:
            limit_files(SMALL if context.state.train_state.step in failing else None)

    saved.manager.register("on_train_step_end", before_saving)
    outcome = outcome_of(lambda: train(run))
    limit_files(None)
    return {
        "outcome": outcome,
        "step": run.state.train_state.step,
        "saved": [iteration for _, iteration, _ in saved.saved],
        "digests": digests(run),
        "in a row": run.state.save_failures.in_a_row(True),
    }


def iterations_in(path: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("iter_")) for entry in path.glob("iter_*"))


def leftovers_in(path: Path) -> list[str]:
    known = {".bridge-writer", ".bridge-session", ".bridge-starts", ".bridge-events.jsonl"}
    return sorted(entry.name for entry in path.glob(".*") if entry.name not in known)


def config(path: Path | None, train_iters: int = 5, **checkpoint: Any) -> ConfigContainer:
    settings = {"save": None if path is None else str(path), "save_interval": 1, **checkpoint}
    return tiny_config(train_iters=train_iters, checkpoint=settings if path is not None else {})


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_training_goes_on_after_failed_saves_and_is_the_same_bit_for_bit(tmp_path: Path, mode: str) -> None:
    cfg = config(tmp_path, on_save_failure="warn", async_save=mode == "async")
    results = run_ranks(train_with_failing_saves, 2, cfg, {2, 3})
    undisturbed = run_ranks(train_with_failing_saves, 2, config(None), set())
    for result, reference in zip(results, undisturbed, strict=True):
        assert result["outcome"] == "fine"
        assert result["saved"] == [1, 4, 5]
        assert result["in a row"] == 0
        assert result["digests"] == reference["digests"]
    assert iterations_in(tmp_path) == [1, 4, 5]
    assert leftovers_in(tmp_path) == []
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_more_failures_in_a_row_than_allowed_end_the_run(tmp_path: Path, mode: str) -> None:
    cfg = config(tmp_path, on_save_failure="warn", max_save_failures=2, async_save=mode == "async")
    first, second = run_ranks(train_with_failing_saves, 2, cfg, {2, 3, 4})
    assert first["outcome"] == second["outcome"]
    assert first["outcome"].startswith(
        "CheckpointSaveError: writing the persistent checkpoint of iteration 4 failed on rank 1: "
    )
    assert "File too large" in first["outcome"]
    # An asynchronous save's failure is raised when a later one is made, if nobody has noticed it before.
    assert first["saved"] in ([[1]] if mode == "sync" else [[1], [1, 5]])
    assert iterations_in(tmp_path) == first["saved"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_failure_of_the_last_save_is_raised_whatever_the_policy_says(tmp_path: Path, mode: str) -> None:
    cfg = config(tmp_path, train_iters=3, on_save_failure="warn", async_save=mode == "async")
    for result in run_ranks(train_with_failing_saves, 2, cfg, {3}):
        assert result["step"] == 3
        assert result["outcome"].startswith(
            "CheckpointSaveError: writing the persistent checkpoint of iteration 3 failed on rank 1: "
        )
    assert iterations_in(tmp_path) == [1, 2]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_by_default_the_first_failure_ends_the_run(tmp_path: Path, mode: str) -> None:
    cfg = config(tmp_path, train_iters=4, async_save=mode == "async")
    first, second = run_ranks(train_with_failing_saves, 2, cfg, {2})
    assert first["outcome"] == second["outcome"]
    assert first["outcome"].startswith(
        "CheckpointSaveError: writing the persistent checkpoint of iteration 2 failed on rank 1: "
    )
    assert iterations_in(tmp_path)[0] == 1
    assert 2 not in iterations_in(tmp_path)


def save(run: Run, step: int, non_persistent: bool = False) -> None:
    run.state.train_state.step = step
    context = CheckpointSaveContext(
        run.state, run.model, run.optimizer, run.scheduler, 7, non_persistent_ckpt=non_persistent
    )
    run.manager.save(context, None)


def finish(run: Run, terminate: bool = False) -> None:
    run.manager.finalize_async_saves(run.state, blocking=True, terminate=terminate)


def fail_in_background_then_save(cfg: ConfigContainer) -> list[str]:
    run = setup(cfg)
    broken = dist.get_rank() == 1
    seen = [outcome_of(lambda: save(run, 1)), outcome_of(lambda: finish(run))]
    limit_files(SMALL if broken else None)
    seen.append(outcome_of(lambda: save(run, 2)))
    limit_files(None)
    seen.append(outcome_of(lambda: save(run, 3)))
    published = sorted(path.name for path in Path(cfg.checkpoint.save or "").glob("iter_*"))
    seen += [",".join(published), outcome_of(lambda: finish(run, terminate=True))]
    return seen


def test_the_next_save_is_made_before_the_failure_of_the_one_before_it_is_raised(tmp_path: Path) -> None:
    first, second = run_ranks(fail_in_background_then_save, 2, config(tmp_path, async_save=True))
    assert first == second
    assert first[:3] == ["fine", "fine", "fine"]
    assert first[3].startswith(
        "CheckpointSaveError: writing the persistent checkpoint of iteration 2 failed on rank 1: "
    )
    assert first[4:] == ["iter_0000001,iter_0000003", "fine"]


def lose_writers(cfg: ConfigContainer) -> dict[str, Any]:
    """Rank 1's background writer is killed in two saves."""
    run = setup(cfg)

    write = Save.write

    def save_and_kill(step: int) -> str:
        if dist.get_rank() == 1:
            Save.write = lambda self: time.sleep(60) or write(self)  # type: ignore[method-assign,assignment]
        save(run, step)
        Save.write = write  # type: ignore[method-assign]
        if dist.get_rank() == 1:
            os.kill(run.state.async_calls_queue._pending[0].call.pid, signal.SIGKILL)  # type: ignore[union-attr]
        return outcome_of(lambda: finish(run))

    seen: dict[str, Any] = {"warn": save_and_kill(1), "count": run.state.save_failures.in_a_row(True)}
    cfg.checkpoint.on_save_failure = "raise"
    seen["raise"] = save_and_kill(2)
    save(run, 3)
    return seen | {"next": outcome_of(lambda: finish(run)), "count after": run.state.save_failures.in_a_row(True)}


def test_a_writer_that_dies_is_a_failed_save_like_any_other(tmp_path: Path) -> None:
    # A fork writes, which can be held up; the direct writer's own tests end that.
    cfg = config(tmp_path, on_save_failure="warn", async_save=True, io_backend="stock")
    message = (
        "CheckpointSaveError: writing the persistent checkpoint of iteration 2 failed on rank 1: the process of the "
        "background writer of the persistent checkpoint of iteration 2 was killed by SIGKILL"
    )
    for seen in run_ranks(lose_writers, 2, cfg):
        assert seen == {"warn": "fine", "count": 1, "raise": message, "next": "fine", "count after": 0}
    assert iterations_in(tmp_path) == [3]
    assert leftovers_in(tmp_path) == []


def mistakes_and_other_kinds(cfg: ConfigContainer) -> dict[str, Any]:
    run = setup(cfg)
    broken = dist.get_rank() == 1
    seen: dict[str, Any] = {}

    def fail() -> None:
        raise ValueError("broken")

    if broken:
        run.scheduler.state_dict = fail
    seen["mistake"] = outcome_of(lambda: save(run, 1))
    if broken:
        del run.scheduler.state_dict
    counts = []
    for step in (2, 3, 4):
        limit_files(SMALL if broken else None)
        seen[f"non-persistent {step}"] = outcome_of(lambda step=step: save(run, step, non_persistent=True))
        limit_files(None)
        save(run, step)
        counts.append((run.state.save_failures.in_a_row(True), run.state.save_failures.in_a_row(False)))
    save(run, 5, non_persistent=True)
    seen["counts"] = [*counts, (0, run.state.save_failures.in_a_row(False))]
    return seen


def test_mistakes_are_raised_and_non_persistent_saves_are_counted_by_themselves(tmp_path: Path) -> None:
    cfg = config(tmp_path, on_save_failure="warn", max_save_failures=2, non_persistent_ckpt_type="global")
    for seen in run_ranks(mistakes_and_other_kinds, 2, cfg):
        assert seen.pop("mistake") == (
            "CheckpointError: collecting the optimizer's state failed on rank 1: ValueError: broken"
        )
        raised = seen.pop("non-persistent 4")
        assert raised.startswith("CheckpointSaveError: writing the global non-persistent checkpoint of iteration 4 ")
        assert seen == {
            "non-persistent 2": "fine",
            "non-persistent 3": "fine",
            "counts": [(0, 1), (0, 2), (0, 3), (0, 0)],
        }
    assert iterations_in(tmp_path) == [2, 3, 4]
    assert iterations_in(tmp_path / "non_persistent") == [5]


def test_settings_that_are_read_are_those_of_the_configuration() -> None:
    cfg = SimpleNamespace(on_save_failure="warn", max_save_failures=7, save_retries=2, save_retry_seconds=0.5)
    assert FailurePolicy.of(cfg) == FailurePolicy("warn", 7, 2, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "retry", "wait"), [(5.0, 4, 40.0), (5.0, 5, 60.0), (5.0, 2000, 60.0), (90.0, 3, 90.0)]
)
def test_the_wait_does_not_grow_for_ever(seconds: float, retry: int, wait: float) -> None:
    policy = FailurePolicy(retries=5000, retry_seconds=seconds)
    assert policy.wait_before(retry, OSError(errno.EIO, "Input/output error")) == wait
