"""The manager: the protocol that the training loop knows, the default implementation, and the factory."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bridge.training.callbacks import CallbackManager
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.loading import load_checkpoint
from bridge.training.checkpointing.objects.places import save_directory
from bridge.training.checkpointing.objects.run import finish_uploads, longest_wait
from bridge.training.checkpointing.ownership import WAIT_SECONDS, announce_end
from bridge.training.checkpointing.preparing import release
from bridge.training.checkpointing.queue import maybe_finalize_async_save
from bridge.training.checkpointing.retention.trash import FINISH_SECONDS, Trash, trash_of
from bridge.training.checkpointing.saving import save_checkpoint
from bridge.training.checkpointing.warming import WarmUp

_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_METHODS = ("save", "load", "finalize_async_saves")


@dataclass
class CheckpointSaveContext:
    """Everything that a save needs."""

    state: Any
    """GlobalState: configuration, train state, tokenizer and queue."""
    model: list[Any]
    """Model chunks of this rank."""
    optimizer: Any | None
    """megatron-core optimizer; None for a checkpoint without one."""
    opt_param_scheduler: Any | None
    """Its parameter scheduler."""
    num_floating_point_operations_so_far: int
    """FLOPs spent so far."""
    train_data_iterator: Any | None = None
    """Data iterator; its state is saved if it has a `save_state` method."""
    non_persistent_ckpt: bool = False
    """Whether to save a non-persistent checkpoint."""
    pg_collection: Any | None = None
    """Process groups; by default those of megatron-core's parallel_state."""
    module_name: str | None = None
    """Puts the random states' key into a namespace."""


@dataclass
class CheckpointLoadContext:
    """Everything that a load needs."""

    state: Any
    """GlobalState: configuration and train state; the latter is replaced by the loaded one."""
    model: list[Any]
    """Model chunks of this rank, loaded in place."""
    optimizer: Any | None
    """megatron-core optimizer, loaded in place."""
    opt_param_scheduler: Any | None
    """Its parameter scheduler, loaded in place."""
    strict: bool = True
    """As in `torch.nn.Module.load_state_dict`."""
    skip_load_to_model_and_opt: bool = False
    """Whether to load only metadata and leave model and optimizer alone."""
    pg_collection: Any | None = None
    """Process groups; by default those of megatron-core's parallel_state."""
    module_name: str | None = None
    """The namespace of the random states' key."""


@runtime_checkable
class CheckpointManager(Protocol):
    """What the training loop asks of a checkpoint manager. All methods are called on every rank."""

    def __init__(self, checkpoint_config: Any) -> None:
        """Take the checkpoint configuration."""

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint, or begin to."""

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load a checkpoint; return (iteration, FLOPs so far), (0, 0) if there was none to load."""

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """Finish asynchronous saves: those that are ready, or with `blocking` all of them."""


class DefaultCheckpointManager:
    """The manager that `save_checkpoint` and `load_checkpoint` make up."""

    def __init__(self, checkpoint_config: Any) -> None:
        self.checkpoint_config = checkpoint_config
        self._context: dict[str, Any] = {}
        self._warm_up = WarmUp(checkpoint_config, self._context)

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """What is kept between saves and loads: the save strategy under `save_strategy`, for one."""
        return self._context

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint; see `save_checkpoint`."""
        save_checkpoint(
            ctx.state,
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            ctx.num_floating_point_operations_so_far,
            checkpointing_context=self._context,
            non_persistent_ckpt=ctx.non_persistent_ckpt,
            train_data_iterator=ctx.train_data_iterator,
            pg_collection=ctx.pg_collection,
            callback_manager=callback_manager,
            module_name=ctx.module_name,
        )

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load a checkpoint; see `load_checkpoint`."""
        self._warm_up.know(ctx.model, ctx.optimizer, ctx.pg_collection)
        return load_checkpoint(
            ctx.state,
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            strict=ctx.strict,
            checkpointing_context=self._context,
            skip_load_to_model_and_opt=ctx.skip_load_to_model_and_opt,
            pg_collection=ctx.pg_collection,
            module_name=ctx.module_name,
        )

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """Finish asynchronous saves; see `maybe_finalize_async_save`.

        With `terminate`, which ends a run in good order, the memory of its in-memory checkpoints is freed and the
        deletion of old checkpoints waited for as well, and so are uploads to object storage. Without `blocking`, the
        first calls also begin to make ready what the first asynchronous save needs.
        """
        if not blocking:
            self._warm_up.before_step(state)
        maybe_finalize_async_save(state, self.checkpoint_config, blocking=blocking, terminate=terminate)
        if terminate:
            trash = trash_of(self._context)
            self._announce_end(trash)
            release(self._context, Ranks.current())
            trash.finish()
            finish_uploads(self.checkpoint_config, self._context, Ranks.current())

    def _announce_end(self, trash: Trash) -> None:
        """Tell a successor that waits for the directory how long that may still take."""
        uploading = longest_wait(self.checkpoint_config, self._context)
        if self.checkpoint_config.save is not None and (uploading or not trash.is_empty):
            # What comes after both is given the time that everybody has.
            announce_end(save_directory(self.checkpoint_config), FINISH_SECONDS + uploading + WAIT_SECONDS)


def create_checkpoint_manager(checkpoint_config: Any) -> CheckpointManager:
    """Make the manager that `checkpoint.custom_manager_class` names, or the default one.

    Raises:
        ValueError: the setting is not a dotted path `module.Class`.
        ImportError: its module cannot be imported.
        AttributeError: the module has no such class.
        TypeError: the class cannot be made from a CheckpointConfig or does not implement the protocol.
    """
    name = checkpoint_config.custom_manager_class
    if name is None:
        return DefaultCheckpointManager(checkpoint_config)
    setting = f"checkpoint.custom_manager_class: {name!r}"
    if not isinstance(name, str) or not _DOTTED_PATH.fullmatch(name):
        raise ValueError(f"{setting} is not a dotted path such as 'mypackage.checkpoint.MyCheckpointManager'")
    module_name, class_name = name.rsplit(".", 1)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"{setting}: cannot import {module_name!r}: {error}") from error
    try:
        manager_class = getattr(module, class_name)
    except AttributeError as error:
        raise AttributeError(f"{setting}: the module {module_name!r} has no {class_name!r}") from error
    if not callable(manager_class):
        raise TypeError(f"{setting} is {type(manager_class).__name__}, not a class")
    manager = manager_class(checkpoint_config)
    missing = [method for method in _METHODS if not callable(getattr(manager, method, None))]
    if missing:
        raise TypeError(f"{setting} does not implement the CheckpointManager protocol: it has no {', '.join(missing)}")
    return manager  # type: ignore[no-any-return]
