"""Deletion in the background: everything goes, nothing else does, and no failure is lost."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bridge.training.checkpointing.background import ForkedCall
from bridge.training.checkpointing.layout import TRASH_PREFIX, new_trash_name
from bridge.training.checkpointing.retention import trash as trash_module
from bridge.training.checkpointing.retention import trash_process
from bridge.training.checkpointing.retention.trash import Trash, trash_of


def rubbish(directory: Path, files: int = 3) -> Path:
    """A checkpoint that has been renamed out of sight."""
    path = directory / new_trash_name("iter_0000010")
    (path / "tokenizer").mkdir(parents=True)
    for number in range(files):
        (path / f"__{number}_0.distcp").write_bytes(b"0123")
    (path / "tokenizer" / "vocab.json").write_text("{}")
    return path


def children() -> list[psutil.Process]:
    """The processes that are deleting for this one."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "trash_process.py" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_until_gone(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while any(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_program_knows_the_prefix_and_needs_only_the_standard_library() -> None:
    assert trash_process.PREFIX == TRASH_PREFIX
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", trash_process.__file__, str(os.getpid()), "0"],
        input=b"",
        capture_output=True,
        check=True,
    )
    assert loaded.stdout == loaded.stderr == b""


def test_it_is_deleted_while_the_program_goes_on_and_no_process_stays(tmp_path: Path) -> None:
    trash = Trash()
    first, second = rubbish(tmp_path), rubbish(tmp_path)
    trash.delete([first])
    trash.delete([second])
    wait_until_gone(first)
    trash.finish()
    assert list(tmp_path.iterdir()) == []
    assert trash.is_empty
    assert children() == []


def test_links_are_deleted_and_what_they_lead_to_is_not(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "below").mkdir(parents=True)
    (kept / "file").touch()
    path = rubbish(tmp_path)
    (path / "to a directory").symlink_to(kept)
    (path / "tokenizer" / "to a file").symlink_to(kept / "file")
    (path / "to nothing").symlink_to(tmp_path / "absent")
    link, file = tmp_path / new_trash_name("link"), tmp_path / new_trash_name("file")
    link.symlink_to(kept)
    file.touch()
    trash = Trash()
    trash.delete([path, link, file, tmp_path / new_trash_name("gone already")])
    trash.finish()
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["below", "file", "kept"]


def test_nothing_with_another_name_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "iter_0000010").mkdir()
    trash = Trash()
    trash.delete([tmp_path / "iter_0000010"])
    trash.finish()
    assert (tmp_path / "iter_0000010").exists()
    assert "its name does not begin with .trash-" in caplog.text


def test_an_error_of_any_kind_is_counted_and_not_raised(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        errors = trash_process.delete(str(tmp_path / f"{TRASH_PREFIX}{'x' * 300}"), pool, trash_process.Pace(0))
    assert errors.count == 1
    assert errors.first.startswith("[Errno 36] File name too long")


def test_a_file_that_refuses_is_named_and_what_is_beside_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = rubbish(tmp_path)
    if subprocess.run(["chattr", "+i", str(path / "__0_0.distcp")], capture_output=True, check=False).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        trash = Trash()
        trash.delete([path])
        trash.finish()
        (record,) = caplog.records
        assert record.getMessage().startswith(f"could not delete {path}, which the next run that saves there tries")
        assert "__0_0.distcp" in record.getMessage()
        assert record.getMessage().endswith("(and 1 further errors)")  # the directory, which is not empty
        assert [entry.name for entry in path.iterdir()] == ["__0_0.distcp"]
    finally:
        subprocess.run(["chattr", "-i", str(path / "__0_0.distcp")], check=True)


def test_the_end_of_a_run_lifts_the_limit(tmp_path: Path) -> None:
    trash = Trash(files_per_second=0.1)  # a quarter of an hour
    path = rubbish(tmp_path, files=100)
    trash.delete([path])
    trash.finish()
    assert not path.exists()
    assert children() == []


def test_a_process_that_was_killed_is_reported_and_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trash = Trash(files_per_second=0.1)
    path, later = rubbish(tmp_path), rubbish(tmp_path)
    trash.delete([path])
    (child,) = children()
    child.kill()
    while child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    trash.delete([later])
    assert f"ended with status -9 and left, for another try: {path}" in caplog.text
    trash.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_cannot_be_started_costs_nothing_but_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trash = Trash()
    path = rubbish(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "no python"))
        trash.delete([path])
    assert "could not start the process that deletes old checkpoints, trying again later" in caplog.text
    trash.delete()
    wait_until_gone(path)
    trash.finish()


def test_a_program_that_breaks_leaves_a_warning_that_names_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(trash_module, "_PROGRAM", tmp_path / "broken.py")
    path = rubbish(tmp_path)
    trash = Trash()
    trash.delete([path])
    trash.finish()
    assert path.exists()
    assert f"left for the next run that saves there to delete, after 300 s at most: {path}" in caplog.text


def test_a_fork_neither_waits_for_it_nor_disturbs_it(tmp_path: Path) -> None:
    trash = Trash(files_per_second=0.1)
    path = rubbish(tmp_path)
    trash.delete([path])
    (child,) = children()
    call = ForkedCall(lambda: (trash.finish(), "done"), "a background writer")
    assert call.result() == (None, "done")
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    trash.finish()
    assert not path.exists()


PROGRAM = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("trash", sys.argv[1])  # without the package, which takes seconds to import
trash = module_from_spec(spec)
spec.loader.exec_module(trash)
trash.Trash(files_per_second=0.1).delete([Path(sys.argv[2])])
if sys.argv[3:]:
    import psutil, time
    print(psutil.Process().children()[0].pid, flush=True)
    time.sleep(600)
"""


def test_the_end_of_the_process_waits_for_it(tmp_path: Path) -> None:
    path = rubbish(tmp_path)
    subprocess.run([sys.executable, "-c", PROGRAM, trash_module.__file__, str(path)], check=True)
    assert not path.exists()


def test_it_ends_with_a_process_that_is_killed_and_the_rest_is_found_again(tmp_path: Path) -> None:
    path = rubbish(tmp_path, files=50)
    command = [sys.executable, "-c", PROGRAM, trash_module.__file__, str(path), "wait"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert run.stdout is not None
    child = psutil.Process(int(run.stdout.readline()))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    child.wait(60)
    assert path.exists()
    trash = Trash()
    trash.delete([path])
    trash.finish()
    assert not path.exists()


def test_a_context_has_one() -> None:
    context: dict[str, object] = {}
    assert trash_of(context) is trash_of(context)


def test_more_errors_than_a_pipe_holds_do_not_stop_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = [tmp_path / f"not-trash-{number}-{'x' * 200}" for number in range(400)]
    for path in refused:
        path.touch()
    good = tmp_path / f"{TRASH_PREFIX}good"
    good.mkdir()
    trash = Trash()
    trash.delete([*refused, good])
    trash.finish(timeout=30.0)
    assert not good.exists()
    assert caplog.text.count("could not delete") == len(refused)
