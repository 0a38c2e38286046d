"""The commands that look, at a place in object storage; and those that write, which refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("moto")

from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.upload import upload_checkpoint
from bridge.training.object_url import ObjectUrl
from tests.cli.commands import run_all, write_recipe
from tests.training.checkpointing.objects.store import QUICK, Server, contents, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as found:
        yield found


@pytest.fixture
def url(server: Server, trained: Path) -> ObjectUrl:
    """The run of `trained` in a bucket."""
    place = ObjectUrl(server.bucket(), "runs/mine")
    store = ObjectStore(place.bucket, QUICK)
    for iteration in (2, 4, 6):
        upload_checkpoint(store, place, trained / f"iter_000000{iteration}")
    server.rules()
    return place


def shards_read(server: Server) -> list[str]:
    """What was requested of shards."""
    return [line for line in server.seen() if ".distcp" in line and line.startswith("GET")]


def test_looking_at_a_run_in_a_bucket(server: Server, url: ObjectUrl, trained: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    before = contents(ObjectStore(url.bucket, QUICK), url)
    server.rules()
    listed, plain, one, by_recipe, doctor, doctor_json, inspected, here = run_all(
        ["ls", url, "--json"],
        ["ls", url],
        ["ls", url / "iter_0000004", "--json"],
        ["ls", url, "--recipe", recipe, "--set", "checkpoint.ckpt_step=2", "--json"],
        ["doctor", url],
        ["doctor", url, "--recipe", recipe, "--json"],
        ["inspect", url, "--json"],
        ["inspect", trained, "--json"],
    )
    rows = listed.json["checkpoints"]
    assert [(row["iteration"], row["state"], row["tracked"], row["is_loaded"]) for row in rows] == [
        (2, "committed", False, False),
        (4, "committed", False, False),
        (6, "committed", True, True),
    ]
    assert rows[2]["path"] == listed.json["resume"]["path"] == f"{url}/iter_0000006"
    assert "url" not in rows[2]
    assert plain.status == 0
    assert f"A run that loads {url} resumes from iteration 6: the trackers in the bucket name it.\n" in plain.out
    assert "To go back to an earlier one, start the run with checkpoint.ckpt_step=4\n" in plain.out
    assert f"To check that all are sound: bridge-ckpt verify {url}\n" in plain.out
    assert [row["iteration"] for row in one.json["checkpoints"]] == [4]
    assert one.json["resume"]["iteration"] == 4
    assert by_recipe.json["resume"]["reason"] == "iteration 2 was asked for"
    assert doctor.status == 0, doctor
    assert "ok      latest_train_state.pt names iter_0000006\n" in doctor.out
    assert "would restore of it:\n" in doctor.out
    assert doctor_json.json["is_well"]
    assert doctor_json.json["plan_of"] == "a run of the recipe"
    assert inspected.json["entry"]["path"] == f"{url}/iter_0000006"
    for name in ("tensors", "objects", "common", "config", "parts", "files"):
        assert inspected.json[name] == here.json[name], name
    assert shards_read(server) == []
    assert contents(ObjectStore(url.bucket, QUICK), url) == before


def test_verify_reads_every_object_and_names_what_is_wrong(server: Server, url: ObjectUrl) -> None:
    store = ObjectStore(url.bucket, QUICK)
    sound, quick, only = run_all(
        ["verify", url, "--json"], ["verify", url, "--level", "sizes"], ["verify", url, "--step", 5]
    )
    assert (sound.status, sound.json["is_sound"], sound.json["directory"]) == (0, True, str(url))
    assert [each["path"] for each in sound.json["checkpoints"]] == [f"{url}/iter_000000{n}" for n in (2, 4, 6)]
    assert quick.out.endswith("3 checkpoints, all sound as far as sizes and small files tell\n")
    assert only == (1, "", f"error: --step: 5 is not in {url} (there: 2, 4, 6)\n")
    shard = bytearray(store.get(url.key("iter_0000006", "__0_0.distcp")))
    shard[len(shard) // 2] ^= 0xFF
    store.put(url.key("iter_0000006", "__0_0.distcp"), bytes(shard))
    store.put(url.key("iter_0000004", "common.pt"), b"short")
    store.put(url.key("latest_checkpointed_iteration.txt"), b"8")
    full, sizes, listed, doctor = run_all(
        ["verify", url], ["verify", url, "--level", "sizes"], ["ls", url], ["doctor", url]
    )
    assert full.status == 1
    lines = full.out.splitlines()
    assert lines[0].startswith("iter_0000002  sound  ")
    assert lines[1].startswith("iter_0000004  DAMAGED  common.pt has 5 bytes instead of ")
    assert lines[2].startswith("iter_0000006  DAMAGED  __0_0.distcp has xxh3 ")
    assert lines[3] == (
        f"DAMAGED TRACKER: {url}/latest_checkpointed_iteration.txt names iteration 8, which is not whole there"
    )
    assert lines[4] == "2 of 3 checkpoints NOT SOUND"
    assert sizes.status == 1
    assert "iter_0000006  sound  " in sizes.out
    assert "resumes from iteration 6" in listed.out
    assert doctor.status == 1
    assert "PROBLEM s3://" in doctor.out


def test_only_what_has_its_marker_counts(server: Server, url: ObjectUrl) -> None:
    store = ObjectStore(url.bucket, QUICK)
    store.delete([url.key("iter_0000006", "manifest.json")])
    store.put(url.key("iter_0000004", "common.pt"), b"short")
    empty = ObjectUrl(url.bucket, "nothing")
    listed, as_json, verified, unfinished, doctor, nothing, sound = run_all(
        ["ls", url],
        ["ls", url, "--json"],
        ["verify", url, "--quiet"],
        ["inspect", url / "iter_0000006"],
        ["doctor", url],
        ["ls", empty],
        ["verify", empty],
    )
    assert [row["iteration"] for row in as_json.json["checkpoints"]] == [2, 4]
    assert as_json.json["leftovers"] == ["iter_0000006"]
    resume = as_json.json["resume"]
    assert resume["iteration"] == 2
    assert resume["reason"] == "it is the newest whole one in the bucket, whose trackers name no whole one"
    assert resume["passed_over"][0].startswith(f"{url}/iter_0000004 is damaged: common.pt has 5 bytes")
    assert "note: iteration 6 has objects and no marker: an upload or a deletion that did not end" in listed.out
    assert verified.status == 1
    assert "iter_0000006" not in verified.out.replace("names iteration 6", "")
    assert unfinished.status == 1
    assert "its upload, or its deletion, did not end; whole are 2, 4" in unfinished.err
    assert doctor.status == 1
    assert nothing.out.splitlines()[-1] == f"A run that loads {empty} starts FROM SCRATCH: there is no checkpoint."
    assert sound == (1, "", f"error: there is no checkpoint in {empty}; name a place of checkpoints\n")


def test_a_damaged_newest_checkpoint_is_passed_over_as_a_run_would(server: Server, url: ObjectUrl) -> None:
    store = ObjectStore(url.bucket, QUICK)
    store.put(url.key("iter_0000006", "__0_0.distcp"), b"short")
    (found,) = run_all(["ls", url, "--json"])
    assert found.json["resume"]["iteration"] == 4
    assert found.json["resume"]["passed_over"][0].startswith(f"{url}/iter_0000006 is damaged: __0_0.distcp has 5 bytes")


def test_a_store_that_refuses_is_one_line(server: Server, url: ObjectUrl) -> None:
    server.rules({"match": "GET", "do": "status:403"})
    refused, secret = run_all(["ls", url], ["ls", "s3://key:secret@bucket/run"])
    assert refused.status == 1
    assert refused.err.startswith(f"error: ListObjectsV2 of {url}/ failed: status 403, AccessDenied; allow s3:")
    assert secret.status == 2
    assert "holds credentials" in secret.err
    assert "secret@" not in secret.err


def test_commands_that_write_say_what_to_do_instead(tmp_path: Path) -> None:
    url = "s3://bucket/run"
    expected = {
        ("repair", url): f"repair works with directories: the next run that uploads to {url} removes remains",
        ("prune", url, "--most-recent-k", "1"): "prunes it by its own settings, as checkpoint.most_recent_k",
        ("diff", url, tmp_path): f"copy it to a directory, as with: aws s3 sync {url} DIR",
        ("convert", url, tmp_path, "--format", "zarr"): f"copy it to a directory, as with: aws s3 sync {url} DIR",
        ("export", tmp_path, url): f"name a directory, and copy it afterwards, as with: aws s3 sync DIR {url}",
        ("average", tmp_path, url, "--last", "2"): f"as with: aws s3 sync DIR {url}",
        ("rescue", url): "name the run's checkpoint.staging_dir",
        ("report", url, "-o", "page.html"): "name the directory that the run writes to",
    }
    for found, (line, text) in zip(run_all(*map(list, expected)), expected.items(), strict=True):
        assert found.status == 2, line
        assert f"{url} is a place in object storage, and {line[0]} works with directories: " in found.err
        assert text in found.err, line
