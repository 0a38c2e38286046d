"""Runs whose checkpoints are mirrored to object storage, saved there, and loaded from there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.catalog import choose
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import UploadFinished, UploadStarted
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import list_bucket
from bridge.training.checkpointing.objects.owner import OWNER, read_owner
from bridge.training.config import CheckpointConfig
from bridge.training.object_url import ObjectUrl
from tests.distributed.launch import run_ranks
from tests.training.checkpointing.objects.store import Server, contents, require_truthful
from tests.training.tiny import run_to_end, tiny_config


def several(ranks: int, *runs: tuple[int, dict[str, Any]]) -> list[list[Any]]:
    """Several runs in one launch; of one that fails, its error."""

    def each() -> list[Any]:
        found: list[Any] = []
        for train_iters, checkpoint in runs:
            try:
                found.append(run_to_end(tiny_config(train_iters=train_iters, checkpoint=checkpoint)))
            except CheckpointError as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    return run_ranks(each, ranks, timeout=300)


def test_a_mirrored_run_goes_on_from_the_bucket_bit_for_bit(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    directory = tmp_path / "run"
    whole = several(2, (4, {}))
    first = several(
        2,
        (2, {"save": str(directory), "save_interval": 1, "mirror": str(url), "most_recent_k": 1, "async_save": True}),
    )
    assert require_truthful(store, url) == {2}
    assert list_bucket(store, url).tracked == 2
    assert list_bucket(store, url).manifests[2] == read_manifest(directory / "iter_0000002")
    shutil.rmtree(directory)
    choice = choose(CheckpointConfig(load=str(directory), save=str(directory), mirror=str(url)))
    assert (choice.outcome, choice.iteration) == ("resume", 2), choice
    server.rules()
    again = several(
        2,
        (4, {"load": str(url), "integrity": "full"}),
        (4, {"load": str(url), "fully_parallel_load": True}),
        (4, {"load": str(url / "iter_0000002"), "io_backend": "stock"}),
        (4, {"load": str(directory), "save": str(directory), "mirror": str(url), "async_save": True}),
        (2, {"load": str(url), "ckpt_step": 1}),
    )
    for rank in (0, 1):
        for found in again[rank][:4]:
            assert isinstance(found, dict), found
            assert found["started at"] == 2
            assert found["loaded from"] == f"{url}/iter_0000002"
            assert found["digests"] == whole[rank][0]["digests"]
        assert again[rank][4] == (
            f"CheckpointNotFoundError: checkpoint.load: iteration 1 cannot be loaded from {url}: it is not there; "
            "whole are 2, 4"
        )
    assert first[0][0]["iteration"] == 2
    assert require_truthful(store, url) == {2, 4}
    assert list((tmp_path / "temporary").glob("bridge-objects-*")) == [], "what was downloaded is deleted"


def test_a_run_that_saves_to_a_bucket_counts_what_is_there(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    staging = tmp_path / "staging"
    settings = {"save": str(url), "load": str(url), "staging_dir": str(staging), "staging_keep": 1, "save_interval": 1}
    found = several(1, (3, {**settings, "most_recent_k": 2}), (4, settings))[0]
    assert [each if isinstance(each, str) else each["started at"] for each in found] == [0, 3]
    assert found[1]["loaded from"] == str(staging / "iter_0000003")
    assert require_truthful(store, url) == {2, 3, 4}
    # That of iteration 3 goes as soon as it is known to be in the bucket, which may be after the last save.
    assert {path.name for path in staging.glob("iter_*")} in ({"iter_0000004"}, {"iter_0000003", "iter_0000004"})
    shutil.rmtree(staging)
    moved = several(1, (5, {**settings, "staging_dir": str(tmp_path / "other")}))[0][0]
    assert moved["started at"] == 4
    assert moved["loaded from"] == f"{url}/iter_0000004"
    assert list_bucket(store, url).tracked == 5


def test_a_bucket_that_cannot_be_written_fails_a_save_there_and_not_a_mirror(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    server.rules({"match": "PUT", "do": "status:403"})
    mirror = {"save": str(tmp_path / "a"), "mirror": str(url)}
    found = several(
        2,
        (2, mirror),
        (2, {**mirror, "mirror_required": True}),
        (2, {"save": str(url), "staging_dir": str(tmp_path / "b")}),
        (2, {"save": str(url), "staging_dir": str(tmp_path / "c"), "save_interval": 1, "staging_keep": 1}),
    )
    for rank in (0, 1):
        assert found[rank][0]["iteration"] == 2
        for error in found[rank][1:3]:
            assert error.startswith(f"{CheckpointSaveError.__name__}: the checkpoint of iteration 2 is in {tmp_path}/")
            assert f"and not in {url}: PutObject of {url}/.bridge-owner failed: status 403" in error
        # The second save waits for the first one's upload, which fails, and is made all the same.
        assert found[rank][3].startswith(
            f"{CheckpointSaveError.__name__}: the checkpoint of iteration 1 is in {tmp_path}"
        )
    assert [path.name for path in sorted((tmp_path / "c").glob("iter_*"))] == ["iter_0000001", "iter_0000002"]
    server.rules()
    assert require_truthful(store, url) == set()


def test_a_damaged_checkpoint_in_a_bucket_is_passed_over(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    several(1, (2, {"save": str(tmp_path / "run"), "save_interval": 1, "mirror": str(url)}))
    store.put(url.key("iter_0000002", "__0_0.distcp"), b"short")
    found, refused = several(1, (2, {"load": str(url)}), (2, {"load": str(url), "fallback": False}))[0]
    assert (found["started at"], found["loaded from"]) == (1, f"{url}/iter_0000001")
    assert refused.startswith(
        f"CheckpointDamagedError: {url}/iter_0000002 is damaged: __0_0.distcp has 5 bytes instead"
    )


def test_a_directory_that_is_renamed_keeps_its_place_and_a_copy_gets_an_empty_one_only(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    first, renamed, copied = (str(tmp_path / name) for name in ("a", "b", "c"))
    several(1, (2, {"save": first, "mirror": str(url)}))
    shutil.copytree(first, copied)
    Path(first).rename(renamed)
    found = several(
        1,
        (3, {"save": copied, "load": copied, "mirror": str(url)}),
        (3, {"save": renamed, "load": renamed, "mirror": str(url)}),
    )[0]
    assert found[0].startswith(f"DirectoryInUseError: checkpoint.mirror: {url} belongs to another run (host ")
    assert found[1]["started at"] == 2
    assert require_truthful(store, url) == {2, 3}
    owner = store.get(url.key(OWNER))
    store.delete(sorted(contents(store, url)))
    store.put(url.key(OWNER), owner)
    several(1, (3, {"save": copied, "load": copied, "mirror": str(url)}))
    assert require_truthful(store, url) == {2, 3}


def test_a_run_is_refused_at_the_place_of_another_unless_it_goes_on_from_there(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    first, second = ({"save": str(tmp_path / name), "mirror": str(url)} for name in ("a", "b"))
    found = several(
        2,
        (2, first),
        (2, second),
        (2, {"save": str(url), "staging_dir": str(tmp_path / "c")}),
        (3, {**second, "load": second["save"]}),
    )
    for rank in (0, 1):
        assert found[rank][0]["iteration"] == 2
        for error, setting in zip(found[rank][1:3], ("mirror", "save"), strict=True):
            assert error.startswith(f"DirectoryInUseError: checkpoint.{setting}: {url} belongs to another run (host ")
            assert f"directory {first['save']}, since " in error
            assert error.endswith(f"and this one is to have it, delete the object {url}/.bridge-owner")
        assert (found[rank][3]["started at"], found[rank][3]["loaded from"]) == (2, f"{url}/iter_0000002")
    assert not list((tmp_path / "c").glob("iter_*"))
    assert require_truthful(store, url) == {2, 3}
    owner = read_owner(store, url)
    assert owner is not None
    assert owner.directory == second["save"]
    kinds = [type(event) for event in read_events(tmp_path / "b").events]
    assert kinds.count(UploadStarted) == kinds.count(UploadFinished) == 1
