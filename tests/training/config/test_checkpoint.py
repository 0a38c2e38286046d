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
    "ckpt_format": (Literal["torch_dist", "zarr", "fsdp_dtensor"] | str, "torch_dist"),  # documented without str
    "fully_parallel_save": (bool, True),
    "fully_parallel_load": (bool | Literal["auto"], False),  # documented as bool
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
    "on_save_failure": (Literal["raise", "warn"], "raise"),
    "max_save_failures": (int, 3),
    "save_retries": (int, 3),
    "save_retry_seconds": (float, 5.0),
    "check_free_space": (bool, True),
    "checksum": (Literal["xxh3", "crc32", "sha256"], "xxh3"),
    "wait_timeout_minutes": (float, 120.0),
    "writer_stall_seconds": (float, 600.0),
    "integrity": (Literal["off", "sizes", "full"], "sizes"),
    "fallback": (bool, True),
    "custom_manager_class": (str | None, None),
    "in_memory_limit_gib": (float | None, None),
    "in_memory_release_minutes": (float, 60.0),
    "finetune": (bool, False),
    "most_recent_k": (int, -1),
    "save_retain_interval": (int | None, None),
    "retain_every_hours": (float | None, None),
    "retain_best_k": (int | None, None),
    "retain_best_metric": (str | None, None),
    "retain_best_mode": (Literal["min", "max"], "min"),
    "retain_iterations": (list[int] | None, None),
    "save_interval_minutes": (float | None, None),
    "save_signal": (Literal["SIGUSR1", "SIGUSR2"] | None, None),
    "load_dataloader_state": (Literal["auto", "require", "ignore"], "auto"),
    "safe_globals": (list[str] | None, None),
    "storage_writers_per_rank": (int, 1),
    "io_backend": (Literal["direct", "stock"], "direct"),
    "async_when_busy": (Literal["wait", "skip"], "wait"),
    "strict_fsdp_dtensor_load": (bool, False),
    "mirror": (str | None, None),
    "mirror_required": (bool, False),
    "staging_dir": (str | None, None),
    "staging_keep": (int, 2),
    "upload_threads": (int, 4),
    "upload_wait_minutes": (float, 30.0),
}
"""Fields that the guide's tables do not have."""

CARRIED_OUT = {
    *("on_save_failure", "max_save_failures", "save_retries", "save_retry_seconds", "check_free_space"),
    *("save_interval_minutes", "save_signal"),
    *("checksum", "integrity", "fallback", "wait_timeout_minutes", "writer_stall_seconds"),
    *("save", "save_interval", "save_optim", "save_rng", "save_tokenizer_assets", "async_save"),
    *("load", "load_optim", "load_rng", "ckpt_step", "exit_on_missing_checkpoint", "dist_ckpt_strictness"),
    *("most_recent_k", "save_retain_interval", "retain_every_hours", "retain_iterations"),
    *("retain_best_k", "retain_best_metric", "retain_best_mode"),
    *("load_dataloader_state", "safe_globals", "pretrained_checkpoint", "finetune", "load_main_params_from_ckpt"),
    *("dist_ckpt_optim_fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient"),
    *("in_memory_limit_gib", "in_memory_release_minutes"),
    *("ckpt_assume_constant_structure", "fully_parallel_save", "fully_parallel_load"),
    *("storage_writers_per_rank", "io_backend", "async_when_busy", "custom_manager_class"),
    *("non_persistent_save_interval", "non_persistent_ckpt_type", "non_persistent_global_ckpt_dir"),
    *("non_persistent_local_ckpt_dir", "non_persistent_local_ckpt_algo"),
    *("replication", "replication_jump", "replication_factor"),
    *("ckpt_format", "strict_fsdp_dtensor_load"),
    *("mirror", "mirror_required", "staging_dir", "staging_keep", "upload_threads", "upload_wait_minutes"),
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


def test_a_field_that_is_not_carried_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line and no more: rules about a refused field would only contradict the refusal."""
    monkeypatch.setattr(validation_module, "NOT_AVAILABLE", frozenset({"checkpoint.most_recent_k"}))
    assert CheckpointConfig(most_recent_k=0).violations() == [
        "checkpoint.most_recent_k: 0 is not available in this version; leave it at -1"
    ]


def test_every_field_is_carried_out() -> None:
    assert frozenset() == NOT_AVAILABLE
    assert set(field_types(CheckpointConfig)) == CARRIED_OUT


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
    ({"ckpt_format": "zarr"}, []),
    ({"ckpt_format": "my_package.formats.MySave"}, []),
    (
        {"ckpt_format": "torch"},
        [
            "checkpoint.ckpt_format: 'torch' is no format of this version, and no save strategy is registered for it "
            "with megatron-core; set it to 'torch_dist', 'zarr' or 'fsdp_dtensor', or to the dotted path of a save "
            "strategy"
        ],
    ),
    ({"save_interval": -1}, ["checkpoint.save_interval: -1 is too small; set it to 0 or more"]),
    (
        {"storage_writers_per_rank": 0},
        ["checkpoint.storage_writers_per_rank: 0 is too small; set it to 1 or more"],
    ),
    ({"save_interval_minutes": 0.5}, []),
    (
        {"save_interval_minutes": 0.0},
        ["checkpoint.save_interval_minutes: 0.0 is too small; set it to a number above 0"],
    ),
    ({"save": "/s", "save_signal": "SIGUSR2"}, []),
    (
        {"save_signal": "SIGUSR1"},
        [
            "checkpoint.save_signal: 'SIGUSR1' has nothing to save without checkpoint.save; "
            "set checkpoint.save to a directory, or save_signal to null"
        ],
    ),
    ({"max_save_failures": 0}, ["checkpoint.max_save_failures: 0 is too small; set it to 1 or more"]),
    ({"save_retries": 0, "save_retry_seconds": 0.0}, []),
    ({"save_retries": -1}, ["checkpoint.save_retries: -1 is too small; set it to 0 or more"]),
    ({"save_retry_seconds": -1.0}, ["checkpoint.save_retry_seconds: -1.0 is too small; set it to 0 or more"]),
    ({"wait_timeout_minutes": 0.0}, ["checkpoint.wait_timeout_minutes: 0.0 is too small; set it to a number above 0"]),
    ({"writer_stall_seconds": 0.0}, ["checkpoint.writer_stall_seconds: 0.0 is too small; set it to a number above 0"]),
    ({"writer_stall_seconds": 20.0, "save_retries": 2}, []),
    (
        {"writer_stall_seconds": 20.0},
        [
            "checkpoint.writer_stall_seconds: 20.0 is not above the 20 s that a writer waits before its last try; "
            "raise it, or lower save_retries or save_retry_seconds"
        ],
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
    ({"in_memory_limit_gib": 0.5, "in_memory_release_minutes": 0.5}, []),
    (
        {"in_memory_limit_gib": 0.0, "in_memory_release_minutes": -1.0},
        [
            "checkpoint.in_memory_limit_gib: 0.0 is too small; set it to a number above 0",
            "checkpoint.in_memory_release_minutes: -1.0 is too small; set it to a number above 0",
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
    ({"most_recent_k": 1}, []),
    (
        {"most_recent_k": 0},
        ["checkpoint.most_recent_k: 0 would keep nothing to resume from; set it to 1 or more, or -1 to keep all"],
    ),
    ({"most_recent_k": -2}, ["checkpoint.most_recent_k: -2 is too small; set it to -1 or more"]),
    ({"save_interval": 50, "save_retain_interval": 100}, []),
    ({"save_interval": 0, "save_retain_interval": 100}, []),
    ({"save_retain_interval": 100}, []),
    (
        {"save_interval": 50, "save_retain_interval": 120},
        ["checkpoint.save_retain_interval: 120 is not a multiple of save_interval 50; change one of them"],
    ),
    ({"save_retain_interval": 0}, ["checkpoint.save_retain_interval: 0 is too small; set it to 1 or more"]),
    ({"retain_every_hours": 0.5}, []),
    ({"retain_every_hours": 0.0}, ["checkpoint.retain_every_hours: 0.0 is too small; set it to a number above 0"]),
    ({"retain_best_k": 2, "retain_best_metric": "loss", "retain_best_mode": "max"}, []),
    (
        {"retain_best_k": 0, "retain_best_metric": ""},
        [
            "checkpoint.retain_best_k: 0 is too small; set it to 1 or more",
            "checkpoint.retain_best_k: 0 does not say what is best; "
            "set checkpoint.retain_best_metric to the name of a metric, as in 'loss'",
        ],
    ),
    (
        {"retain_best_metric": "loss", "retain_best_mode": "max"},
        [
            "checkpoint.retain_best_metric: 'loss' has no effect without checkpoint.retain_best_k; "
            "set that, or leave this at null",
            "checkpoint.retain_best_mode: 'max' has no effect without checkpoint.retain_best_k; "
            "set that, or leave this at 'min'",
        ],
    ),
    ({"retain_iterations": [0, 10], "most_recent_k": 1}, []),
    ({"retain_iterations": [10], "save_retain_interval": 100}, []),
    (
        {"retain_iterations": [10, -1], "most_recent_k": 1},
        ["checkpoint.retain_iterations: [10, -1] has a number below 0; list iterations"],
    ),
    (
        {"retain_iterations": [10]},
        [
            "checkpoint.retain_iterations: [10] has no effect where everything is kept; "
            "set checkpoint.most_recent_k, for one, or leave this at null"
        ],
    ),
    ({"save": "c", "load": "s3://bucket/runs/1", "mirror": "s3://bucket", "mirror_required": True}, []),
    ({"save": "s3://bucket/runs/1", "staging_dir": "c", "staging_keep": 1}, []),
    (
        {"save": "s3://bucket/runs", "load": "gs://bucket/runs"},
        [
            "checkpoint.load: 'gs://bucket/runs' does not begin with s3://, the only scheme of object storage that "
            "there is; write s3://bucket/prefix",
            "checkpoint.save: 's3://bucket/runs' needs a directory to write to first; set checkpoint.staging_dir to "
            "one that all ranks share",
        ],
    ),
    (
        {"save": "c", "mirror": "s3://key:secret@bucket/runs", "staging_dir": "d"},
        [
            "checkpoint.mirror: 's3://…@bucket/runs' holds credentials; give them as AWS tools take them, in the "
            "environment or in ~/.aws/credentials; write s3://bucket/prefix",
            "checkpoint.staging_dir: 'd' has no effect where checkpoint.save is no URL; set checkpoint.save to one, or "
            "leave this at null",
        ],
    ),
    (
        {"mirror": "bucket", "upload_threads": 0, "upload_wait_minutes": 0.0, "pretrained_checkpoint": "s3://b/c"},
        [
            "checkpoint.upload_threads: 0 is too small; set it to 1 or more",
            "checkpoint.upload_wait_minutes: 0.0 is too small; set it to a number above 0",
            "checkpoint.mirror: 'bucket' does not begin with s3://, the only scheme of object storage that there is; "
            "write s3://bucket/prefix",
            "checkpoint.pretrained_checkpoint: 's3://b/c' is a URL, and only a directory will do; name a directory",
            "checkpoint.mirror: 'bucket' has nothing to copy without checkpoint.save; set checkpoint.save to a "
            "directory, or mirror to null",
        ],
    ),
    ({"upload_wait_minutes": 30.0, "wait_timeout_minutes": 20.0}, []),
    (
        {"save": "c", "mirror": "s3://bucket/runs", "wait_timeout_minutes": 30.0},
        [
            "checkpoint.upload_wait_minutes: 30.0 is not below checkpoint.wait_timeout_minutes (30.0), so the other "
            "ranks would take rank 0 for lost while it waits for uploads; set it to less, or that to more",
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
        {"non_persistent_save_interval": 0, "non_persistent_ckpt_type": "in_memory", "save": "/s"},
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
        {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": "/g"},
        [
            "checkpoint.non_persistent_ckpt_type: 'global' belongs to a run that saves persistent checkpoints too, "
            "and checkpoint.save is not set; set checkpoint.save to a directory, or non_persistent_ckpt_type to null"
        ],
    ),
    (
        {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": "/s/", "save": "/s"},
        [
            "checkpoint.non_persistent_global_ckpt_dir: '/s/' is checkpoint.save, where all but the newest "
            "checkpoint would be deleted; set it to another directory, or to null for `non_persistent` inside "
            "checkpoint.save"
        ],
    ),
    (
        {"non_persistent_ckpt_type": "local", "save": "/s"},
        [
            "checkpoint.non_persistent_ckpt_type: 'local' has no directory; "
            "set checkpoint.non_persistent_local_ckpt_dir to a directory on each node"
        ],
    ),
    (
        {
            "save": "/s",
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
            "checkpoint.replication: true copies local or in-memory checkpoints and there are none; "
            "set checkpoint.non_persistent_ckpt_type to 'local' or 'in_memory', or replication to false",
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
        ({"most_recent_k": None}, "checkpoint.most_recent_k: null is not valid; set it to an integer"),
        (
            {"dist_ckpt_strictness": "strict"},
            "checkpoint.dist_ckpt_strictness: 'strict' is not valid; set it to 'assume_ok_unexpected' or "
            "'log_unexpected' or 'log_all' or 'raise_unexpected' or 'raise_all' or 'return_unexpected' or "
            "'return_all' or 'ignore_all'",
        ),
        (
            {"ckpt_format": 2},
            "checkpoint.ckpt_format: 2 is not valid; set it to 'torch_dist' or 'zarr' or 'fsdp_dtensor' or a string, "
            "in quotes",
        ),
    ],
)
def test_types_and_literals_are_checked(settings: dict[str, Any], expected: str) -> None:
    assert CheckpointConfig(**settings).violations() == [expected]


def test_an_assignment_after_construction_is_checked_too() -> None:
    config = dataclasses.replace(CheckpointConfig(), save="/s")
    config.ckpt_step = 3
    assert [line.split(":")[0] for line in config.violations()] == ["checkpoint.ckpt_step"]
