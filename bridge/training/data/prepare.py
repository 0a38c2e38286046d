"""Text files to a tokenizer and an indexed dataset in one directory.

    DIR/tokenizer/            tokenizer.json, tokenizer_config.json, special_tokens_map.json
    DIR/text_document.bin     token ids, and
    DIR/text_document.idx     their index: Megatron's indexed dataset, one document a file
    DIR/manifest.json         what it was made from, by which settings

The directory is made beside its place and renamed into it when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from bridge.training.data.errors import PrepareError
from bridge.training.data.files import publish_directory
from bridge.training.data.sources import (
    SkippedFiles,
    SourceFile,
    find_files,
    find_stdlib_files,
    limit_size,
    read_documents,
)
from bridge.training.tokenizers.base import MegatronTokenizer
from bridge.training.tokenizers.errors import TokenizerError
from bridge.training.tokenizers.huggingface import HuggingFaceTokenizer
from bridge.training.tokenizers.training import MIN_VOCAB_SIZE, train_bpe_tokenizer

MANIFEST_FILE = "manifest.json"
TOKENIZER_DIR = "tokenizer"
DATASET_NAME = "text_document"
_DATASET_FILES = (f"{DATASET_NAME}.bin", f"{DATASET_NAME}.idx")
_OWN_NAMES = frozenset({MANIFEST_FILE, TOKENIZER_DIR, DATASET_NAME, *_DATASET_FILES})
"""What a prepared directory holds; training keeps its sample indices under text_document/."""

FORMAT_VERSION = 1
DEFAULT_PATTERNS = ("*.py", "*.md", "*.rst", "*.txt")
STDLIB_PATTERNS = ("*.py",)
_BATCH_DOCUMENTS = 64
_PROGRESS_SECONDS = 5.0

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What to prepare, and how."""

    output: Path
    """Directory to make."""
    inputs: tuple[Path, ...] = ()
    """Files, and folders to search."""
    stdlib: bool = False
    """Whether to take the Python standard library's sources instead of inputs."""
    patterns: tuple[str, ...] | None = None
    """Names of the files to take from folders; None takes Python sources and common kinds of plain text."""
    vocab_size: int | None = None
    """Ids of the tokenizer to train; None when an existing one is used."""
    tokenizer: Path | None = None
    """An existing tokenizer: its directory, or its tokenizer.json."""
    max_mib: float | None = None
    """Most input text to take, in MiB; None takes all."""
    append_eod: bool = True
    """Whether each document ends with the end-of-document token."""


@dataclass(frozen=True)
class PrepareResult:
    """What lies in the directory now."""

    output: Path
    dataset_path: Path
    """Path prefix of the indexed dataset, for `dataset.path`."""
    tokenizer_path: Path
    """Directory of the tokenizer, for `tokenizer.tokenizer_model`."""
    documents: int
    tokens: int
    vocab_size: int
    reused: bool
    """Whether an earlier result was found to be the same."""


def prepare(settings: PrepareSettings, report: Report = lambda line: None) -> PrepareResult:
    """Make `settings.output`, unless it was already made from the same files by the same settings.

    The same files and settings give the same bytes. Two processes that prepare into one folder take turns.

    Args:
        settings: what to do.
        report: called with each line of progress.

    Raises:
        PrepareError: settings that do not fit together, nothing to prepare, or an output directory that
            holds something else.
        TokenizerError: the tokenizer cannot be trained or read.
    """
    _check(settings)
    patterns = settings.patterns or (STDLIB_PATTERNS if settings.stdlib else DEFAULT_PATTERNS)
    files = find_stdlib_files(patterns) if settings.stdlib else find_files(settings.inputs, patterns)
    if settings.max_mib is not None:
        files = limit_size(files, int(settings.max_mib * 2**20))
    if not files:
        raise PrepareError(f"found no file to prepare: --input has nothing that fits --pattern {','.join(patterns)}")
    report(f"{len(files)} files, {sum(file.size for file in files) / 2**20:.1f} MiB")
    existing = HuggingFaceTokenizer(settings.tokenizer) if settings.tokenizer is not None else None
    request = _request(settings, patterns, files, existing)
    output = settings.output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _turn(output.parent):
            manifest = _read_manifest(output)
            if _is_result_of(manifest, request, output):
                report(f"{output} was prepared from the same files and settings: reused")
                return _result(output, manifest, reused=True)
            _check_replaceable(output)
            return _make(output, request, files, existing, report)
    except OSError as error:
        raise PrepareError(f"--output: cannot write {error.filename}: {error.strerror}") from error


def _check(settings: PrepareSettings) -> None:
    if settings.stdlib == bool(settings.inputs):
        raise PrepareError("expected either --input or --stdlib")
    if (settings.vocab_size is None) == (settings.tokenizer is None):
        raise PrepareError("expected either --vocab-size, to train a tokenizer, or --tokenizer, to use one")
    if settings.vocab_size is not None and settings.vocab_size < MIN_VOCAB_SIZE:
        raise PrepareError(f"--vocab-size is {settings.vocab_size}; expected at least {MIN_VOCAB_SIZE}")
    if settings.max_mib is not None and not settings.max_mib > 0:
        raise PrepareError(f"--max-mib is {settings.max_mib}; expected a number above 0")


def _request(
    settings: PrepareSettings,
    patterns: tuple[str, ...],
    files: list[SourceFile],
    existing: HuggingFaceTokenizer | None,
) -> dict[str, Any]:
    """Everything that the result depends on, in the form in which the manifest holds it."""
    states = "".join(f"{file.path}\0{file.size}\0{file.mtime_ns}\n" for file in files)
    return {
        "format_version": FORMAT_VERSION,
        "inputs": "stdlib" if settings.stdlib else [str(path.resolve()) for path in settings.inputs],
        "patterns": list(patterns),
        "files": len(files),
        "files_sha256": _sha256(states.encode("utf-8", errors="surrogateescape")),
        "max_mib": settings.max_mib,
        "append_eod": settings.append_eod,
        "vocab_size": settings.vocab_size,
        "tokenizer_sha256": None if existing is None else _tokenizer_sha256(existing),
    }


def _make(
    output: Path,
    request: dict[str, Any],
    files: list[SourceFile],
    existing: HuggingFaceTokenizer | None,
    report: Report,
) -> PrepareResult:
    staging = output.with_name(f".{output.name}.preparing")
    replaced = output.with_name(f".{output.name}.replaced")
    for leftover in (staging, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        staging.mkdir()
        manifest = _fill(staging, request, files, existing, report)
        publish_directory(staging, output, aside=replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    report(f"{manifest['documents']} documents, {manifest['tokens']} tokens in {output}")
    return _result(output, manifest, reused=False)


def _fill(
    staging: Path,
    request: dict[str, Any],
    files: list[SourceFile],
    existing: HuggingFaceTokenizer | None,
    report: Report,
) -> dict[str, Any]:
    """Write everything into `staging` and return the manifest."""
    directory = staging / TOKENIZER_DIR
    if existing is None:
        report(f"training a tokenizer with {request['vocab_size']} ids")
        texts = read_documents(files, SkippedFiles())
        tokenizer: MegatronTokenizer = train_bpe_tokenizer(texts, request["vocab_size"], directory)
    else:
        tokenizer = existing
        directory.mkdir()
        for name, content in existing.asset_files().items():
            (directory / name).write_bytes(content)
    skipped = SkippedFiles()
    documents, tokens = _write_dataset(
        staging / DATASET_NAME, read_documents(files, skipped), tokenizer, request["append_eod"], report
    )
    if sum(asdict(skipped).values()):
        report(f"skipped: {skipped}")
    if tokens == 0:
        raise PrepareError(f"none of the {len(files)} files holds text: {skipped}")
    manifest = {
        "request": request,
        "documents": documents,
        "tokens": tokens,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "skipped": asdict(skipped),
        "sizes": {name: (staging / name).stat().st_size for name in _DATASET_FILES},
        "tokenizer_sha256": _tokenizer_sha256(tokenizer),
    }
    (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _write_dataset(
    prefix: Path, texts: Iterator[str], tokenizer: MegatronTokenizer, append_eod: bool, report: Report
) -> tuple[int, int]:
    """Write one document for each text; returns how many documents and tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    documents = tokens = 0
    reported = time.monotonic()
    try:
        while batch := list(islice(texts, _BATCH_DOCUMENTS)):
            for ids in tokenizer.tokenize_batch(batch):
                document = np.asarray([*ids, tokenizer.eod] if append_eod else ids)
                builder.add_document(document, [len(document)])
                documents += 1
                tokens += len(document)
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                report(f"{documents} documents, {tokens} tokens")
    finally:
        builder.finalize(f"{prefix}.idx")
    return documents, tokens


def _read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest in `output`; None if there is none that can be read."""
    try:
        manifest = json.loads((output / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _is_result_of(manifest: dict[str, Any] | None, request: dict[str, Any], output: Path) -> bool:
    """Whether `output` is what `request` would give, as far as its sizes and its tokenizer tell."""
    if manifest is None or manifest.get("request") != request:
        return False
    try:
        sizes = {name: (output / name).stat().st_size for name in _DATASET_FILES}
        tokenizer = HuggingFaceTokenizer(output / TOKENIZER_DIR)
    except (OSError, TokenizerError):
        return False
    return sizes == manifest.get("sizes") and _tokenizer_sha256(tokenizer) == manifest.get("tokenizer_sha256")


def _check_replaceable(output: Path) -> None:
    """Refuse to replace anything that this module did not make."""
    if not output.exists():
        return
    if not output.is_dir():
        raise PrepareError(f"--output: {output} exists and is no directory")
    names = {path.name for path in output.iterdir()}
    if names and (MANIFEST_FILE not in names or names - _OWN_NAMES):
        raise PrepareError(
            f"--output: {output} holds files that were not made by preparing data "
            f"({', '.join(sorted(names - _OWN_NAMES or names)[:3])}); name an empty or a new directory"
        )


def _result(output: Path, manifest: dict[str, Any] | None, reused: bool) -> PrepareResult:
    facts = manifest or {}
    return PrepareResult(
        output=output,
        dataset_path=output / DATASET_NAME,
        tokenizer_path=output / TOKENIZER_DIR,
        documents=facts["documents"],
        tokens=facts["tokens"],
        vocab_size=facts["vocab_size"],
        reused=reused,
    )


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing in `folder`; the lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tokenizer_sha256(tokenizer: MegatronTokenizer) -> str:
    files = tokenizer.asset_files()
    return _sha256(b"".join(name.encode() + b"\0" + files[name] + b"\0" for name in sorted(files)))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
