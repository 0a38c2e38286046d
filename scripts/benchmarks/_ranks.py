"""Ranks for benchmarks: forked processes that import nothing again, and clocks that all of them agree on."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def free_port() -> int:
    """A port that nobody listens at, from below those that the kernel gives to connections: others make many."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun would set for this process."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in found.items()}, MASTER_ADDR="127.0.0.1")


def leave() -> NoReturn:
    """End this process and the servers that libraries have started in it, without waiting for their threads."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    os._exit(0)


def crash() -> NoReturn:
    """End this process alone. What is meant to outlive a trainer goes on."""
    os._exit(0)


def on_ranks(work: Callable[..., Any], ranks: int, *arguments: Any, end: Callable[[], NoReturn] = leave) -> Any:
    """Call `work` on forked ranks, which import nothing again, and `end` after it.

    Returns:
        What rank 0 returns, by way of JSON.
    """
    from torch.multiprocessing import start_processes

    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        given = (work, ranks, free_port(), result, arguments, end)
        start_processes(_rank, given, ranks, start_method="fork")
        return json.loads(result.read_text())


def _rank(
    rank: int,
    work: Callable[..., Any],
    ranks: int,
    port: int,
    result: Path,
    arguments: Any,
    end: Callable[[], NoReturn],
) -> None:
    import torch
    import torch.distributed as dist

    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    become_rank(rank, ranks, port)
    found = work(*arguments)
    if rank == 0:
        result.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
    end()


def timed(action: Callable[[], Any]) -> float:
    """Seconds until the slowest rank has finished. Collective."""
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    action()
    return slowest(time.perf_counter() - begun)


def slowest(seconds: float) -> float:
    """The most of all ranks. Collective."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def read_into_cache(directory: Path) -> None:
    """Have what a directory of checkpoints holds in the page cache; rank 0 does it for all."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        buffer = bytearray(8 << 20)
        for path in directory.glob("iter_*/*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass


def import_all() -> None:
    """Import what forked ranks need."""
    from bridge import accelerator

    accelerator.enable()
    import megatron.core  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401

    import bridge.training.train  # noqa: F401
