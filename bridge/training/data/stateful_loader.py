"""A StatefulDataLoader of torchdata as the data iterator of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from bridge.training.data.errors import DataExhaustedError, DataStateError
from bridge.training.data.iterator import Batch


class StatefulLoader(Protocol):
    """What is needed of a loader; `torchdata.stateful_dataloader.StatefulDataLoader` has it."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class StatefulLoaderIterator(Iterator[Batch]):
    """Iterates over a loader that keeps its own position, epoch after epoch, and saves and restores it.

    The position is that of the last batch handed out, whatever worker processes have read ahead. It belongs to
    one data-parallel rank of a given size, so it cannot be divided anew: there is no `reshard_state`. What
    worker processes draw at random is not part of it; a transformation that must be the same after a resume
    takes its randomness from the sample.

    Reading never touches torch's default random numbers, on which the model's dropout depends.
    """

    def __init__(
        self,
        loader: StatefulLoader,
        *,
        epochs: int | None = None,
        set_epoch: Callable[[int], None] | None = None,
    ) -> None:
        """Start at the beginning of the loader's data.

        Args:
            loader: gives whole micro-batches. One that shuffles needs a seeded generator, so that every rank
                that shares its data-parallel rank sees the same order.
            epochs: passes over the data; None goes on for ever.
            set_epoch: told the number of each epoch, from 0, before it begins: a sampler's `set_epoch`, say.
        """
        self._loader = loader
        self._epochs = epochs
        self._set_epoch = set_epoch
        self._epoch = 0
        self._batches_of_epoch = 0
        self._stream: Iterator[Any] | None = None

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataExhaustedError: all epochs are over, or an epoch gave no batch at all.
        """
        while True:
            if self._epochs is not None and self._epoch >= self._epochs:
                raise DataExhaustedError(f"the data loader has given all its batches, {self._epochs} times over")
            if self._stream is None:
                self._stream = self._start()
            batch: Batch | None = next(self._stream, None)
            if batch is not None:
                self._batches_of_epoch += 1
                return batch
            if self._batches_of_epoch == 0:
                raise DataExhaustedError("the data loader gave no batch: its data is smaller than one micro-batch")
            self._epoch, self._batches_of_epoch, self._stream = self._epoch + 1, 0, None

    def save_state(self) -> dict[str, Any]:
        """Epoch, batches of it handed out, and the loader's own state."""
        if self._stream is None:
            self._stream = self._start()
        generator = self._generator_to_keep()
        return {
            "epoch": self._epoch,
            "batches_of_epoch": self._batches_of_epoch,
            "loader": copy.deepcopy(self._loader.state_dict()),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `save_state` gave for the same data and the same number of workers.

        Raises:
            DataStateError: it is the state of another kind of iterator.
        """
        expected = {"epoch", "batches_of_epoch", "loader"}
        if not isinstance(state, Mapping) or not expected <= state.keys():
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise DataStateError(
                f"the state of a {type(self).__name__} holds {', '.join(sorted(expected))}; found {found}. It was "
                "saved by another kind of data iterator; to start without it set "
                "checkpoint.load_dataloader_state: ignore"
            )
        self._epoch = int(state["epoch"])
        self._batches_of_epoch = int(state["batches_of_epoch"])
        self._loader.load_state_dict(copy.deepcopy(state["loader"]))
        # Begin at once: a state that does not fit this loader is then an error of loading, not of training.
        self._stream = self._start()
        generator = self._generator_to_keep()
        if generator is not None and state.get("generator") is not None:
            generator.set_state(state["generator"])

    def _generator_to_keep(self) -> torch.Generator | None:
        """The generator that a restored loader would leave in another state than the one that was saved.

        Without workers, torchdata's loader draws a number after its sampler has drawn the order of an epoch, and
        does not draw it again when it is restored: the orders of later epochs would differ.
        """
        generator: torch.Generator | None = getattr(self._loader, "generator", None)
        return generator if getattr(self._loader, "num_workers", 0) == 0 else None

    def _start(self) -> Iterator[Any]:
        if self._set_epoch is not None:
            self._set_epoch(self._epoch)
        # A loader without a generator draws a seed from the default one, which would shift the model's dropout.
        with torch.random.fork_rng(devices=[]):
            return iter(self._loader)
