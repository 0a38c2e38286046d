"""The S3 server of a test session, checkpoints to upload, and what a bucket must look like at any instant."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.integrity import FileRecord, Manifest, write_manifest
from bridge.training.checkpointing.layout import iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import list_bucket
from bridge.training.checkpointing.objects.transfer import TransferOptions
from bridge.training.object_url import ObjectUrl

QUICK = TransferOptions(
    threads=3, part_bytes=1 << 20, connect_seconds=5, read_seconds=3, tries=4, first_wait=0.01, longest_wait=0.05
)
"""Small parts and short waits."""
PATIENT = replace(QUICK, read_seconds=60)
"""For a server that answers in the end, on a machine that does many other things."""


class Server:
    """The server, and what can be told to the proxy in front of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._buckets = 0

    def rules(self, *rules: dict[str, Any]) -> None:
        """Give the proxy its rules, see `s3_server`, and forget what it has seen."""
        request = urllib.request.Request(f"{self.url}/_rules", json.dumps(rules).encode(), method="PUT")
        urllib.request.urlopen(request, timeout=60).close()

    def seen(self) -> list[str]:
        """The requests since the rules were given."""
        with urllib.request.urlopen(f"{self.url}/_seen", timeout=60) as answer:
            return json.loads(answer.read())

    def bucket(self) -> str:
        """A new, empty bucket."""
        self._buckets += 1
        name = f"bucket-{os.getpid()}-{self._buckets}"
        self.rules()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT"), timeout=60).close()
        return name


@contextmanager
def running_server() -> Iterator[Server]:
    """Start the server, and point AWS tools of this process and those that it starts at it."""
    program = Path(__file__).with_name("s3_server.py")
    environment = {**os.environ, "PYTHONPATH": ""}
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-see",
        "AWS_SESSION_TOKEN": "a-token-that-nobody-may-see",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }
    before = {name: os.environ.get(name) for name in (*settings, "AWS_ENDPOINT_URL_S3")}
    try:
        url = json.loads(process.stdout.readline())["url"]
        os.environ.update(settings, AWS_ENDPOINT_URL_S3=url)
        yield Server(url)
    finally:
        process.stdin.close()
        process.wait(timeout=20)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_checkpoint(
    directory: Path, iteration: int, *, seed: int = 0, large: int = (2 << 20) + 77, created: float | None = None
) -> Path:
    """Write an `iter_N` of random bytes with a manifest, and the trackers beside it."""
    path = directory / iteration_name(iteration)
    draw = random.Random(f"{iteration} {seed}")
    sizes = {"train_state.pt": 300, "common.pt": 1000, ".metadata": 2000, "tokenizer/vocab.txt": 10, "empty": 0}
    sizes |= {"__0_0.distcp": large, "__1_0.distcp": 4096}
    path.mkdir(parents=True)
    for name, size in sizes.items():
        file = path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(draw.randbytes(size))
    files = tuple(FileRecord.of(path, name) for name in sorted(sizes))
    created = float(iteration) if created is None else created
    write_manifest(path, Manifest(iteration, "torch_dist", 2, {}, {}, files, created=created))
    (directory / "latest_train_state.pt").write_bytes((path / "train_state.pt").read_bytes())
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def contents(store: ObjectStore, url: ObjectUrl) -> dict[str, bytes]:
    """All objects below a place, by what follows it in their keys."""
    home = url.key()
    return {found.key[len(home) :]: store.get(found.key) for found in store.objects(home)}


def files_below(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def require_truthful(store: ObjectStore, url: ObjectUrl) -> set[int]:
    """Hold every checkpoint that the listing calls whole against its manifest, and the trackers against it.

    Returns:
        The whole checkpoints.
    """
    listing = list_bucket(store, url)
    assert listing.unreadable == {}
    objects = contents(store, url)
    for iteration, manifest in listing.manifests.items():
        name = iteration_name(iteration)
        found = {key.removeprefix(f"{name}/"): data for key, data in objects.items() if key.startswith(f"{name}/")}
        assert found.keys() == {record.name for record in manifest.files} | {"manifest.json"}
        for record in manifest.files:
            assert checksums.of_bytes(found[record.name], record.kind) == record.checksum, record.name
    assert listing.named <= listing.manifests.keys(), "a tracker names what is not whole"
    assert (listing.tracked is not None) or not listing.has_tracker
    return set(listing.iterations)
