"""The documents keep their word: their code runs, their commands exist, their links and tables are right.

A comment in the line before a fenced block changes what is done with it:

    <!-- file: mypackage/checkpoint.py -->   the block is written to this file, for the blocks that follow
    <!-- not run: reason -->                 only the syntax is checked
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile, pairwise
from pathlib import Path

import pytest
import yaml

from bridge.cli.application import parse
from bridge.training.config import CheckpointConfig, ConfigContainer, load_config
from bridge.training.config.availability import NOT_AVAILABLE
from tests.distributed.launch import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "yaml", "bash", "text"}
SECTIONS = {field.name for field in dataclasses.fields(ConfigContainer)}
LAUNCHER = ["-m", "torch.distributed.run"]
LAUNCHERS = {f"scripts/launch/{path.name}" for path in (ROOT / "scripts/launch").glob("*.s*")}
OTHER_COMMANDS = {"git", "pip", "pre-commit"}
"""Commands of other programs, of which only the syntax is checked."""

BLOCK = re.compile(
    r"(?:<!-- (?P<directive>file|not run): (?P<argument>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)\n```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\[[^\]]+\]\((?!https?://)(?P<target>[^)#]*)(?:#(?P<anchor>[^)]+))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    file: str | None
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page,
            text.count("\n", 0, match.start("code")),
            match["language"],
            match["code"],
            file=match["argument"] if match["directive"] == "file" else None,
            is_run=match["directive"] != "not run",
        )
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_every_fence_belongs_to_a_block_of_a_known_language() -> None:
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), page
    assert {block.language for block in BLOCKS} == LANGUAGES


def test_every_directive_stands_before_a_block() -> None:
    for page in PAGES:
        outside = BLOCK.sub("", page.read_text())
        assert not re.search(r"^<!-- (file|not run)", outside, re.MULTILINE), page


PAGES_WITH_PYTHON = sorted({block.page for block in blocks("python") if block.is_run})


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """All blocks of a page in one process, in order, in an empty directory that can be imported from.

    Managers that the page's YAML names are made too, as a run would make them. The README is tried in a new process;
    the other pages share what this one has imported.
    """
    program = ["import sys; sys.path.insert(0, '')"]
    for block in blocks_of(page):
        if block.file is not None:
            file = tmp_path / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
        elif block.language == "python" and block.is_run:
            program.append(block.code)
    for name in managers_named_in(page):
        program += [
            "from bridge.training.checkpointing import create_checkpoint_manager",
            "from bridge.training.config import CheckpointConfig",
            f"create_checkpoint_manager(CheckpointConfig(custom_manager_class={name!r}))",
        ]
    code = "\n".join(program)
    if page.name != "README.md":
        run_ranks(run_program, 1, code, tmp_path)
        return
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def run_program(code: str, directory: Path) -> None:
    os.chdir(directory)
    exec(compile(code, "page", "exec"), {"__name__": "__main__"})


def managers_named_in(page: Path) -> set[str]:
    settings = [yaml.safe_load(block.code) for block in blocks_of(page) if block.language == "yaml"]
    return {values.get("checkpoint", {}).get("custom_manager_class") for values in settings} - {None}


def test_the_pages_show_managers() -> None:
    assert [page.name for page in PAGES if managers_named_in(page)] == ["README.md", "custom-manager.md"]


@pytest.mark.parametrize("block", [block for block in blocks("python") if not block.is_run], ids=str)
def test_python_blocks_that_are_not_run_compile(block: Block) -> None:
    compile(block.code, str(block), "exec")


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_blocks_are_valid_recipes_or_overlays(block: Block, tmp_path: Path) -> None:
    settings = yaml.safe_load(block.code)
    assert settings.keys() <= SECTIONS
    file = tmp_path / "block.yaml"
    file.write_text(block.code)
    whole = {"model", "train", "dataset"} <= settings.keys()
    config = load_config(file) if whole else load_config(ROOT / "recipes/quickstart.yaml", [file])
    if not whole:
        config.checkpoint.save = config.checkpoint.save or "runs/mine"
    config.validate(world_size=2)
    for section, values in settings.items():
        loaded = getattr(config, section)
        assert {key: getattr(loaded, key) for key in values} == values


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_bash_blocks_are_commands_that_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    if not block.is_run:
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and (variable := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
            monkeypatch.setenv(variable[1], variable[2])
            words = words[1:]
        if words[:1] == ["sbatch"]:
            words = list(dropwhile(lambda word: word not in LAUNCHERS, words))
        if not words or words[0] in OTHER_COMMANDS:
            continue
        if words[0] == "make":
            assert_make_targets_exist(words[1:])
        elif words[0] in LAUNCHERS:
            assert_script_accepts(["scripts/pretrain.py", *words[1:]])
        elif words[0] == "bridge-ckpt":
            parse(words[1:])  # raises if it does not understand
        else:
            assert words[0] in {"python", ".venv/bin/python"}, f"{block}: no rule to check {words[0]!r}"
            assert_script_accepts(words[1:])


def assert_make_targets_exist(words: list[str]) -> None:
    defined = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = {word.partition("=")[0] for word in words if "=" in word}
    assert variables <= {"PYTHON", "ARGS"}
    assert {word for word in words if "=" not in word} <= defined


def assert_script_accepts(words: list[str]) -> None:
    """A command line of one of our scripts: its options exist, the files it names exist, its overrides load."""
    if words[:2] == LAUNCHER:
        start = next(index for index, word in enumerate(words) if word.endswith(".py"))
        assert {word for word in words[2:start] if word.startswith("-")} <= {"--standalone", "--nproc-per-node"}
        words = words[start:]
    length = 2 if words[0] == "-m" else 1
    script, arguments = tuple(words[:length]), words[length:]
    options = {word for word in arguments if word.startswith("--")}
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(script)))
    assert options <= known
    if script == ("scripts/pretrain.py",):
        files = {name: values_of(arguments, name) for name in ("--recipe", "--overlay")}
        overrides = [word for word in arguments if re.match(r"[a-z_]+\.[a-z_]+=", word)]
        recipe = ROOT / files["--recipe"][0]
        load_config(recipe, [ROOT / file for file in files["--overlay"]], overrides).validate()
        assert len(arguments) == 2 * sum(map(len, files.values())) + len(overrides)


def values_of(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


@cache
def help_of(script: tuple[str, ...]) -> str:
    command = [sys.executable, *script, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text()):
        target = (page.parent / match["target"]).resolve() if match["target"] else page
        assert target.exists(), match[0]
        if match["anchor"]:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert match["anchor"] in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_all_pages_are_listed() -> None:
    index = ROOT / "docs/index.md"
    listed = {(index.parent / match["target"]).resolve() for match in LINK.finditer(index.read_text())}
    assert set(PAGES) - {index, ROOT / "CONTRIBUTING.md"} <= listed


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    table = page.read_text().split(f"\n{heading}\n", 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_the_table_of_checkpoint_settings_is_complete_and_right() -> None:
    documented = {
        name.strip("`"): (ast.literal_eval(default.strip("`")), "later" in meaning)
        for name, default, meaning in table_rows(ROOT / "docs/configuration.md", "## The section `checkpoint`")
    }
    assert documented == {
        field.name: (field.default, f"checkpoint.{field.name}" in NOT_AVAILABLE)
        for field in dataclasses.fields(CheckpointConfig)
    }


@pytest.mark.parametrize(("heading", "folder"), [("## Presets", "configs/checkpoint"), ("## Recipes", "recipes")])
def test_the_tables_of_presets_and_recipes_list_every_file(heading: str, folder: str) -> None:
    listed = {row[0].strip("`") for row in table_rows(ROOT / "docs/configuration.md", heading)}
    assert listed == {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.yaml")}
