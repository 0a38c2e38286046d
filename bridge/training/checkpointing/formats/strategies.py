"""megatron-core's load strategies: which one a checkpoint needs, by the backend and version in its `metadata.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedObject
from megatron.core.dist_checkpointing.strategies.base import (
    LoadShardedStrategy,
    SaveShardedStrategy,
    StrategyAction,
    default_strategies,
    get_default_strategy,
)
from megatron.core.dist_checkpointing.validation import verify_checkpoint_and_load_strategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.formats.failures import unreadable
from bridge.training.checkpointing.formats.objects import read_object, stored_objects
from bridge.training.checkpointing.formats.registry import format_to_read
from bridge.training.checkpointing.io.elsewhere import Shards
from bridge.training.checkpointing.io.strategy import IoBackend, reading_strategy
from bridge.training.checkpointing.layout import MCORE_METADATA
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.safe_globals import describe

_LARGEST_METADATA = 1 << 16
"""Bytes."""


@dataclass(frozen=True)
class Backend:
    """What `metadata.json` says of how the shards are stored."""

    name: str
    version: int


def stored_backend(path: Path) -> Backend:
    """What a checkpoint's `metadata.json` says.

    Raises:
        CheckpointDamagedError: it is absent, or is no such file.
        UnsafeCheckpointError: it is a link that leads out of the checkpoint.
    """
    file, size = contained_file(path, MCORE_METADATA)
    try:
        if size > _LARGEST_METADATA:
            raise ValueError(f"it has {size} bytes")
        content = json.loads(file.read_bytes())
        name, version = content["sharded_backend"], content.get("sharded_backend_version", 1)
        if not isinstance(name, str) or type(version) is not int:
            raise ValueError(f"its backend is {name!r}, version {version!r}")
        return Backend(name, version)
    except OSError as error:
        raise unreadable(path, describe(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{file} does not say which format the checkpoint is in: {error}") from error


def write_backend(directory: Path, backend: Backend) -> None:
    """Write `metadata.json`, anew if it is there."""
    (directory / MCORE_METADATA).unlink(missing_ok=True)
    content = asdict(CheckpointingConfig(backend.name, backend.version))
    write_file(directory / MCORE_METADATA, json.dumps(content).encode())


def load_strategy(directory: Path, io_backend: IoBackend = "direct", shards: Shards | None = None) -> Any:
    """The load strategy of a checkpoint's backend: ours, or one that a program has registered. Local.

    Args:
        directory: the checkpoint.
        io_backend: who reads the files.
        shards: those that are not in the directory; only `torch_dist` can do without them there.

    Returns:
        A strategy that loads objects too.

    Raises:
        CheckpointMismatchError: none is registered for the backend and version.
        CheckpointDamagedError: `metadata.json`, or what the strategy reads at once, is unreadable.
    """
    backend = stored_backend(directory)
    format_to_read(backend.name)  # registers its strategies
    try:
        get_default_strategy(StrategyAction.LOAD_SHARDED, backend.name, backend.version)
    except CheckpointingException as error:
        known = sorted(version for name, version in _registered(StrategyAction.LOAD_SHARDED) if name == backend.name)
        raise CheckpointMismatchError(
            f"{directory} is in version {backend.version} of the format {backend.name!r}, and "
            + (f"this reads {', '.join(map(str, known))}" if known else "no load strategy is registered for it")
        ) from error
    registered, _ = verify_checkpoint_and_load_strategy(str(directory))
    strategy = reading_strategy(registered, directory, io_backend, shards)
    return strategy if strategy.can_handle_sharded_objects else WithObjects(strategy)


def save_strategy(backend: str) -> SaveShardedStrategy | None:
    """The save strategy that is registered for a backend, of its latest version; None if there is none."""
    found = {
        version: each for (name, version), each in _registered(StrategyAction.SAVE_SHARDED).items() if name == backend
    }
    return found[max(found)] if found else None


def has_load_strategy(backend: str) -> bool:
    """Whether a load strategy is registered for any version of a backend."""
    return any(name == backend for name, _ in _registered(StrategyAction.LOAD_SHARDED))


def _registered(action: StrategyAction) -> dict[tuple[str, int], Any]:
    return dict(default_strategies[action.value])


class WithObjects(LoadShardedStrategy):  # type: ignore[misc]
    """A strategy that loads tensors only, and objects from files of their own."""

    def __init__(self, strategy: Any) -> None:
        super().__init__()
        self._strategy = strategy

    @property
    def can_handle_sharded_objects(self) -> bool:
        """It is what this is for."""
        return True

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Load objects here and tensors by the strategy. Collective over all ranks."""
        directory = Path(checkpoint_dir)
        objects, tensors = extract_matching_values(sharded_state_dict, lambda item: isinstance(item, ShardedObject))
        values = Ranks.current().run(
            "reading the objects",
            lambda: {id(item): read_object(directory, item) for item in nested_values(objects)},
        )
        loaded = dict_list_map_outplace(lambda item: values[id(item)], objects)
        merge(loaded, self._strategy.load(tensors, directory))
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: Any) -> Any:
        """As the strategy's."""
        return self._strategy.load_tensors_metadata(checkpoint_dir)

    def load_sharded_metadata(self, checkpoint_dir: Any) -> Any:
        """The strategy's, with the objects by their unique keys."""
        return stored_objects(Path(checkpoint_dir)) | self._strategy.load_tensors_metadata(checkpoint_dir)

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        """As the strategy's."""
        self._strategy.check_backend_compatibility(loaded_backend)

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """As the strategy's."""
        self._strategy.check_version_compatibility(loaded_version)
