"""The section `peft`: its rules, and its way through recipes and run_config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import ConfigContainer, ConfigError, LoRAConfig, load_config
from tests.training.tiny import tiny_config


def problems(peft: LoRAConfig | None, **checkpoint: Any) -> list[str]:
    config = tiny_config(checkpoint={"pretrained_checkpoint": "/base", **checkpoint})
    config.peft = peft
    try:
        config.validate()
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dim": 0}, "peft.dim: 0 is too small; set it to 1 or more"),
        ({"dim": "8"}, "peft.dim: '8' is not valid; set it to an integer, without quotes "),
        ({"alpha": 0.0}, "peft.alpha: 0.0 is too small; set it to a number above 0"),
        ({"dropout": 1.0}, "peft.dropout: 1.0 is out of range; set it to a number from 0 to below 1"),
        ({"kind": "dora"}, "peft.kind: 'dora' is not valid; set it to 'lora'"),
        (
            {"target_modules": []},
            "peft.target_modules: [] leaves nothing to train; name some of linear_qkv, linear_proj, linear_fc1, "
            "linear_fc2",
        ),
        (
            {"target_modules": ["linear_qvk"]},
            "peft.target_modules: 'linear_qvk' is no linear layer of a transformer layer; did you mean 'linear_qkv'?",
        ),
        (
            {"target_modules": ["attention"]},
            "peft.target_modules: 'attention' is no linear layer of a transformer layer; the layers are linear_qkv, "
            "linear_proj, linear_fc1, linear_fc2",
        ),
        (
            {"target_modules": ["linear_fc1", "linear_fc1"]},
            "peft.target_modules: ['linear_fc1', 'linear_fc1'] names a layer twice; name each once",
        ),
    ],
)
def test_settings_of_lora(settings: dict[str, Any], problem: str) -> None:
    (found,) = problems(LoRAConfig(**settings))
    assert found.startswith(problem)


def test_peft_needs_a_base_model_and_nothing_else_needs_peft() -> None:
    assert problems(LoRAConfig()) == problems(None) == problems(None, pretrained_checkpoint=None) == []
    assert problems(LoRAConfig(), pretrained_checkpoint=None) == [
        "checkpoint.pretrained_checkpoint: null names no base model, and peft trains only what is added to one; "
        "set it to the base model's directory of checkpoints, or peft to null"
    ]


@pytest.mark.parametrize("base", ["base", "./base", "base/iter_0000001"])
def test_adapters_are_not_saved_where_the_base_model_lies(base: str) -> None:
    assert problems(None, pretrained_checkpoint=base, save="base") == []
    assert problems(LoRAConfig(), pretrained_checkpoint=base, save="base") == [
        "checkpoint.save: 'base' is where checkpoint.pretrained_checkpoint lies: adapters would take the place of the "
        "base model; set it to another directory"
    ]


def test_through_a_recipe_an_overlay_and_an_override(tmp_path: Path) -> None:
    recipe, off, on = (tmp_path / name for name in ("recipe.yaml", "off.yaml", "on.yaml"))
    recipe.write_text("peft:\n  kind: lora\n  dim: 3\n  target_modules: [linear_qkv]\n")
    off.write_text("peft: null\n")
    on.write_text("peft: {}\n")
    assert load_config(recipe).peft == LoRAConfig(dim=3, target_modules=["linear_qkv"])
    assert load_config(recipe, [off]).peft is None
    assert load_config(recipe, [off, on]).peft == LoRAConfig()
    assert load_config(off, [], ["peft.alpha=4"]).peft == LoRAConfig(alpha=4.0)
    with pytest.raises(ConfigError, match=r"peft.dim: 'x' is not valid; set it to an integer \(from override"):
        load_config(recipe, [], ["peft.dim=x"])


@pytest.mark.parametrize("peft", [None, LoRAConfig(dim=3)])
def test_through_run_config_yaml(tmp_path: Path, peft: LoRAConfig | None) -> None:
    config = tiny_config()
    config.peft = peft
    config.to_yaml(tmp_path / "run_config.yaml")
    assert ConfigContainer.from_yaml(tmp_path / "run_config.yaml") == config


def test_run_config_yaml_takes_no_other_class() -> None:
    values = tiny_config().to_dict()
    with pytest.raises(ConfigError, match=r"^peft: the `_target_` 'os.system' is not allowed here"):
        ConfigContainer.from_dict(values | {"peft": {"_target_": "os.system"}})
    with pytest.raises(ConfigError, match=r"^peft.dims: unknown setting; did you mean 'dim'\?"):
        ConfigContainer.from_dict(values | {"peft": {"dims": 3}})
