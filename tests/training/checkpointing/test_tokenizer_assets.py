"""The tokenizer's files in a checkpoint: complete, exact, enough to build it again, and never silently absent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from bridge.training.checkpointing import CheckpointError, CheckpointSaveError, save_tokenizer_assets
from bridge.training.checkpointing.contents.tokenizer import tokenizer_sidecars
from bridge.training.checkpointing.integrity import find_damage, read_manifest
from bridge.training.config import TokenizerConfig
from bridge.training.setup import setup
from bridge.training.tokenizers import TokenizerError, build_tokenizer, tokenizer_from_checkpoint
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.test_saving import save
from tests.training.tiny import tiny_config
from tests.training.tokenizers.small import FILES, KINDS
from tests.training.tokenizers.test_kinds import assert_equal


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forking with the tokenizers' threads about is not safe."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in KINDS.items()}


def files_in(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_checkpoint_is_enough_to_build_the_tokenizer(configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    """A real save on 2 ranks with each kind; the checkpoint alone then gives the tokenizer back."""

    def save_with_each() -> None:
        run = setup(tiny_config())
        for kind, tokenizer_config in configs.items():
            run.cfg.tokenizer, run.cfg.checkpoint.save = tokenizer_config, str(tmp_path / kind)
            run.state.tokenizer = build_tokenizer(tokenizer_config)
            save(run)

    run_ranks(save_with_each, 2)
    for kind, cfg in configs.items():
        checkpoint = tmp_path / kind / "iter_0000000"
        manifest = read_manifest(checkpoint)
        assert manifest is not None
        assert find_damage(checkpoint, manifest.files, checksums=True) == []
        saved = {record.name for record in manifest.files if record.name.startswith("tokenizer/")}
        assert saved == {f"tokenizer/{name}" for name in FILES[kind]}
        assert_equal(tokenizer_from_checkpoint(checkpoint), build_tokenizer(cfg))


@pytest.mark.parametrize("kind", KINDS)
def test_save_tokenizer_assets_writes_the_files_of_ours(
    configs: dict[str, TokenizerConfig], tmp_path: Path, kind: str
) -> None:
    tokenizer = build_tokenizer(configs[kind])
    save_tokenizer_assets(tokenizer, configs[kind], str(tmp_path / "iter_0000001"))
    assert files_in(tmp_path) == {
        f"iter_0000001/tokenizer/{name}": data for name, data in tokenizer.asset_files().items()
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "HuggingFaceTokenizer"])
@pytest.mark.parametrize("tokenizer", [None, SimpleNamespace(vocab_size=3)], ids=["none", "foreign"])
def test_a_tokenizer_that_cannot_give_its_files_is_saved_from_the_configured_ones(
    configs: dict[str, TokenizerConfig], tmp_path: Path, kind: str, tokenizer: Any
) -> None:
    save_tokenizer_assets(tokenizer, configs[kind], str(tmp_path))
    expected = build_tokenizer(configs[kind]).asset_files()
    assert files_in(tmp_path) == {f"tokenizer/{name}": data for name, data in expected.items()}


class Pretrained:
    """What `transformers` has: a tokenizer that writes itself into a directory."""

    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer.json").write_bytes(b"{}")
        (Path(directory) / "chat_templates").mkdir()
        (Path(directory) / "chat_templates" / "tool.jinja").write_bytes(b"{{ tool }}")


@pytest.mark.parametrize(
    "tokenizer",
    [Pretrained(), SimpleNamespace(_tokenizer=SimpleNamespace(tokenizer=Pretrained()))],
    ids=["itself", "wrapped"],
)
@pytest.mark.parametrize("cfg", [None, SimpleNamespace(tokenizer_type="MultimodalTokenizer"), TokenizerConfig()])
def test_save_pretrained_gives_the_files_of_a_foreign_tokenizer(tmp_path: Path, tokenizer: Any, cfg: Any) -> None:
    save_tokenizer_assets(tokenizer, cfg, str(tmp_path))
    assert files_in(tmp_path) == {
        "tokenizer/tokenizer.json": b"{}",
        "tokenizer/chat_templates/tool.jinja": b"{{ tool }}",
    }


def test_a_real_tokenizer_of_transformers_is_saved_as_it_saves_itself(
    configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = str(configs["HuggingFaceTokenizer"].tokenizer_model)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "theirs")
    save_tokenizer_assets(theirs, TokenizerConfig(tokenizer_model=source), str(tmp_path / "ours"))
    assert files_in(tmp_path / "ours/tokenizer") == files_in(tmp_path / "theirs")


class Silent:
    def save_pretrained(self, directory: str) -> None:
        """Writes nothing."""


class Broken:
    def asset_files(self) -> dict[str, bytes]:
        raise RuntimeError("lost connection")


REMEDY = "to save without them set checkpoint.save_tokenizer_assets: false"


@pytest.mark.parametrize(
    ("tokenizer", "cfg", "message"),
    [
        (
            None,
            TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="gone/vocab.json", merge_file="m"),
            "tokenizer.vocab_file: the GPT2BPETokenizer's vocab.json cannot be read from gone/vocab.json: No such file "
            f"or directory; {REMEDY}",
        ),
        (
            object(),
            TokenizerConfig(tokenizer_type="SentencePieceTokenizer"),
            "the SentencePieceTokenizer has no tokenizer.model to save: tokenizer.tokenizer_model is not set; set it "
            f"to that file, or {REMEDY}",
        ),
        (Silent(), None, f"save_pretrained() of Silent wrote no file; {REMEDY}"),
        (
            Broken(),
            None,
            f"the files of Broken could not be collected: RuntimeError: lost connection; {REMEDY}",
        ),
        (
            SimpleNamespace(),
            TokenizerConfig(),
            "the files of SimpleNamespace could not be collected: it has neither asset_files() nor save_pretrained(), "
            "and tokenizer.tokenizer_type 'HuggingFaceTokenizer' is none of SentencePieceTokenizer, "
            "GPTSentencePieceTokenizer, Llama2Tokenizer, GPT2BPETokenizer, BertWordPieceLowerCase, BertWordPieceCase, "
            f"TikTokenizer, NullTokenizer; {REMEDY}",
        ),
    ],
)
def test_files_that_cannot_be_collected_are_an_error(tmp_path: Path, tokenizer: Any, cfg: Any, message: str) -> None:
    with pytest.raises(CheckpointSaveError) as caught:
        save_tokenizer_assets(tokenizer, cfg, str(tmp_path))
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_tokenizer_has_no_files() -> None:
    assert tokenizer_sidecars(None) == tokenizer_sidecars(None, TokenizerConfig()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_text("a file where the directory belongs")
    with pytest.raises(CheckpointSaveError, match=r"tokenizer/.* could not be written: .*Not a directory"):
        save_tokenizer_assets(Pretrained(), None, str(tmp_path))


def test_a_failure_to_collect_fails_the_save_on_every_rank_and_publishes_nothing(tmp_path: Path) -> None:
    def attempt() -> str:
        run = setup(tiny_config(checkpoint={"save": str(tmp_path)}))
        run.state.tokenizer = Broken()
        try:
            save(run)
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        return "saved"

    outcomes = run_ranks(attempt, 2)
    assert (
        outcomes
        == [
            "CheckpointSaveError: collecting the state failed on rank 0: the files of Broken could not be collected: "
            f"RuntimeError: lost connection; {REMEDY}"
        ]
        * 2
    )
    assert {path.name for path in tmp_path.iterdir()} == {".bridge-writer", ".bridge-starts", ".bridge-events.jsonl"}


def test_a_published_checkpoint_may_gain_files_but_keeps_those_it_has(tmp_path: Path) -> None:
    """And on other ranks than the first nothing is written."""

    def attempt() -> list[str]:
        run = setup(tiny_config(checkpoint={"save": str(tmp_path)}))
        save(run)
        checkpoint = tmp_path / "iter_0000000"
        outcomes = []
        for _ in range(2):
            save_tokenizer_assets(Pretrained(), None, str(checkpoint))
            outcomes.append(sorted(path.name for path in (checkpoint / "tokenizer").rglob("*")))
        return outcomes

    assert run_ranks(attempt, 1) == [[["chat_templates", "tokenizer.json", "tool.jinja"]] * 2]

    def replace_listed_file() -> str:
        class Other:
            def asset_files(self) -> dict[str, bytes]:
                return {"tokenizer.json": b"mine"}

        run = setup(tiny_config(checkpoint={"save": str(tmp_path / "other")}))
        run.state.tokenizer = Other()
        save(run)
        checkpoint = str(tmp_path / "other/iter_0000000")
        save_tokenizer_assets(Other(), None, checkpoint)
        try:
            save_tokenizer_assets(Pretrained(), None, checkpoint)
        except CheckpointSaveError as error:
            return str(error)
        return "replaced"

    (outcome,) = run_ranks(replace_listed_file, 1)
    assert outcome.endswith("is published and its manifest lists another tokenizer/tokenizer.json; save a new "
                            "checkpoint instead")  # fmt: skip
    assert (tmp_path / "other/iter_0000000/tokenizer/tokenizer.json").read_bytes() == b"mine"


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    def attempt() -> None:
        init_ranks()
        rank_directory = tmp_path / str(dist.get_rank())
        save_tokenizer_assets(Pretrained(), None, str(rank_directory))

    run_ranks(attempt, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_checkpoint_that_does_not_name_its_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"run_config\.yaml has no 'tokenizer'"):
        tokenizer_from_checkpoint(tmp_path)
    (tmp_path / "run_config.yaml").write_text("tokenizer:\n  tokenizer_type: Guesswork\n")
    with pytest.raises(TokenizerError, match=r"run_config\.yaml: .*tokenizer\.tokenizer_type: 'Guesswork'"):
        tokenizer_from_checkpoint(tmp_path)
