"""The tokenizer's part: the files that make a checkpoint usable without the place it was trained at."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bridge.training.checkpointing.additions import add_file
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.layout import TOKENIZER_DIRECTORY
from bridge.training.checkpointing.sidecar import Sidecar

_SOURCE_FILES: Mapping[str, Mapping[str, str]] = {
    "SentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "GPTSentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "Llama2Tokenizer": {"tokenizer_model": "tokenizer.model"},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "BertWordPieceLowerCase": {"vocab_file": "vocab.txt"},
    "BertWordPieceCase": {"vocab_file": "vocab.txt"},
    "TikTokenizer": {"tokenizer_model": "tokenizer.json"},
    "NullTokenizer": {},
}
"""For tokenizers that cannot give their files: kind → setting that names the file → its name in a checkpoint."""

_WRAPPED = ("_tokenizer", "tokenizer")
"""Attributes under which wrappers, Megatron's among them, keep the tokenizer that they wrap."""

_REMEDY = "to save without them set checkpoint.save_tokenizer_assets: false"


def save_tokenizer_assets(tokenizer: Any, tokenizer_config: Any, checkpoint_path: str) -> None:
    """Write the tokenizer's files into `<checkpoint_path>/tokenizer`.

    `save_checkpoint` does this by itself; the function is for checkpoints that lack the files, and for
    programs that write checkpoints of their own. Rank 0 writes; on other ranks nothing is done. A tokenizer
    without files, such as the NullTokenizer, makes no directory.

    Args:
        tokenizer: one of ours; or any object that has `save_pretrained`, itself or in what it wraps; or None
            or any object at all where `tokenizer_config` names a kind that is made of files.
        tokenizer_config: its configuration, with `tokenizer_type` and the settings that name files.
        checkpoint_path: an `iter_N` directory; made if missing.

    Raises:
        CheckpointSaveError: a file cannot be collected or written, or the checkpoint is published with another
            file of the same name. Some files may have been written by then; each is whole.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    directory = Path(checkpoint_path)
    for sidecar in tokenizer_sidecars(tokenizer, tokenizer_config):
        try:
            add_file(directory, sidecar.name, sidecar.data)
        except OSError as error:
            raise CheckpointSaveError(f"{directory / sidecar.name} could not be written: {error}") from error


def tokenizer_sidecars(tokenizer: Any | None, tokenizer_config: Any | None = None) -> list[Sidecar]:
    """Capture the tokenizer's files, as they are now; none where the run has no tokenizer.

    Args:
        tokenizer: as in `save_tokenizer_assets`; None for a run without one.
        tokenizer_config: likewise; needed only for tokenizers that cannot give their files.

    Raises:
        CheckpointSaveError: a file cannot be collected.
    """
    try:
        assets = _collect(tokenizer, tokenizer_config)
    except CheckpointSaveError:
        raise
    except Exception as error:
        raise CheckpointSaveError(
            f"the files of {_name_of(tokenizer, tokenizer_config)} could not be collected: "
            f"{type(error).__name__}: {error}; {_REMEDY}"
        ) from error
    return [Sidecar(f"{TOKENIZER_DIRECTORY}/{name}", data) for name, data in sorted(assets.items())]


def _collect(tokenizer: Any | None, config: Any | None) -> Mapping[str, bytes]:
    """File name to content, from the first of: the tokenizer itself, the configured files, `save_pretrained`."""
    if callable(getattr(tokenizer, "asset_files", None)):
        assets: Mapping[str, bytes] = tokenizer.asset_files()  # type: ignore[union-attr]  # it is callable
        return assets
    kind = str(getattr(config, "tokenizer_type", None))
    if kind in _SOURCE_FILES:
        return {name: _source(config, kind, setting, name) for setting, name in _SOURCE_FILES[kind].items()}
    if tokenizer is None:
        return {}
    inner = _with_save_pretrained(tokenizer)
    if inner is None:
        raise CheckpointSaveError(
            f"the files of {_name_of(tokenizer, config)} could not be collected: it has neither asset_files() nor "
            f"save_pretrained(), and tokenizer.tokenizer_type {kind!r} is none of {', '.join(_SOURCE_FILES)}; {_REMEDY}"
        )
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as name:
        directory = Path(name)
        inner.save_pretrained(name)
        assets = {
            path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
        }
    if not assets:
        raise CheckpointSaveError(f"save_pretrained() of {_name_of(tokenizer, config)} wrote no file; {_REMEDY}")
    return assets


def _source(config: Any, kind: str, setting: str, name: str) -> bytes:
    value = getattr(config, setting, None)
    if value is None:
        raise CheckpointSaveError(
            f"the {kind} has no {name} to save: tokenizer.{setting} is not set; set it to that file, or {_REMEDY}"
        )
    path = Path(value)
    path = path / name if path.is_dir() else path
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointSaveError(
            f"tokenizer.{setting}: the {kind}'s {name} cannot be read from {path}: {error.strerror}; {_REMEDY}"
        ) from error


def _with_save_pretrained(tokenizer: Any) -> Any | None:
    """The tokenizer, or what it wraps, that has `save_pretrained`."""
    candidates, seen = [tokenizer], set()
    while candidates:
        candidate = candidates.pop(0)
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        if callable(getattr(candidate, "save_pretrained", None)):
            return candidate
        candidates += [getattr(candidate, name, None) for name in _WRAPPED]
    return None


def _name_of(tokenizer: Any | None, config: Any | None) -> str:
    return str(getattr(config, "tokenizer_type", "the tokenizer")) if tokenizer is None else type(tokenizer).__name__
