"""A megatron-core save strategy for `torch_dist` that plans a structure once and writes straight from memory.

megatron-core plans every save anew, serializes tensor by tensor, and lets a forked process do so in the background,
which costs training a copy of every page that it touches meanwhile. Here an asynchronous save copies the state once,
and a process that is there for it writes the copy.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.checksums import DEFAULT
from bridge.training.checkpointing.files import sync_directory, sync_file
from bridge.training.checkpointing.formats.direct import DirectWrite, contents_of
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.formats.planning import Plan, SavePlanning, make_plan
from bridge.training.checkpointing.formats.prepared import prepare
from bridge.training.checkpointing.io.background_writer import BackgroundWriter, Files, Patience, Writing

logger = logging.getLogger(__name__)

_WRITING = "writing the files of the checkpoint"


class TorchDistSaveStrategy(AsyncSaveShardedStrategy):  # type: ignore[misc]
    """A save strategy for megatron-core: `dist_checkpointing.save(state_dict, directory, strategy)`.

    Keep it and use it again: it remembers the plan, which holds as long as no rank's structure changes (that is
    compared, not assumed), and for asynchronous saves it keeps the memory and the process. The files are those of
    megatron-core's own strategy. A failure on one rank is raised on all.
    """

    def __init__(self, files_per_rank: int = 1, patience: Patience | None = None) -> None:
        """
        Args:
            files_per_rank: that each rank writes at the same time.
            patience: how long an asynchronous save may make no progress, and whether storage is tried again.
        """
        super().__init__("torch_dist", 1)
        self._files = files_per_rank
        self._patience = patience or Patience()
        self._planning = SavePlanning()
        self._writer = BackgroundWriter()

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Whether objects are saved too."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Save, and return when storage has it. Collective.

        Raises:
            CheckpointSaveError: a rank could not write, or the shards do not make up whole tensors.
        """
        ranks = Ranks.current()
        direct, rest = self._plan(sharded_state_dict, Path(checkpoint_dir), ranks)
        rest.finish(ranks.run(_WRITING, lambda: direct.write()[1]), ranks)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """Copy what is to be saved and have it written. Collective; when it returns, the state may change.

        Returns:
            What waits for the writing, and completes the checkpoint. Hand it to megatron-core's `AsyncCallsQueue`, or
            wait and call its finalize functions, on all ranks.

        Raises:
            CheckpointSaveError: as `save`.
        """
        ranks, directory = Ranks.current(), Path(checkpoint_dir)
        direct, rest = self._plan(sharded_state_dict, directory, ranks)
        writing, end = self._begin(direct, directory, ranks)
        result = direct.result()

        def finalize() -> None:
            with contextlib.suppress(OSError):
                os.close(end)
            now = Ranks.current()
            now.run(_WRITING, lambda: None if writing is None else writing.result())
            rest.finish(result, now)

        # The process that megatron-core lets wait may have been started in another way than by a fork.
        return AsyncRequest(wait_for_writer, (f"/proc/{os.getpid()}/fd/{end}",), [finalize])

    def close(self) -> None:
        """Give up the memory and the process of asynchronous saves; a later one has others."""
        self._writer.close()

    def _begin(self, direct: DirectWrite, directory: Path, ranks: Ranks) -> tuple[Writing[None] | None, int]:
        """Have files written, or write them where there can be no process for it; return what lets wait for it."""
        end, done = os.pipe()
        begun: list[Writing[None] | None] = []

        def begin() -> None:
            files = Files(direct.images, (), directory, DEFAULT)
            begun.append(self._writer.write(files, "the background writer", self._patience, lambda *_: None, done))
            if begun[0] is None:
                logger.warning("the checkpoint is written before training goes on")
                direct.write()

        try:
            ranks.run("beginning to write", begin)
        except BaseException:
            # Another rank could not: nobody would wait for what this one has begun.
            for writing in begun:
                if writing is not None:
                    writing.kill()
            os.close(end)
            raise
        finally:
            os.close(done)
        return begun[0], end

    def _plan(self, sharded_state_dict: Any, directory: Path, ranks: Ranks) -> tuple[DirectWrite, _Rest]:
        planning = self._planning
        prepared = prepare(
            {"sharded": sharded_state_dict},
            {},
            ranks,
            planning,
            SaveOptions(writers_per_rank=self._files),
        )
        state, verdict, plan = prepared.state, prepared.verdict, planning.plan
        if plan is None or not verdict.planned:
            plan = make_plan(state, ranks, planning, verdict, writers=self._files, group=None)
        planning.note(prepared.structure, verdict, plan)
        files = plan.files
        direct = DirectWrite.of(lambda: contents_of(files, state), directory, planning.frames, plan.places)
        return direct, _Rest(plan, directory)


@dataclass(frozen=True)
class _Rest:
    """What is left to do when all ranks have written."""

    plan: Plan
    directory: Path

    def finish(self, result: Any, ranks: Ranks) -> None:
        """Write what needs the results of all ranks. Collective."""
        results = ranks.gather_first("collecting what every rank wrote", result)

        def complete() -> None:
            for name in self.plan.finish(self.directory, results or []):
                sync_file(self.directory / name)
            sync_directory(self.directory)

        ranks.first("completing the checkpoint", complete)


def wait_for_writer(end: str) -> None:
    """Wait until the writer process lets go of a pipe: when it has written, has failed, or is dead.

    Args:
        end: path of the pipe's other end.
    """
    with contextlib.suppress(FileNotFoundError), Path(end).open("rb", buffering=0) as stream:
        while stream.read(1):
            pass
