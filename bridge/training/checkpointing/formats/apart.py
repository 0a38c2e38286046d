"""Taking a state dict apart into what is sharded and what all ranks share, in one pass.

The result is that of megatron-core's `save_preprocess`, which passes through the state four times.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensorFactory

State = dict[str, Any] | Callable[[], dict[str, Any]]
"""A sharded state dict; or what returns it, a local step that is told of in the next agreement if it fails."""


def state_of(state: State) -> dict[str, Any]:
    """The state dict. Local."""
    return state if isinstance(state, dict) else state()


class _Kind(Enum):
    DICT = auto()
    LIST = auto()
    SHARD = auto()
    FACTORY = auto()
    NOT_SAVED = auto()
    OTHER = auto()


_CLASSES = (
    (dict, _Kind.DICT),
    (list, _Kind.LIST),
    (ShardedTensorFactory, _Kind.FACTORY),
    (ShardedBase, _Kind.SHARD),
    (LocalNonpersistentObject, _Kind.NOT_SAVED),
)


class _Kinds(dict[type, _Kind]):
    """What to do with an object, by its class."""

    def __missing__(self, kind: type) -> _Kind:
        found = next((known for base, known in _CLASSES if issubclass(kind, base)), _Kind.OTHER)
        self[kind] = found
        return found


class TakenApart:
    """A state dict, taken apart. What factories stand for is made; what is not saved is left out."""

    def __init__(self, state_dict: dict[str, Any]) -> None:
        self.items: list[Any] = []
        """The shards and objects, in the order of `sharded`."""
        self._kinds = _Kinds()
        sharded, common, _ = self._split(state_dict)
        self.sharded: dict[str, Any] = sharded
        """The shards and objects, in the structure of the state dict."""
        self.common: dict[str, Any] = common
        """Everything else, likewise."""

    def _split(self, container: Any) -> tuple[Any, Any, bool]:
        """Shards, others, and whether anything of a container is left."""
        if self._kinds[type(container)] is _Kind.DICT:
            return self._split_dict(container)
        return self._split_list(container)

    def _split_dict(self, container: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any], bool]:
        sharded: dict[Any, Any] = {}
        common: dict[Any, Any] = {}
        is_left = not container
        kinds, items = self._kinds, self.items
        shard, other = _Kind.SHARD, _Kind.OTHER
        for key, value in container.items():
            kind = kinds[type(value)]
            if kind is _Kind.FACTORY:
                value = value.build()
                kind = kinds[type(value)]
            if kind is shard:
                sharded[key] = value
                items.append(value)
            elif kind is other:
                common[key] = value
            elif kind is _Kind.NOT_SAVED:
                continue
            else:
                inner, rest, something = self._split(value)
                if not something:
                    continue
                if inner:
                    sharded[key] = inner
                if rest or not value:
                    common[key] = rest
            is_left = True
        return sharded, common, is_left

    def _split_list(self, container: list[Any]) -> tuple[list[Any], list[Any], bool]:
        sharded: list[Any] = []
        common: list[Any] = []
        is_left = not container
        for value in container:
            kind = self._kinds[type(value)]
            if kind is _Kind.FACTORY:
                value = value.build()
                kind = self._kinds[type(value)]
            if kind is _Kind.SHARD:
                sharded.append(value)
                self.items.append(value)
            elif kind is _Kind.OTHER:
                common.append(value)
            elif kind is _Kind.NOT_SAVED:
                continue
            elif not value:
                common.append(value)
            else:
                inner, rest, something = self._split(value)
                if not something:
                    continue
                if inner:
                    sharded.append(inner)
                if rest:
                    common.append(rest)
            is_left = True
        return sharded, common, is_left
