"""Files of torch DCP that this project's own writer writes: laid out when a save is planned, written when it is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.checksums import DEFAULT
from bridge.training.checkpointing.collector import without_collector
from bridge.training.checkpointing.failed_steps import step
from bridge.training.checkpointing.formats.planning import PlannedFile
from bridge.training.checkpointing.formats.values import stored_objects, stored_tensor
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.io.framing import Frames
from bridge.training.checkpointing.io.image import FileContents, FileImage, lay_out, results_of
from bridge.training.checkpointing.io.writing import write_images


@dataclass(frozen=True)
class DirectWrite:
    """This rank's files. Tensors are those of the run: they are read when they are written."""

    lay_out: Callable[[], list[FileImage]]
    directory: Path
    report: Callable[[list[FileImage]], Any]
    """Makes of the files, laid out, what goes to rank 0."""

    @classmethod
    def of(
        cls,
        files: Callable[[], Iterable[FileContents]],
        directory: Path,
        frames: Frames,
        report: Callable[[list[FileImage]], Any] = results_of,
    ) -> DirectWrite:
        """Files that are laid out when they are first asked for: by then, what goes into them must not have changed.

        Args:
            files: what they hold.
            directory: that they go into.
            frames: what is known of records.
            report: makes of the files, laid out, what goes to rank 0; torch's write results unless something else does.
        """
        return cls(lambda: [lay_out(contents, frames) for contents in files()], directory, report)

    @cached_property
    def images(self) -> list[FileImage]:
        """The files, laid out. Local; what fails is told as a step of its own."""
        with step("staging what this rank writes"), without_collector():
            return self.lay_out()

    def write(self, checksum: str = DEFAULT) -> tuple[list[FileRecord | str], Any]:
        """Write and sync the files; return their records and the result for rank 0."""
        return [*write_images(self.images, self.directory, checksum)], self.result()

    @property
    def is_on_host(self) -> bool:
        """Whether all tensors are in host memory: a fork of this process can then write them, too."""
        return all(part.tensor.is_cpu for image in self.images for part in image.tensors)

    def result(self) -> Any:
        """What rank 0 has to know of the files. It is known before anything is written."""
        with without_collector():
            return self.report(self.images)


def contents_of(files: Iterable[PlannedFile], state: Sequence[Any]) -> list[FileContents]:
    """What a plan's files hold, taken from a rank's state."""
    return [
        FileContents(
            file.name,
            [(item.index, stored_tensor(state[place])) for item, place in file.tensors],
            [
                (item.index, stored_objects(state[place] for place in places).getbuffer())
                for item, places in file.objects
            ],
        )
        for file in files
    ]
