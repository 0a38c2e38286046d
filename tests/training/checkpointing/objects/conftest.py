from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("moto")

from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.object_url import ObjectUrl
from tests.training.checkpointing.objects.store import QUICK, Server, running_server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with running_server() as found:
        yield found


@pytest.fixture
def url(server: Server) -> ObjectUrl:
    return ObjectUrl(server.bucket(), "runs/one")


@pytest.fixture
def store(url: ObjectUrl) -> ObjectStore:
    return ObjectStore(url.bucket, QUICK)
