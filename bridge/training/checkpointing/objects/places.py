"""Where a run's checkpoints are: in a directory, in object storage, or in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridge.training.checkpointing.retention.policies import MostRecent, Policy, policies_of
from bridge.training.object_url import is_url

_RETENTION = (
    *("most_recent_k", "save_retain_interval", "retain_every_hours", "retain_iterations"),
    *("retain_best_k", "retain_best_metric", "retain_best_mode"),
)


def save_directory(checkpoint_config: Any) -> Path:
    """The directory that checkpoints are written to: `save`, or `staging_dir` where that is in object storage."""
    cfg = checkpoint_config
    return Path(cfg.staging_dir if is_url(cfg.save) else cfg.save).expanduser()


def upload_url(checkpoint_config: Any) -> str | None:
    """The place in object storage that checkpoints are uploaded to; None if there is none."""
    cfg = checkpoint_config
    url: str | None = cfg.save if is_url(cfg.save) else cfg.mirror
    return url


def uploads_are_required(checkpoint_config: Any) -> bool:
    """Whether a checkpoint that is not uploaded counts as a failed save."""
    return is_url(checkpoint_config.save) or bool(checkpoint_config.mirror_required)


def directory_policies(checkpoint_config: Any) -> tuple[Policy, ...]:
    """What retention keeps in `save_directory`."""
    if is_url(checkpoint_config.save):
        return (MostRecent(checkpoint_config.staging_keep),)
    return policies_of(checkpoint_config)


def retention_settings(checkpoint_config: Any) -> dict[str, Any]:
    """The settings that decide what is kept in object storage."""
    return {name: getattr(checkpoint_config, name) for name in _RETENTION}
