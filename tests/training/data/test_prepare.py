from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from bridge.training.config import ConfigContainer, DatasetConfig
from bridge.training.data import PrepareError, TrainDataIterator, build_train_dataset
from bridge.training.data import prepare as prepare_module
from bridge.training.data.prepare import PrepareSettings, prepare
from bridge.training.tokenizers import HuggingFaceTokenizer, TokenizerError

DOCUMENTS = {
    "a.py": "def f(x):\r\n    return x + 1\r\n",
    "b.txt": "\ufeffgrößer ≥ 1 — 猫\n\n  trailing blanks  ",
    "sub/c.md": "# Title\n" + "the cat sat on the mat\n" * 40,
    "sub/d.txt": "literal <|endoftext|> inside\x00",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for name, text in DOCUMENTS.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(text.encode())
    return source


@pytest.fixture
def settings(source: Path, tmp_path: Path) -> PrepareSettings:
    return PrepareSettings(output=tmp_path / "out" / "data", inputs=(source,), vocab_size=300)


def documents(output: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(output / "text_document"))
    return [dataset[index].tolist() for index in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_comes_back_exactly(settings: PrepareSettings) -> None:
    result = prepare(settings)
    tokenizer = HuggingFaceTokenizer(result.tokenizer_path)
    prepared = documents(result.output)
    assert [tokenizer.detokenize(ids[:-1]) for ids in prepared] == list(DOCUMENTS.values())
    assert {ids[-1] for ids in prepared} == {tokenizer.eod}
    assert (result.documents, result.tokens) == (4, sum(map(len, prepared)))
    assert set(contents(result.output)) == {
        "manifest.json",
        "text_document.bin",
        "text_document.idx",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
    }


def test_without_the_end_token_a_document_is_its_text(settings: PrepareSettings) -> None:
    result = prepare(replace(settings, append_eod=False))
    tokenizer = HuggingFaceTokenizer(result.tokenizer_path)
    assert [tokenizer.detokenize(ids) for ids in documents(result.output)] == list(DOCUMENTS.values())


def test_the_same_input_gives_the_same_bytes(settings: PrepareSettings, tmp_path: Path) -> None:
    prepare(settings)
    prepare(replace(settings, output=tmp_path / "again"))
    assert contents(settings.output) == contents(tmp_path / "again")


def test_a_second_run_reuses_the_result(settings: PrepareSettings) -> None:
    first = prepare(settings)
    inode = settings.output.stat().st_ino
    lines: list[str] = []
    second = prepare(settings, lines.append)
    assert second == replace(first, reused=True)
    assert settings.output.stat().st_ino == inode
    assert lines[-1] == f"{settings.output} was prepared from the same files and settings: reused"


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 301}, {"append_eod": False}, {"max_mib": 0.5}, {"patterns": ("*.py",)}],
)
def test_other_settings_make_it_anew(settings: PrepareSettings, change: dict[str, Any]) -> None:
    prepare(settings)
    # What training keeps beside the data belongs to the old data.
    (settings.output / "text_document" / "cache").mkdir(parents=True)
    changed = replace(settings, **change)
    assert not prepare(changed).reused
    assert prepare(changed).reused
    assert not (settings.output / "text_document").exists()
    assert [path.name for path in settings.output.parent.iterdir()] == ["data"]


def test_changed_input_makes_it_anew(settings: PrepareSettings, source: Path) -> None:
    prepare(settings)
    (source / "a.py").write_text("pass\n")
    assert not prepare(settings).reused
    (source / "new.md").write_text("new")
    result = prepare(settings)
    assert (result.reused, result.documents) == (False, 5)


@pytest.mark.parametrize(
    "damage", ["text_document.bin", "text_document.idx", "tokenizer/tokenizer.json", "manifest.json"]
)
def test_a_damaged_result_is_not_reused(settings: PrepareSettings, damage: str) -> None:
    prepare(settings)
    expected = contents(settings.output)
    (settings.output / damage).write_bytes(b"{}")
    assert not prepare(settings).reused
    assert contents(settings.output) == expected


def test_an_existing_tokenizer_is_used_and_copied(settings: PrepareSettings, tmp_path: Path) -> None:
    tokenizer = prepare(settings).tokenizer_path
    other = replace(settings, output=tmp_path / "other", vocab_size=None, tokenizer=tokenizer)
    result = prepare(other)
    assert contents(result.tokenizer_path) == contents(tokenizer)
    assert documents(result.output) == documents(settings.output)
    assert prepare(other).reused


def test_files_that_cannot_be_used_are_skipped_and_counted(settings: PrepareSettings, source: Path) -> None:
    (source / "latin.txt").write_bytes("größer".encode("latin-1"))
    (source / "empty.txt").touch()
    (source / "dangling.txt").symlink_to(source / "nothing")
    lines: list[str] = []
    result = prepare(settings, lines.append)
    assert result.documents == len(DOCUMENTS)
    assert "skipped: 1 unreadable, 1 not UTF-8, 1 empty" in lines
    manifest = json.loads((settings.output / "manifest.json").read_text())
    assert manifest["skipped"] == {"unreadable": 1, "not_utf8": 1, "empty": 1}


def test_folders_are_searched_by_pattern_and_files_are_taken_as_they_are(
    settings: PrepareSettings, source: Path
) -> None:
    for name in (".hidden/x.py", "__pycache__/y.py", ".z.py", "notes.log"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    inputs = (source / "notes.log", source, source / "a.py")
    result = prepare(replace(settings, inputs=inputs, patterns=("*.py", "?.md")))
    tokenizer = HuggingFaceTokenizer(result.tokenizer_path)
    assert [tokenizer.detokenize(ids[:-1]) for ids in documents(result.output)] == [
        "notes.log",
        DOCUMENTS["a.py"],
        DOCUMENTS["sub/c.md"],
    ]


def test_the_size_limit_takes_the_first_files(settings: PrepareSettings) -> None:
    sizes = [len(text.encode()) for text in DOCUMENTS.values()]
    assert prepare(replace(settings, max_mib=(sizes[0] + sizes[1]) / 2**20)).documents == 2
    with pytest.raises(PrepareError, match=r"--max-mib allows 2 bytes, but the first file, .*a.py, has 29"):
        prepare(replace(settings, max_mib=2 / 2**20))


def test_the_standard_library_is_always_there(settings: PrepareSettings) -> None:
    result = prepare(replace(settings, inputs=(), stdlib=True, max_mib=0.5, vocab_size=400))
    assert result.documents > 5
    tokenizer = HuggingFaceTokenizer(result.tokenizer_path)
    text = tokenizer.detokenize(documents(result.output)[0][:-1])
    compile(text, "stdlib", "exec")


def test_training_reads_what_was_prepared(settings: PrepareSettings) -> None:
    result = prepare(settings)
    cfg = ConfigContainer(dataset=DatasetConfig(path=str(result.dataset_path), split="1,0,0"))
    cfg.model.seq_length = 16
    dataset = build_train_dataset(cfg, HuggingFaceTokenizer(result.tokenizer_path), 50)
    batch = next(TrainDataIterator(dataset, 2, 0, 1))
    assert batch["tokens"].shape == (2, 16)
    assert prepare(settings).reused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stdlib": True}, "expected either --input or --stdlib"),
        ({"inputs": ()}, "expected either --input or --stdlib"),
        ({"tokenizer": Path("t")}, "expected either --vocab-size, .* or --tokenizer"),
        ({"vocab_size": None}, "expected either --vocab-size, .* or --tokenizer"),
        ({"vocab_size": 256}, "--vocab-size is 256; expected at least 257"),
        ({"max_mib": 0.0}, "--max-mib is 0.0"),
        ({"patterns": ("*.none",)}, "found no file to prepare: .* fits --pattern \\*.none"),
        ({"inputs": (Path("/nowhere"),)}, "--input: /nowhere does not exist"),
    ],
)
def test_settings_that_cannot_be_used_are_errors(
    settings: PrepareSettings, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrepareError, match=message):
        prepare(replace(settings, **change))
    assert not settings.output.exists()


def test_a_missing_tokenizer_is_an_error(settings: PrepareSettings) -> None:
    with pytest.raises(TokenizerError, match="No such file"):
        prepare(replace(settings, vocab_size=None, tokenizer=Path("/nowhere")))


def test_files_without_any_text_leave_nothing(settings: PrepareSettings, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PrepareError, match=r"none of the 1 files holds text: 0 unreadable, 0 not .*, 1 empty"):
        prepare(replace(settings, inputs=(tmp_path / "empty.txt",)))
    assert list(settings.output.parent.iterdir()) == []


def test_a_folder_with_other_files_is_never_replaced(settings: PrepareSettings) -> None:
    settings.output.mkdir(parents=True)
    (settings.output / "thesis.tex").write_text("years of work")
    with pytest.raises(PrepareError, match=r"holds files that were not made by preparing data \(thesis.tex\)"):
        prepare(settings)
    (settings.output / "thesis.tex").unlink()
    prepare(settings)
    (settings.output / "thesis.tex").write_text("years of work")
    with pytest.raises(PrepareError, match=r"thesis\.tex"):
        prepare(replace(settings, vocab_size=301))
    assert (settings.output / "thesis.tex").read_text() == "years of work"


def _killed_run(settings: PrepareSettings, function: str) -> None:
    """Prepare in a child that is killed as soon as `function` of the module is called."""
    child = os.fork()
    if child == 0:
        setattr(prepare_module, function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        try:
            prepare(settings)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("function", ["train_bpe_tokenizer", "_write_dataset", "publish_directory", "_result"])
def test_a_killed_run_leaves_the_old_result_or_none_and_the_next_run_cleans_up(
    settings: PrepareSettings, function: str
) -> None:
    finished = function == "_result"
    _killed_run(settings, function)
    assert settings.output.exists() == finished

    result = prepare(settings)
    assert result.reused == finished
    before = contents(settings.output)

    changed = replace(settings, vocab_size=310)
    _killed_run(changed, function)
    if not finished:
        assert contents(settings.output) == before
    assert prepare(changed).reused == finished
    assert [path.name for path in settings.output.parent.iterdir()] == ["data"]


def test_two_processes_make_one_result(settings: PrepareSettings) -> None:
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 3
            try:
                status = int(prepare(settings).reused)
            finally:
                os._exit(status)
        children.append(child)
    assert sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children) == [0, 1]
