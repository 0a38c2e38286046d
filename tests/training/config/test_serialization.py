"""run_config.yaml: the documented shape, the exact round trip, and what is refused on reading."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge.training.config as public
from bridge.training.config import CheckpointConfig, ConfigContainer, ConfigError
from bridge.training.config.schema import field_types

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def values_of(declared: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type."""
    origin = get_origin(declared)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(member) for member in get_args(declared)])
    if origin is Literal:
        return st.sampled_from(get_args(declared))
    if origin is list:
        return st.lists(values_of(get_args(declared)[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text().filter(lambda key: key != "_target_"), plain_values, max_size=3)
    if dataclasses.is_dataclass(declared):
        fields = {name: values_of(kind) for name, kind in field_types(declared).items()}
        return st.builds(declared, **fields)
    return {
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(),
        type(None): st.none(),
    }[declared]


@settings(deadline=None, max_examples=60)
@given(config=values_of(ConfigContainer))
def test_any_configuration_round_trips_through_text(config: ConfigContainer) -> None:
    text = config.to_yaml()
    again = ConfigContainer.from_dict(yaml.safe_load(text))
    assert again == config
    assert again.to_yaml() == text


@settings(deadline=None, max_examples=100)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_comes_back_as_the_same_float(value: float) -> None:
    config = ConfigContainer()
    config.optimizer.lr = value
    lr = ConfigContainer.from_dict(yaml.safe_load(config.to_yaml())).optimizer.lr
    assert (type(lr), lr.hex()) == (float, value.hex())


def test_file_round_trip(tmp_path: Path) -> None:
    config = ConfigContainer()
    config.checkpoint = CheckpointConfig(save="/ç/ü — 漢", save_interval=5, async_save=True)
    config.dataset.path = ["yes", "1e5", "null", "2024-01-01", " a: b", "${oc.env:HOME}"]
    path = tmp_path / "run_config.yaml"
    text = config.to_yaml(path)
    assert path.read_text(encoding="utf-8") == text
    assert ConfigContainer.from_yaml(path) == config
    assert ConfigContainer.from_dict(config.to_dict()) == config


def test_shape_of_the_file() -> None:
    values = yaml.safe_load(ConfigContainer().to_yaml())
    assert list(values) == sorted(values)
    assert values.keys() - {"_target_"} == field_types(ConfigContainer).keys()
    assert values["_target_"] == "bridge.training.config.ConfigContainer"
    assert values["checkpoint"]["_target_"] == "bridge.training.config.CheckpointConfig"
    assert values["model"]["tensor_model_parallel_size"] == 1
    for name, section in values.items():
        if isinstance(section, dict):
            assert list(section) == sorted(section)
            declared = field_types(ConfigContainer)[name]
            assert section.keys() - {"_target_"} == field_types(declared).keys()
            assert getattr(public, section["_target_"].rpartition(".")[2]) is declared


def test_every_value_is_on_a_line_of_its_own() -> None:
    config = ConfigContainer()
    config.checkpoint.save = "/directory with spaces" * 20
    lines = config.to_yaml().splitlines()
    assert f"  save: {config.checkpoint.save}" in lines
    assert "  layernorm_epsilon: 1.0e-05" in lines


def test_a_changed_setting_is_written_also_where_it_is_equal_to_the_old_one() -> None:
    config = ConfigContainer()
    found = []
    for value in (1, True, 1.0, 1, [1], [True]):
        config.model.transformer_overrides = {"a": value}
        found.append(yaml.safe_load(config.to_yaml())["model"]["transformer_overrides"]["a"])
    assert [repr(value) for value in found] == ["1", "True", "1.0", "1", "[1]", "[True]"]


def test_what_has_no_plain_form_is_not_written() -> None:
    config = ConfigContainer()
    config.model.transformer_overrides = {"init_method": print}
    with pytest.raises(ConfigError, match=r"^model.transformer_overrides: .* cannot be written; use plain values"):
        config.to_yaml()
    config.model.transformer_overrides = {"a": {"_target_": "os.system"}}
    with pytest.raises(ConfigError, match="none of them `_target_`"):
        config.to_yaml()


def test_a_written_copy_shares_nothing_with_the_configuration() -> None:
    config = ConfigContainer()
    config.model.transformer_overrides = {"a": [1]}
    config.to_dict()["model"]["transformer_overrides"]["a"].append(2)
    assert config.model.transformer_overrides == {"a": [1]}


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "bridge.training.config.ConfigContainer",
        "bridge.training.config.OptimizerConfig",
        "bridge.training.config.load_config",
        "bridge.training.config.model.GPTModelConfig",
        "GPTModelConfig",
        "",
        None,
        7,
        ["bridge.training.config.GPTModelConfig"],
    ],
)
def test_a_target_is_only_ever_the_class_of_its_section(target: Any, tmp_path: Path) -> None:
    values = ConfigContainer().to_dict()
    values["model"]["_target_"] = target
    path = tmp_path / "run_config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        ConfigContainer.from_yaml(path)
    shown = "null" if target is None else repr(target)
    assert str(caught.value) == (
        f"{path}: model: the `_target_` {shown} is not allowed here; it must be 'bridge.training.config.GPTModelConfig'"
    )


@pytest.mark.parametrize(
    "attack",
    [
        {"peft": {"_target_": "os.system", "_args_": ["touch {file}"], "_call_": True}},
        {"model": {"transformer_overrides": {"x": {"_target_": "os.system", "_args_": ["touch {file}"]}}}},
        {"rng": {"seed": {"_target_": "builtins.exec", "_args_": ["open('{file}', 'w')"]}}},
        {"_target_": "os.system", "command": "touch {file}"},
    ],
)
def test_a_file_cannot_run_anything(attack: dict[str, Any], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = tmp_path / "run_config.yaml"
    path.write_text(yaml.safe_dump(attack).replace("{file}", str(proof)))
    with pytest.raises(ConfigError):
        ConfigContainer.from_yaml(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "model: !!python/name:os.system",
        "model: [",
        "peft: &a {b: *a}",
        "peft: {a: &a [1], b: *a}",
        "[" * 5000,
        "rng: {seed: 2024-99-99}",
    ],
)
def test_files_that_are_no_plain_yaml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ConfigContainer.from_yaml(path)
    assert str(caught.value).startswith(f"{path} is not valid YAML: ")


def test_reading_reports_every_problem_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text("model: {num_layer: 3, hidden_size: big}\nrng: 4\nzzz: 1\noptimizer: {lr: '1e-5'}\n")
    with pytest.raises(ConfigError) as caught:
        ConfigContainer.from_yaml(path)
    assert list(caught.value.problems) == [
        f"{path}: model.num_layer: unknown setting; did you mean 'num_layers'?",
        f"{path}: model.hidden_size: 'big' is not valid; expected an integer",
        f"{path}: rng: 4 is not a mapping of settings; expected bridge.training.config.RNGConfig",
        f"{path}: zzz: unknown setting; was the file written by another version?",
        f"{path}: optimizer.lr: '1e-5' is not valid; expected a finite number, without quotes "
        "(${oc.decode:${oc.env:NAME}} reads one from the environment)",
    ]


@pytest.mark.parametrize("text", ["", "- a", "5", "hello"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"the file: .* is not a mapping of settings"):
        ConfigContainer.from_yaml(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*No such file"):
        ConfigContainer.from_yaml(tmp_path / "run_config.yaml")


def test_missing_settings_take_their_defaults() -> None:
    config = ConfigContainer.from_dict({"model": {"num_layers": 7}})
    assert config.model.num_layers == 7
    config.model.num_layers = 2
    assert config == ConfigContainer()


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, bridge.training.config; print({'torch', 'megatron', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"
