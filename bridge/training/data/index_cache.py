"""The directory in which one run builds a dataset's indices and every rank and later run finds them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDataset

from bridge.training.data.blend import Blend
from bridge.training.data.errors import DatasetError
from bridge.training.data.files import publish_directory

_STAGING_PREFIX = ".building-"
_ABANDONED_AFTER_SECONDS = 24 * 3600


def cached_indices(
    config: Any, blend: Blend, path_to_cache: str | None, num_samples: int, build: Callable[[Any], Any]
) -> Path:
    """The directory with a dataset's indices, built now unless an earlier run left it.

    Args:
        config: megatron-core's dataset configuration.
        blend: where the data lies.
        path_to_cache: directory to keep indices in; None is one beside the first dataset.
        num_samples: samples that the dataset is built for.
        build: builds the dataset from a configuration, which leaves the indices in its `path_to_cache`.

    Raises:
        DatasetError: the data is unusable, or the directory cannot be written.
    """
    for path in blend.paths:
        _check_indexed_dataset(path, config.split_matrix[0])
    description = _describe(config, blend, num_samples)
    cache = Path(path_to_cache) if path_to_cache else Path(blend.paths[0]) / "cache"
    target = cache / hashlib.sha256(description.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=cache))
    except OSError as error:
        raise DatasetError(
            f"cannot write the dataset's indices to {cache}: {error.strerror}; set dataset.path_to_cache to "
            "a directory that every rank can reach and this user can write"
        ) from error
    try:
        staging.chmod(0o755)
        building = copy.copy(config)
        building.path_to_cache = str(staging)
        build(building)
        (staging / "description.json").write_text(description)
        publish_directory(staging, target)
    except OSError:
        # Another run may have published the same indices meanwhile; they are as good.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _check_indexed_dataset(path: str, part: tuple[float, float]) -> None:
    """Refuse what megatron-core would fail on obscurely, or count the epochs of forever: no tokens."""
    prefix = Path(path)
    for file in (Path(f"{path}.idx"), Path(f"{path}.bin")):
        if not file.is_file():
            inside = prefix / "text_document"
            hint = f"; did you mean {inside}?" if Path(f"{inside}.idx").is_file() else ""
            raise DatasetError(f"dataset.path: {file} does not exist (the path is given without .idx){hint}")
    try:
        dataset = IndexedDataset(path)
        # A copy, made while the dataset lives: it unmaps the memory under its arrays when it goes.
        lengths = dataset.sequence_lengths.copy()
    except Exception as error:
        raise DatasetError(f"dataset.path: {path} is no indexed dataset: {error}") from error
    documents = lengths[round(part[0] * len(lengths)) : round(part[1] * len(lengths))]
    if documents.sum() == 0:
        raise DatasetError(
            f"dataset.path: {path} has {len(lengths)} documents, of which dataset.split leaves "
            f"{len(documents)} without any token for training"
        )


def _describe(config: Any, blend: Blend, num_samples: int) -> str:
    """Everything that the indices depend on, as JSON: it names their directory."""
    states = [Path(f"{path}.idx").stat() for path in blend.paths]
    return json.dumps(
        {
            # megatron-core names the files inside by the paths and the split as they were spelled.
            "paths": blend.paths,
            "resolved_paths": [str(Path(path).resolve()) for path in blend.paths],
            "index_files": [[state.st_size, state.st_mtime_ns] for state in states],
            "weights": blend.weights,
            "split": [config.split, *config.split_matrix[0]],
            "seed": config.random_seed,
            "sequence_length": config.sequence_length,
            "num_samples": num_samples,
            "tokenizer": config.tokenizer.unique_identifiers,
            "megatron_core": version("megatron-core"),
        },
        indent=1,
    )


def _remove_abandoned(cache: Path) -> None:
    """Remove what runs killed long ago were building; a younger one may still be at work."""
    for staging in cache.glob(f"{_STAGING_PREFIX}*"):
        if time.time() - staging.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
            shutil.rmtree(staging, ignore_errors=True)
