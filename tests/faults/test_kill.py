"""SIGKILL of the whole job at a file operation of a save: the next start ends where an undisturbed run ends.

`make test` tries an even sample of the operations; `pytest -m slow tests/faults` tries them all.
"""

import shutil
from pathlib import Path

import pytest

from bridge.training.checkpointing.integrity import find_damage, read_manifest
from bridge.training.checkpointing.layout import is_leftover, list_checkpoints
from bridge.training.config import ConfigContainer
from tests.distributed.launch import run_ranks
from tests.faults.killing import run_until
from tests.training.tiny import run_to_end, tiny_config

RANKS = 2


def config(directory: Path, mode: str, ckpt_step: int | None = None) -> ConfigContainer:
    """A run of six iterations that saves every two and resumes by itself."""
    save = str(directory / "save")
    checkpoint = {"save": save, "load": save, "save_interval": 2, "async_save": mode == "async", "ckpt_step": ckpt_step}
    return tiny_config(train_iters=6, checkpoint=checkpoint)


def assert_whole(save: Path) -> None:
    """Every published checkpoint has exactly the bytes that were written."""
    listing = list_checkpoints(save)
    for iteration in listing.iterations:
        path = save / f"iter_{iteration:07d}"
        manifest = read_manifest(path)
        assert manifest is not None, path
        assert find_damage(path, manifest.files, checksums=True) == []
    assert not listing.foreign


def survive_kills(
    directory: Path, mode: str, tries: int | None, ckpt_step: int | None = None, seed: Path | None = None
) -> int:
    """Kill a run at operations spread over its whole life; each time resume, and compare with the undisturbed run."""
    undisturbed = directory / "undisturbed"
    if seed is not None:
        shutil.copytree(seed, undisturbed / "save")
    killed, operations = run_until(None, undisturbed / "save", run_to_end, RANKS, config(undisturbed, mode, ckpt_step))
    assert not killed
    expected = run_ranks(run_to_end, RANKS, config(undisturbed, mode))
    moments = range(1, operations + 1) if tries is None else [1 + n * operations // tries for n in range(tries)]
    kills = 0
    for moment in moments:
        trial = directory / f"at-{moment}"
        if seed is not None:
            shutil.copytree(seed, trial / "save")
        killed, _ = run_until(moment, trial / "save", run_to_end, RANKS, config(trial, mode, ckpt_step))
        kills += killed
        assert_whole(trial / "save")
        found = run_ranks(run_to_end, RANKS, config(trial, mode))
        for rank in range(RANKS):
            assert found[rank]["digests"] == expected[rank]["digests"], f"killed at operation {moment} of {operations}"
        assert_whole(trial / "save")
        assert not [entry.name for entry in (trial / "save").iterdir() if is_leftover(entry.name)]
        assert list_checkpoints(trial / "save").iterations[-1] == 6
        shutil.rmtree(trial)
    return kills


def finished_run(directory: Path) -> Path:
    """A save directory with the checkpoints of iterations 2, 4 and 6."""
    run_ranks(run_to_end, RANKS, config(directory, "sync"))
    return directory / "save"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_sample_of_the_moments_of_saving(tmp_path: Path, mode: str) -> None:
    assert survive_kills(tmp_path, mode, 7) >= 6


def test_a_sample_of_the_moments_of_replacing(tmp_path: Path) -> None:
    seed = finished_run(tmp_path / "seed")
    assert survive_kills(tmp_path, "sync", 4, ckpt_step=2, seed=seed) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_moment_of_saving(tmp_path: Path, mode: str) -> None:
    assert survive_kills(tmp_path, mode, None) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_moment_of_replacing(tmp_path: Path, mode: str) -> None:
    seed = finished_run(tmp_path / "seed")
    assert survive_kills(tmp_path, mode, None, ckpt_step=2, seed=seed) >= 25
