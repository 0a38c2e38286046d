"""What is generated is up to date, covers every field, and its examples hold."""

import importlib.util
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bridge.training.config import CheckpointConfig, ConfigContainer, LoRAConfig
from bridge.training.config.availability import NOT_AVAILABLE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "generate_reference.py"
spec = importlib.util.spec_from_file_location("generate_reference", SCRIPT)
assert spec is not None and spec.loader is not None
generator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generator)


def test_the_page_is_up_to_date() -> None:
    assert generator.PAGE.read_text() == generator.page(), "run scripts/generate_reference.py"
    assert generator.SECTIONS.read_text() == generator.sections_page(), "run scripts/generate_reference.py"


def test_every_field_has_an_entry_with_an_example_that_sets_it() -> None:
    names = [field.name for field in fields(CheckpointConfig)]
    assert re.findall(r"^## `(\w+)`$", generator.PAGE.read_text(), re.MULTILINE) == names
    examples = [yaml.safe_load(line) for line in re.findall(r"^- Example: `(.*)`$", generator.page(), re.MULTILINE)]
    assert examples == [{name: generator.EXAMPLES[name]} for name in names]
    assert set(generator.EXAMPLES) == set(names)


COMPANIONS: dict[str, dict[str, Any]] = {
    "load_main_params_from_ckpt": {"load_optim": False},
    "non_persistent_save_interval": {"non_persistent_ckpt_type": "global"},
    "non_persistent_ckpt_type": {"non_persistent_local_ckpt_dir": "/local/checkpoints"},
    "strict_fsdp_dtensor_load": {"ckpt_format": "fsdp_dtensor"},
    "replication": {"non_persistent_ckpt_type": "in_memory", "replication_jump": 8},
    "retain_best_k": {"retain_best_metric": "loss"},
    "retain_best_metric": {"retain_best_k": 1},
    "retain_best_mode": {"retain_best_k": 1, "retain_best_metric": "loss"},
    "retain_iterations": {"most_recent_k": 1},
    "mirror_required": {"mirror": "s3://mybucket/runs/mine"},
    "staging_dir": {"save": "s3://mybucket/runs/mine"},
}
"""What the example of a field stands beside."""


def test_the_examples_are_refused_only_where_the_page_says_so() -> None:
    rest = {"save": "runs/mine", "load": "runs/mine", "pretrained_checkpoint": "runs/base"}
    for name, value in generator.EXAMPLES.items():
        settings = rest | COMPANIONS.get(name, {}) | {name: value}
        problems = CheckpointConfig(**settings).violations()
        refused = f"checkpoint.{name}" in NOT_AVAILABLE and value != getattr(CheckpointConfig(), name)
        assert bool(problems) == refused, (name, problems)


SCHEMA = json.loads(generator.SCHEMA.read_text())
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))


def refusals(settings: Any) -> list[str]:
    """Where the schema refuses settings."""
    return [error.json_path for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(settings)]


def test_the_schema_is_up_to_date_and_is_one() -> None:
    assert generator.recipe_schema() == SCHEMA, "run scripts/generate_reference.py"
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", [*RECIPES, *PRESETS], ids=lambda path: path.name)
def test_recipes_and_presets_are_valid_by_the_schema_that_they_name(path: Path) -> None:
    first, _, rest = path.read_text().partition("\n")
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named is not None
    assert (path.parent / named[1]).resolve() == generator.SCHEMA
    assert refusals(yaml.safe_load(rest)) == []


def test_the_schema_takes_every_default_and_has_every_setting() -> None:
    defaults = asdict(ConfigContainer(peft=LoRAConfig()))
    assert refusals(defaults) == []
    assert {name: set(section["properties"]) for name, section in SCHEMA["properties"].items()} == {
        name: set(section) for name, section in defaults.items()
    }
    stated = {
        name: {key: setting["default"] for key, setting in section["properties"].items()}
        for name, section in SCHEMA["properties"].items()
    }
    assert stated == defaults


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("train", "train_iters", "???"),
        ("train", "train_iters", "${oc.decode:${oc.env:ITERATIONS}}"),
        ("checkpoint", "save", "${oc.env:HOME}/runs"),
        ("checkpoint", "fully_parallel_load", "auto"),
        ("checkpoint", "retain_iterations", [1000, "${train.train_iters}"]),
        ("checkpoint", "ckpt_format", "mypackage.MyStrategy"),
    ],
)
def test_the_schema_takes_what_recipes_may_hold(section: str, setting: str, value: Any) -> None:
    assert refusals({section: {setting: value}}) == []


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"chekpoint": {}}, "$"),
        ({"checkpoint": {"save_intervall": 1}}, "$.checkpoint"),
        ({"checkpoint": {"save_interval": "often"}}, "$.checkpoint.save_interval"),
        ({"checkpoint": {"save_interval": 1.5}}, "$.checkpoint.save_interval"),
        ({"checkpoint": {"integrity": "some"}}, "$.checkpoint.integrity"),
        ({"checkpoint": {"async_save": 1}}, "$.checkpoint.async_save"),
        ({"checkpoint": {"retain_iterations": 1000}}, "$.checkpoint.retain_iterations"),
    ],
)
def test_the_schema_refuses_what_is_wrong(settings: dict[str, Any], place: str) -> None:
    assert refusals(settings) == [place]
