"""The recipes and presets that come with the project load and are valid, for the ranks they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.training.config import ConfigContainer, load_config

ROOT = Path(__file__).resolve().parents[3]
RECIPES = {"quickstart": 2, "lora": 2, "tp2_pp2": 4, "moe_ep2": 4, "gpt_7b_h100": 8}
"""Recipe names with the number of ranks."""
PRESETS = sorted((ROOT / "configs" / "checkpoint").glob("*.yaml"))
PATHS = ["checkpoint.save=/s", "checkpoint.load=/s"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data/text_document")
    monkeypatch.setenv("TOKENIZER", "/data/tokenizer")
    monkeypatch.setenv("CHECKPOINTS", "/checkpoints")


def load(name: str, *arguments: list[Path] | list[str]) -> ConfigContainer:
    return load_config(ROOT / "recipes" / f"{name}.yaml", *arguments)


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == RECIPES.keys()
    assert PRESETS


@pytest.mark.parametrize(("name", "world_size"), RECIPES.items())
def test_recipe_is_valid(name: str, world_size: int) -> None:
    load(name).validate(world_size)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_fits_every_recipe(name: str, preset: Path) -> None:
    paths = [] if preset.stem == "object_storage" else PATHS  # which says where, as no other preset does
    config = load(name, [preset], paths)
    config.validate(RECIPES[name])
    assert config.checkpoint != load(name, [], paths).checkpoint or preset.stem == "sync"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_say_when_to_use_them_and_touch_nothing_else(preset: Path) -> None:
    assert preset.read_text().startswith("# ")
    config = load("quickstart", [preset])
    config.checkpoint = load("quickstart").checkpoint
    assert config == load("quickstart")


def test_what_the_recipes_are_made_for() -> None:
    quickstart, split, experts = load("quickstart"), load("tp2_pp2"), load("moe_ep2")
    assert quickstart.data_parallel_size(2) == 2
    assert quickstart.ddp.use_distributed_optimizer
    assert quickstart.model.attention_dropout > 0 and quickstart.model.hidden_dropout > 0
    assert (quickstart.train.train_iters, quickstart.checkpoint.save_interval) == (40, 5)
    assert (quickstart.checkpoint.save, quickstart.checkpoint.load) == (None, None)
    assert not quickstart.checkpoint.async_save
    assert split.data_parallel_size(4) == 1
    assert (experts.data_parallel_size(4), experts.model.expert_model_parallel_size) == (4, 2)


def test_the_gpu_recipe_resumes_from_where_it_saves() -> None:
    config = load("gpt_7b_h100")
    assert config.checkpoint.save == config.checkpoint.load == "/checkpoints"
    config.validate(64)
