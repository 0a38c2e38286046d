"""The configuration's part: `run_config.yaml`, and the few values of it that loading needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.layout import RUN_CONFIG
from bridge.training.checkpointing.sidecar import Sidecar

_LARGEST = 1 << 23
"""Bytes; the largest configurations have some hundred thousand."""
_DEEPEST = 100
"""Brackets within brackets: the reader's time grows with their square."""


class _Loader(yaml.SafeLoader):
    """Plain values only. Merging mappings, which no program writes, can double their size with every line."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys are not allowed")

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise yaml.YAMLError("brackets are nested too deeply")
        super().fetch_flow_collection_start(token)


def run_config_sidecar(cfg: Any, *, has_optimizer: bool = True, has_rng: bool = True) -> Sidecar:
    """Capture the whole configuration as YAML.

    Readers learn from `checkpoint.save_optim` and `checkpoint.save_rng` what a checkpoint holds. Where it lacks a part
    that these settings ask for (saved without an optimizer, or from a prebuilt state dict), they say false.

    Args:
        cfg: ConfigContainer.
        has_optimizer: whether the optimizer's state is saved.
        has_rng: whether the random states are saved.
    """
    checkpoint = cfg.checkpoint
    saved = replace(
        checkpoint, save_optim=checkpoint.save_optim and has_optimizer, save_rng=checkpoint.save_rng and has_rng
    )
    return Sidecar(RUN_CONFIG, replace(cfg, checkpoint=saved).to_yaml().encode())


def read_run_config(checkpoint: Path) -> dict[str, Any] | None:
    """Read a checkpoint's configuration as plain values; no class that it names is imported or made.

    Returns:
        The mapping, or None if the checkpoint has no `run_config.yaml`.

    Raises:
        CheckpointDamagedError: the file is there but is no YAML mapping.
    """
    path = checkpoint / RUN_CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointDamagedError(f"{path} is not readable YAML: it has {path.stat().st_size} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointDamagedError(f"{path} is not readable YAML: {error}") from error
    return parse_run_config(data, str(path))


def parse_run_config(data: bytes, place: str) -> dict[str, Any]:
    """As `read_run_config`, from the file's bytes; `place` says where they come from, for messages."""
    try:
        content = yaml.load(data.decode(), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates, text that is no UTF-8
        raise CheckpointDamagedError(f"{place} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointDamagedError(f"{place} holds no mapping")
    return content


def value_at(config: Mapping[str, Any] | None, section: str, key: str, default: Any) -> Any:
    """`config[section][key]`, or the default where the file does not say."""
    part = (config or {}).get(section)
    value = part.get(key) if isinstance(part, Mapping) else None
    return default if value is None else value
