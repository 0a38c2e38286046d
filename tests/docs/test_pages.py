"""Every setting has its place, the settings that pages name exist, and pictures can be read in light and in dark."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bridge.training.config import ConfigContainer
from bridge.training.config.schema import field_types, section_type

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMAGES = sorted((ROOT / "docs/images").glob("*.svg"))
SECTIONS = {
    name: field_types(section) for name, kind in field_types(ConfigContainer).items() if (section := section_type(kind))
}

NOT_OURS = {
    # Keys of a state dict, and settings of Megatron Bridge.
    *(
        "model.embedding",
        "model.module",
        "model.sharded_state_dict",
        "model.safetensors",
        "optimizer.state",
        "optimizer.param_to_group_meta",
    ),
    *("optimizer.sharded_state_dict", "dataset.dataloader_save"),
    *("tokenizer.json", "tokenizer.model"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_its_place(section: str) -> None:
    if section == "checkpoint":
        page, entry = "checkpoint-config.md", r"^## `(\w+)`$"
        text = (ROOT / "docs/reference" / page).read_text()
    else:
        page, entry = "configuration.md", r"^\| `(\w+)` \|"
        text = (ROOT / "docs/reference" / page).read_text().split(f"\n## `{section}`\n")[1].split("\n## ")[0]
    assert re.findall(entry, text, re.MULTILINE) == list(SECTIONS[section])


def settings_named_in(page: Path) -> set[str]:
    """`section.setting` in code, with or without a value."""
    names = re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)", page.read_text())
    return {f"{section}.{name}" for section, name in names} - NOT_OURS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    known = {f"{section}.{name}" for section, fields in SECTIONS.items() for name in fields}
    assert settings_named_in(page) <= known


MIGRATE = (ROOT / "docs/migrate.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of docs/migrate.md."""
    table = MIGRATE.split(f"\n{heading}\n", 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def test_settings_that_are_to_be_left_out_do_not_exist() -> None:
    left_out = [row[0] for row in rows("### Settings") if row[1].startswith(("Leave", "There are no such"))]
    names = {name.rpartition(".")[2] for cell in left_out for name in re.findall(r"`([\w.]+)`", cell)}
    assert len(names) > 12
    known = set(SECTIONS) | {name for fields in SECTIONS.values() for name in fields}
    assert names & known == set()


def test_every_argument_of_megatron_lm_has_its_setting() -> None:
    pairs = [(re.findall(r"`--", left), re.findall(r"`\w+\.\w+", right)) for left, right in rows("## From Megatron-LM")]
    assert len(pairs) > 15
    assert [(a, b) for a, b in pairs if len(a) != len(b)] == [(["`--"], [])]  # --use-checkpoint-args


def test_every_benchmark_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "scripts/benchmarks").glob("*.py") if path.name[0] != "_"}


def test_settings_are_found_in_pages() -> None:
    assert len(settings_named_in(ROOT / "docs/migrate.md")) > 25


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_a_picture_says_what_it_shows_in_light_and_dark_and_fetches_nothing(image: Path) -> None:
    text = image.read_text()
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(text)
    for part in ("title", "desc"):
        found = root.find(space + part)
        assert found is not None and found.get("id") in root.get("aria-labelledby", "") and len(found.text or "") > 20
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?:href|src|url\()\W*(?!#)\w+:", text) == []
    width, height = (float(n) for n in root.get("viewBox", "").split()[2:])
    for element in root.iter(space + "rect"):
        assert float(element.get("x", 0)) + float(element.get("width", 0)) <= width
        assert float(element.get("y", 0)) + float(element.get("height", 0)) <= height
    assert any(f"images/{image.name}" in page.read_text() for page in PAGES), "no page shows it"


def test_there_are_pictures() -> None:
    assert len(IMAGES) >= 4
