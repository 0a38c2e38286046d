"""The ways to save in the background that `training.py` compares."""

from __future__ import annotations

import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks import _gpt


class Way:
    """A way to save that does nothing yet."""

    def __init__(self, run: Any, directory: Path) -> None:
        self._run, self._directory, self._place = run, directory, directory / "0"

    def prepare(self) -> None:
        """What is not counted before a save: an empty directory."""
        self._place = self._directory / str(int(self._place.name) + 1)
        self._place.mkdir()

    def save(self) -> None:
        """Save, or begin to."""

    def is_saved(self) -> bool:
        """Look whether it is complete."""
        return True

    def clean(self) -> None:
        """Remove what was saved."""
        shutil.rmtree(self._place)

    def read(self) -> dict[str, Any]:
        """What was saved, by megatron-core's reader."""
        return _read_by_megatron(self._run, self._place)

    def close(self) -> None:
        """End what was started."""


class Copy(Way):
    """One copy of the state, which is kept in memory."""

    def __init__(self, run: Any, directory: Path) -> None:
        super().__init__(run, directory)
        self._copies = {name: tensor.clone() for name, tensor in self._tensors().items()}
        self._found: dict[str, Any] = {}

    def prepare(self) -> None:
        super().prepare()
        self._found = self._tensors()

    def save(self) -> None:
        for name, tensor in self._found.items():
            self._copies[name].copy_(tensor)

    def read(self) -> dict[str, Any]:
        return self._copies

    def _tensors(self) -> dict[str, Any]:
        return _gpt.tensors_of(_gpt.sharded_state(self._run))


class CopyAndWrite(Copy):
    """One copy of the state; and a process that writes as many bytes to storage, which it always had."""

    def __init__(self, run: Any, directory: Path) -> None:
        super().__init__(run, directory)
        size = sum(tensor.nbytes for tensor in self._copies.values())
        command = [sys.executable, "-c", _WRITER, str(size)]
        self._writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._answer()

    def save(self) -> None:
        super().save()
        assert self._writer.stdin is not None  # noqa: S101
        self._writer.stdin.write(f"{self._place / 'bytes'}\n")

    def is_saved(self) -> bool:
        if not select.select([self._writer.stdout], [], [], 0)[0]:
            return False
        self._answer()
        return True

    def close(self) -> None:
        self._writer.communicate()

    def _answer(self) -> None:
        assert self._writer.stdout is not None  # noqa: S101
        if self._writer.stdout.readline() != "done\n":
            raise RuntimeError("the process that writes has ended")


_WRITER = """
import mmap, os, sys
size, block = int(sys.argv[1]), 4 << 20
memory = mmap.mmap(-1, -(-size // block) * block)
memory.write(os.urandom(block) * (len(memory) // block))
view = memoryview(memory)
print("done", flush=True)
for path in sys.stdin:
    file = os.open(path.strip(), os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    for at in range(0, len(view), block):
        os.pwrite(file, view[at : at + block], at)
    os.fsync(file)
    os.close(file)
    print("done", flush=True)
"""


class Manager(Way):
    """This project's: it makes its directories and removes older checkpoints by itself."""

    def prepare(self) -> None:
        pass

    def save(self) -> None:
        _gpt.save(self._run)

    def is_saved(self) -> bool:
        return _gpt.is_saved(self._run)

    def clean(self) -> None:
        pass

    def read(self) -> dict[str, Any]:
        (place,) = Path(self._run.cfg.checkpoint.save).glob("iter_*")
        return _read_by_megatron(self._run, place)

    def close(self) -> None:
        self._run.manager.finalize_async_saves(self._run.state, blocking=True, terminate=True)


class Megatron(Way):
    """megatron-core's, with its queue."""

    def __init__(self, run: Any, directory: Path) -> None:
        super().__init__(run, directory)
        self._megatron = _gpt.Megatron(run)

    def save(self) -> None:
        self._megatron.save(self._place, background=True)

    def is_saved(self) -> bool:
        return self._megatron.is_saved()

    def close(self) -> None:
        self._megatron.close()


class Dcp(Way):
    """torch DCP's. The state dict is made beforehand, because its users make it in another way."""

    def __init__(self, run: Any, directory: Path, *, process: bool) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        super().__init__(run, directory)
        self._kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=process,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._state: dict[str, Any] = {}
        self._future: Any = None

    def prepare(self) -> None:
        super().prepare()
        self._state = _gpt.tensors_of(_gpt.sharded_state(self._run))

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        self._future = dcp.async_save(
            self._state,
            checkpoint_id=self._place,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )

    def is_saved(self) -> bool:
        future = getattr(self._future, "upload_completion", self._future)
        if future.done():
            future.result()
            return True
        return False

    def read(self) -> dict[str, Any]:
        import torch
        import torch.distributed.checkpoint as dcp

        loaded = {name: torch.empty_like(tensor) for name, tensor in self._state.items()}
        dcp.load(loaded, checkpoint_id=self._place)
        return loaded

    def close(self) -> None:
        self._stager.close()


def _read_by_megatron(run: Any, place: Path) -> dict[str, Any]:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = _gpt.sharded_state(run)
    apply_factories(state)
    wanted = {}
    for item in nested_values(state):
        if isinstance(item, ShardedTensor):
            item.data = torch.empty_like(item.data)
            wanted[f"{item.key}/{item.global_offset}"] = item
    loaded = dist_checkpointing.load(wanted, str(place))
    return {name: loaded[name] for name in wanted}
