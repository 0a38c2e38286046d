"""The generated reference page is up to date, covers every field, and its examples hold."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from bridge.training.config import CheckpointConfig
from bridge.training.config.availability import NOT_AVAILABLE

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generate_reference.py"
spec = importlib.util.spec_from_file_location("generate_reference", SCRIPT)
assert spec is not None and spec.loader is not None
generator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generator)


def test_the_page_is_up_to_date() -> None:
    assert generator.PAGE.read_text() == generator.page(), "run scripts/generate_reference.py"


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
}
"""What the example of a field stands beside."""


def test_the_examples_are_refused_only_where_the_page_says_so() -> None:
    rest = {"save": "runs/mine", "load": "runs/mine", "pretrained_checkpoint": "runs/base"}
    for name, value in generator.EXAMPLES.items():
        settings = rest | COMPANIONS.get(name, {}) | {name: value}
        problems = CheckpointConfig(**settings).violations()
        refused = f"checkpoint.{name}" in NOT_AVAILABLE and value != getattr(CheckpointConfig(), name)
        assert bool(problems) == refused, (name, problems)
