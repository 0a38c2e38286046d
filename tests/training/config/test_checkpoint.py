"""CheckpointConfig: the documented fields, the refused ones, and the rules between them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Optional, get_type_hints

import pytest

from bridge.training.config import CheckpointConfig, ConfigContainer
from bridge.training.config import validation as validation_module
from bridge.training.config.availability import NOT_AVAILABLE
from bridge.training.config.schema import default_of, field_types

STRICTNESS = Literal[
    "assume_ok_unexpected",
    "log_unexpected",
    "log_all",
    "raise_unexpected",
    "raise_all",
    "return_unexpected",
    "return_all",
    "ignore_all",
]
NON_PERSISTENT = Optional[Literal["global", "local", "in_memory", "None"]]  # noqa: UP045 (as documented)

DOCUMENTED: dict[str, tuple[Any, Any]] = {
    "save": (str | None, None),
    "save_interval": (int | None, None),
    "save_optim": (bool, True),
    "save_rng": (bool, True),
    "save_tokenizer_assets": (bool, True),
    "async_save": (bool, False),
    "load": (str | None, None),
    "load_optim": (bool, True),
    "load_rng": (bool, True),
    "load_main_params_from_ckpt": (bool, False),
    "ckpt_step": (int | None, None),
    "exit_on_missing_checkpoint": (bool, False),
    "dist_ckpt_strictness": (STRICTNESS, "assume_ok_unexpected"),
    "pretrained_checkpoint": (str | None, None),
    "ckpt_format": (Literal["torch_dist", "zarr", "fsdp_dtensor"], "torch_dist"),
    "fully_parallel_save": (bool, True),
    "fully_parallel_load": (bool, False),
    "ckpt_assume_constant_structure": (bool, False),
    "non_persistent_save_interval": (int | None, None),
    "non_persistent_ckpt_type": (NON_PERSISTENT, None),
    "non_persistent_global_ckpt_dir": (str | None, None),
    "non_persistent_local_ckpt_dir": (str | None, None),
    "non_persistent_local_ckpt_algo": (Literal["fully_parallel", "atomic"], "fully_parallel"),
    "replication": (bool, False),
    "replication_jump": (int | None, None),
    "replication_factor": (int, 2),
    "dist_ckpt_optim_fully_reshardable": (bool, False),
    "distrib_optim_fully_reshardable_mem_efficient": (bool, False),
}
"""The tables of the user guide."""

FURTHER: dict[str, tuple[Any, Any]] = {
    "custom_manager_class": (str | None, None),
    "finetune": (bool, False),
    "most_recent_k": (int, -1),
    "load_dataloader_state": (Literal["auto", "require", "ignore"], "auto"),
    "safe_globals": (list[str] | None, None),
    "storage_writers_per_rank": (int, 1),
    "strict_fsdp_dtensor_load": (bool, False),
}
"""Fields that the guide's tables do not have."""

CARRIED_OUT = {
    *("save", "save_interval", "save_optim", "save_rng", "save_tokenizer_assets", "async_save"),
    *("load", "load_optim", "load_rng", "ckpt_step", "exit_on_missing_checkpoint", "dist_ckpt_strictness"),
    *("load_dataloader_state", "safe_globals", "pretrained_checkpoint", "finetune", "load_main_params_from_ckpt"),
    *("dist_ckpt_optim_fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient"),
    *("fully_parallel_save", "fully_parallel_load", "storage_writers_per_rank", "custom_manager_class"),
}


def test_has_exactly_the_documented_fields() -> None:
    assert set(field_types(CheckpointConfig)) == DOCUMENTED.keys() | FURTHER.keys()


@pytest.mark.parametrize(("name", "expected"), [*DOCUMENTED.items(), *FURTHER.items()])
def test_field_has_the_documented_type_and_default(name: str, expected: tuple[Any, Any]) -> None:
    assert get_type_hints(CheckpointConfig)[name] == expected[0]
    assert getattr(CheckpointConfig(), name) == expected[1]
    assert type(getattr(CheckpointConfig(), name)) is type(expected[1])


def test_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        CheckpointConfig("/checkpoints")  # type: ignore[misc]


def test_the_string_none_is_no_type() -> None:
    assert CheckpointConfig(non_persistent_ckpt_type="None").non_persistent_ckpt_type is None


def test_defaults_have_no_violations() -> None:
    assert CheckpointConfig().violations() == []


REFUSED: list[tuple[str, Any, str]] = [
    ("ckpt_format", "zarr", "'zarr' is not available in this version; leave it at 'torch_dist'"),
    (
        "ckpt_format",
        "fsdp_dtensor",
        "'fsdp_dtensor' is not available in this version; leave it at 'torch_dist'",
    ),
    ("ckpt_assume_constant_structure", True, "true is not available in this version; leave it at false"),
    ("non_persistent_save_interval", 5, "5 is not available in this version; leave it at null"),
    ("non_persistent_ckpt_type", "local", "'local' is not available in this version; leave it at null"),
    ("non_persistent_global_ckpt_dir", "/x", "'/x' is not available in this version; leave it at null"),
    ("non_persistent_local_ckpt_dir", "/x", "'/x' is not available in this version; leave it at null"),
    (
        "non_persistent_local_ckpt_algo",
        "atomic",
        "'atomic' is not available in this version; leave it at 'fully_parallel'",
    ),
    ("replication", True, "true is not available in this version; leave it at false"),
    ("replication_jump", 4, "4 is not available in this version; leave it at null"),
    ("replication_factor", 3, "3 is not available in this version; leave it at 2"),
    ("most_recent_k", 3, "3 is not available in this version; leave it at -1"),
    ("strict_fsdp_dtensor_load", True, "true is not available in this version; leave it at false"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_a_field_that_is_not_carried_out_is_refused(name: str, value: Any, message: str) -> None:
    """One line and no more: rules about a refused field would only contradict the refusal."""
    assert CheckpointConfig(**{name: value}).violations() == [f"checkpoint.{name}: {message}"]


def test_every_field_is_either_carried_out_or_refused() -> None:
    refused = {name.removeprefix("checkpoint.") for name in NOT_AVAILABLE if name.startswith("checkpoint.")}
    assert refused == {name for name, _, _ in REFUSED}
    assert refused.isdisjoint(CARRIED_OUT)
    assert refused | CARRIED_OUT == set(field_types(CheckpointConfig))


def test_every_name_in_the_refusal_table_exists() -> None:
    sections = field_types(ConfigContainer)
    for setting in NOT_AVAILABLE:
        name, _, field = setting.partition(".")
        section, field = (sections[name], field) if field else (ConfigContainer, name)
        assert field in field_types(section)
        default_of(section, field)


RULES: list[tuple[dict[str, Any], list[str]]] = [
    ({"save_interval": 0}, []),
    ({"save_interval": 10, "save": "/s", "async_save": True}, []),
    ({"save_interval": -1}, ["checkpoint.save_interval: -1 is too small; set it to 0 or more"]),
    (
        {"storage_writers_per_rank": 0},
        ["checkpoint.storage_writers_per_rank: 0 is too small; set it to 1 or more"],
    ),
    ({"save": ""}, ["checkpoint.save: '' names no directory; set a directory, or null"]),
    ({"load": ""}, ["checkpoint.load: '' names no directory; set a directory, or null"]),
    (
        {"async_save": True},
        [
            "checkpoint.async_save: true has nothing to save without checkpoint.save; "
            "set checkpoint.save to a directory, or async_save to false"
        ],
    ),
    ({"load": "/l", "ckpt_step": 0}, []),
    ({"load": "/l", "ckpt_step": -1}, ["checkpoint.ckpt_step: -1 is too small; set it to 0 or more"]),
    (
        {"ckpt_step": 7},
        [
            "checkpoint.ckpt_step: 7 names an iteration of no directory; "
            "set checkpoint.load to the directory that holds it, or ckpt_step to null"
        ],
    ),
    ({"load": "/l", "exit_on_missing_checkpoint": True}, []),
    (
        {"exit_on_missing_checkpoint": True},
        [
            "checkpoint.exit_on_missing_checkpoint: true has no checkpoint to miss; "
            "set checkpoint.load to a directory, or exit_on_missing_checkpoint to false"
        ],
    ),
    ({"custom_manager_class": "mypackage.checkpoint.MyCheckpointManager"}, []),
    *(
        (
            {"custom_manager_class": path},
            [
                f"checkpoint.custom_manager_class: {path!r} is not a dotted path; "
                "write module.ClassName, as in mypackage.checkpoint.MyCheckpointManager"
            ],
        )
        for path in ("", "MyManager", ".MyManager", "package.", "a..b", "my package.M", "a.b\n", "a.3b", "a:b")
    ),
]


@pytest.mark.parametrize(("settings", "expected"), RULES)
def test_rules(settings: dict[str, Any], expected: list[str]) -> None:
    assert CheckpointConfig(**settings).violations() == expected


RULES_OF_LATER_VERSIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"most_recent_k": 0}, []),
    ({"most_recent_k": -2}, ["checkpoint.most_recent_k: -2 is too small; set it to -1 or more"]),
    (
        {"save": "/s", "async_save": True, "ckpt_format": "zarr"},
        [
            "checkpoint.async_save: true does not work with checkpoint.ckpt_format 'zarr'; "
            "set ckpt_format to 'torch_dist', or async_save to false"
        ],
    ),
    ({"load_main_params_from_ckpt": True, "load_optim": False}, []),
    (
        {"load_main_params_from_ckpt": True},
        [
            "checkpoint.load_main_params_from_ckpt: true contradicts checkpoint.load_optim true, which restores "
            "the main parameters themselves; set load_optim to false, or load_main_params_from_ckpt to false"
        ],
    ),
    ({"exit_on_missing_checkpoint": True, "pretrained_checkpoint": "/p"}, []),
    (
        {"non_persistent_save_interval": 0, "non_persistent_ckpt_type": "in_memory"},
        ["checkpoint.non_persistent_save_interval: 0 is too small; set it to 1 or more"],
    ),
    (
        {"non_persistent_save_interval": 5},
        [
            "checkpoint.non_persistent_save_interval: 5 has no kind of checkpoint to save; "
            "set checkpoint.non_persistent_ckpt_type, or the interval to null"
        ],
    ),
    ({"non_persistent_ckpt_type": "global", "save": "/s"}, []),
    (
        {"non_persistent_ckpt_type": "global"},
        [
            "checkpoint.non_persistent_ckpt_type: 'global' has no directory; "
            "set checkpoint.non_persistent_global_ckpt_dir or checkpoint.save"
        ],
    ),
    (
        {"non_persistent_ckpt_type": "local"},
        [
            "checkpoint.non_persistent_ckpt_type: 'local' has no directory; "
            "set checkpoint.non_persistent_local_ckpt_dir to a directory on each node"
        ],
    ),
    (
        {
            "non_persistent_ckpt_type": "local",
            "non_persistent_local_ckpt_dir": "/l",
            "replication": True,
            "replication_jump": 8,
        },
        [],
    ),
    (
        {"replication": True},
        [
            "checkpoint.replication: true copies local checkpoints and there are none; "
            "set checkpoint.non_persistent_ckpt_type to 'local', or replication to false",
            "checkpoint.replication: true needs to know which ranks hold copies; "
            "set checkpoint.replication_jump to the ranks of one node",
        ],
    ),
    (
        {"replication_jump": 0, "replication_factor": 1},
        [
            "checkpoint.replication_jump: 0 is too small; set it to 1 or more",
            "checkpoint.replication_factor: 1 is too small; set it to 2 or more",
        ],
    ),
]


@pytest.mark.parametrize(("settings", "expected"), RULES_OF_LATER_VERSIONS)
def test_rules_of_fields_that_become_available(
    settings: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_module, "NOT_AVAILABLE", frozenset())
    assert CheckpointConfig(**settings).violations() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save": 7}, "checkpoint.save: 7 is not valid; set it to a string or null, in quotes"),
        ({"save_interval": True}, "checkpoint.save_interval: true is not valid; set it to an integer or null"),
        ({"save_interval": 2.0}, "checkpoint.save_interval: 2.0 is not valid; set it to an integer or null"),
        ({"async_save": 1}, "checkpoint.async_save: 1 is not valid; set it to true or false"),
        (
            {"dist_ckpt_strictness": "strict"},
            "checkpoint.dist_ckpt_strictness: 'strict' is not valid; set it to 'assume_ok_unexpected' or "
            "'log_unexpected' or 'log_all' or 'raise_unexpected' or 'raise_all' or 'return_unexpected' or "
            "'return_all' or 'ignore_all'",
        ),
        (
            {"ckpt_format": "torch", "async_save": True, "save": "/s"},
            "checkpoint.ckpt_format: 'torch' is not available in this version; leave it at 'torch_dist'",
        ),
    ],
)
def test_types_and_literals_are_checked(settings: dict[str, Any], expected: str) -> None:
    assert CheckpointConfig(**settings).violations() == [expected]


def test_an_assignment_after_construction_is_checked_too() -> None:
    config = dataclasses.replace(CheckpointConfig(), save="/s")
    config.ckpt_step = 3
    assert [line.split(":")[0] for line in config.violations()] == ["checkpoint.ckpt_step"]
