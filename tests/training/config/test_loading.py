"""load_config: recipe, overlays and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.training.config import ConfigContainer, ConfigError, LoRAConfig, load_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model:\n  num_layers: 2\n")
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problems(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides=overrides)
    return list(caught.value.problems)


def test_what_the_recipe_leaves_out_has_its_default(recipe: Path) -> None:
    expected = ConfigContainer()
    expected.model.num_layers = 2
    assert load_config(recipe) == expected


def test_later_overlays_win_and_overrides_win_over_all(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "model: {num_layers: 1, hidden_size: 16, seq_length: 8}\nrng: {seed: 5}")
    first = write(tmp_path / "a.yaml", "model: {hidden_size: 32, seq_length: 16}")
    second = write(tmp_path / "b.yaml", "model: {seq_length: 64}\ntrain: {train_iters: 7}")
    config = load_config(recipe, [first, second], ["model.seq_length=128", "model.seq_length=256"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.seq_length) == (1, 32, 256)
    assert (config.rng.seed, config.train.train_iters) == (5, 7)
    assert load_config(recipe, [second, first]).model.seq_length == 16


def test_lists_are_replaced_and_mappings_are_merged(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "r.yaml",
        "dataset: {path: [a, b, c]}\nmodel: {transformer_overrides: {qk_layernorm: true, deep: {x: 1}}}",
    )
    overlay = write(tmp_path / "o.yaml", "dataset: {path: [d]}\nmodel: {transformer_overrides: {deep: {y: [1, 2]}}}")
    config = load_config(recipe, [overlay], ["model.transformer_overrides.deep.x=null"])
    assert config.dataset.path == ["d"]
    assert config.model.transformer_overrides == {"qk_layernorm": True, "deep": {"x": None, "y": [1, 2]}}


@pytest.mark.parametrize(
    ("override", "setting", "expected"),
    [
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=3.0E-4", "optimizer.lr", 3e-4),
        ("train.train_iters=40", "train.train_iters", 40),
        ("train.train_iters=null", "train.train_iters", None),
        ("checkpoint.async_save=true", "checkpoint.async_save", True),
        ("checkpoint.save=/a=b", "checkpoint.save", "/a=b"),
        ("checkpoint.save='2024'", "checkpoint.save", "2024"),
        ("checkpoint.save=/path with spaces/x", "checkpoint.save", "/path with spaces/x"),
        ('checkpoint.save=""', "checkpoint.save", ""),
        ("checkpoint.non_persistent_ckpt_type=None", "checkpoint.non_persistent_ckpt_type", None),
        ("dataset.split=99,1,0", "dataset.split", "99,1,0"),
        ("dataset.path=[a, b]", "dataset.path", ["a", "b"]),
        ("dataset.weights=[1, 0.5]", "dataset.weights", [1.0, 0.5]),
        ("train.rampup_batch_size=[2,2,10]", "train.rampup_batch_size", [2, 2, 10]),
        ("model.transformer_overrides={a: {b: 1}}", "model.transformer_overrides", {"a": {"b": 1}}),
        (" model.num_layers =3", "model.num_layers", 3),
        ("model.ffn_hidden_size=${model.hidden_size}", "model.ffn_hidden_size", 128),
        ("peft.dim=4", "peft", LoRAConfig(dim=4)),
    ],
)
def test_override(recipe: Path, override: str, setting: str, expected: Any) -> None:
    value: Any = load_config(recipe, overrides=[override])
    for part in setting.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_interpolation_sees_environment_defaults_and_later_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", "/runs")
    monkeypatch.setenv("LAYERS", "6")
    recipe = write(
        tmp_path / "r.yaml",
        "checkpoint: {save: '${oc.env:RUNS}/one', load: '${checkpoint.save}'}\n"
        "model: {num_layers: '${oc.decode:${oc.env:LAYERS}}', ffn_hidden_size: '${model.hidden_size}'}\n",
    )
    config = load_config(recipe, overrides=["checkpoint.save=/elsewhere"])
    assert config.checkpoint.load == "/elsewhere"
    assert (config.model.num_layers, config.model.ffn_hidden_size) == (6, 128)
    assert load_config(recipe).checkpoint.load == "/runs/one"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layer=4", "unknown setting 'model.num_layer'; did you mean 'model.num_layers'?"),
        ("checkpoint.saev=/x", "unknown setting 'checkpoint.saev'; did you mean 'checkpoint.save'?"),
        ("chekpoint.save=/x", "unknown section 'chekpoint'; did you mean 'checkpoint'?"),
        ("model.lr=1", "unknown setting 'model.lr'; did you mean 'optimizer.lr'?"),
        ("train_iters=5", "unknown section 'train_iters'; did you mean 'train.train_iters'?"),
        ("asinc_save=true", "unknown section 'asinc_save'; did you mean 'checkpoint.async_save'?"),
        ("model.zzz.y=1", "unknown setting 'model.zzz'; it is no field of GPTModelConfig"),
        (
            "zzz=1",
            "unknown section 'zzz'; the sections are model, optimizer, scheduler, ddp, train, dataset, tokenizer, "
            "checkpoint, rng, dist, logger, rerun_state_machine, peft",
        ),
        (
            "model._target_=os.system",
            "unknown setting 'model._target_'; this looks like a run_config.yaml: "
            "read it with ConfigContainer.from_yaml",
        ),
        ("model=null", "model: null is not a mapping; set its settings one by one"),
        ("model=4", "model: 4 is not a mapping; set its settings one by one"),
        ("peft=5", "peft: 5 is not a mapping; set its settings one by one"),
        ("peft.dims=5", "unknown setting 'peft.dims'; did you mean 'peft.dim'?"),
    ],
)
def test_unknown_names_get_the_nearest_one(recipe: Path, override: str, expected: str) -> None:
    assert problems(recipe, override) == [f"override {override!r}: {expected}"]


def test_unknown_names_name_their_file_and_come_all_at_once(recipe: Path, tmp_path: Path) -> None:
    overlay = write(tmp_path / "overlay.yaml", "model: {hidden: 3}\ntrian: {train_iters: 1}\n1: {a: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [overlay], ["rng.sed=4"])
    assert list(caught.value.problems) == [
        f"{overlay}: unknown setting 'model.hidden'; did you mean 'model.hidden_size'?",
        f"{overlay}: unknown section 'trian'; did you mean 'train'?",
        f"{overlay}: unknown section '1'; the sections are model, optimizer, scheduler, ddp, train, dataset, "
        "tokenizer, checkpoint, rng, dist, logger, rerun_state_machine, peft",
        "override 'rng.sed=4': unknown setting 'rng.sed'; did you mean 'rng.seed'?",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.train_iters=abc", "train.train_iters: 'abc' is not valid; set it to an integer or null"),
        ("train.train_iters=1e3", "train.train_iters: 1000.0 is not valid; set it to an integer or null"),
        ("train.train_iters=true", "train.train_iters: true is not valid; set it to an integer or null"),
        ("optimizer.lr=yes", "optimizer.lr: true is not valid; set it to a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr: nan is not valid; set it to a finite number"),
        ("model.hidden_size=null", "model.hidden_size: null is not valid; set it to an integer"),
        ("model.hidden_size={a: 1}", "model.hidden_size: {'a': 1} is not valid; set it to an integer"),
        ("checkpoint.async_save=1", "checkpoint.async_save: 1 is not valid; set it to true or false"),
        ("checkpoint.save=2024", "checkpoint.save: 2024 is not valid; set it to a string or null, in quotes"),
        ("model.activation=relu", "model.activation: 'relu' is not valid; set it to 'gelu' or 'swiglu'"),
        (
            "train.rampup_batch_size=[1,a]",
            "train.rampup_batch_size: [1, 'a'] is not valid; set it to a list of integers or null",
        ),
        ("model.transformer_overrides=7", "model.transformer_overrides: 7 is not valid; set it to a mapping"),
        ("dataset.path=???", "dataset.path: ??? asks for a value and none was given; set it"),
        ("checkpoint.save=${nope}", "checkpoint.save: cannot be resolved: Interpolation key 'nope' not found"),
        (
            "checkpoint.save=${oc.env:SURELY_NOT_SET}",
            "checkpoint.save: cannot be resolved: KeyError raised while resolving interpolation: "
            "\"Environment variable 'SURELY_NOT_SET' not found\"",
        ),
    ],
)
def test_a_value_of_the_wrong_type_names_setting_and_place(recipe: Path, override: str, expected: str) -> None:
    assert problems(recipe, override) == [f"{expected} (from override {override!r})"]


def test_a_wrong_value_names_the_file_that_set_it_last(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "model: {num_layers: a}\nrng: {seed: b}")
    overlay = write(tmp_path / "o.yaml", "model: {num_layers: c}")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [overlay])
    assert list(caught.value.problems) == [
        f"model.num_layers: 'c' is not valid; set it to an integer (from {overlay})",
        f"rng.seed: 'b' is not valid; set it to an integer (from {recipe})",
    ]


@pytest.mark.parametrize("override", ["model.num_layers", "", "=4", "  =4"])
def test_an_override_needs_a_key_and_an_equals_sign(recipe: Path, override: str) -> None:
    assert problems(recipe, override) == [f"override {override!r}: expected section.key=value"]


def test_an_empty_value_is_not_guessed(recipe: Path) -> None:
    """An unset shell variable must not turn into "save nothing"."""
    assert problems(recipe, "checkpoint.save=") == [
        "override 'checkpoint.save=': the value is empty; "
        "write checkpoint.save=null to unset it or checkpoint.save='\"\"' for no text"
    ]


def test_a_malformed_value(recipe: Path) -> None:
    [problem] = problems(recipe, "dataset.path=[a")
    assert problem.startswith("override 'dataset.path=[a': the value is not valid YAML: ")


@pytest.mark.parametrize("text", ["model: [", "model: {a: 1, a: 2}", "model:\n\tx: 1", "a: &a {b: *a}", "a: b: c"])
def test_malformed_files(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path} is not valid YAML: ")


@pytest.mark.parametrize("text", ["- a\n- b", "5"])
def test_a_file_without_sections(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_missing_files(recipe: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    for arguments in ([missing], [recipe, [missing]]):
        with pytest.raises(ConfigError, match=f"cannot read the configuration file {missing}: .*No such file"):
            load_config(*arguments)
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=str(binary)):
        load_config(binary)


def test_an_empty_section_sets_nothing_and_peft_can_be_unset(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "model:\n  # num_layers: 4\npeft: {dim: 3}\n")
    overlay = write(tmp_path / "o.yaml", "peft: null\n")
    assert load_config(recipe).peft == LoRAConfig(dim=3)
    assert load_config(recipe, [overlay]) == ConfigContainer()


def test_a_recipe_can_ask_for_a_value(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "dataset:\n  path: ???\n")
    with pytest.raises(ConfigError, match=r"^dataset.path: \?\?\? asks for a value and none was given; set it"):
        load_config(recipe)
    assert load_config(recipe, overrides=["dataset.path=x"]).dataset.path == "x"


def test_loading_does_not_check_rules(recipe: Path) -> None:
    config = load_config(recipe, overrides=["model.num_layers=-5"])
    assert config.model.num_layers == -5
    with pytest.raises(ConfigError):
        config.validate()
