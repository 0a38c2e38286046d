"""Write what is generated from the dataclasses of the configuration.

    generate_reference.py [--check]

docs/reference/checkpoint-config.md describes the fields of CheckpointConfig, docs/reference/configuration.md those of
the other sections, docs/reference/api.md the documented names of the packages, and recipes/recipe.schema.json is the
JSON Schema of recipes.

Types, defaults and descriptions are read from the class; the rules are what its own validation answers to the
settings in `WRONG`. With --check nothing is written, and the exit status is 1 if a file is not up to date.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from bridge.training.config import CheckpointConfig, ConfigContainer
from bridge.training.config.availability import NOT_AVAILABLE
from bridge.training.config.json_schema import descriptions, recipe_schema
from bridge.training.config.schema import default_of, describe, field_types, section_type

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "checkpoint-config.md"
SECTIONS = ROOT / "docs" / "reference" / "configuration.md"
API = ROOT / "docs" / "reference" / "api.md"
SCHEMA = ROOT / "recipes" / "recipe.schema.json"

PACKAGES = (
    "bridge.training.checkpointing",
    "bridge.training.checkpointing.io",
    "bridge.training.checkpointing.catalog",
    "bridge.training.config",
    "bridge.training.data",
    "bridge.training.tokenizers",
    "bridge.peft",
    "bridge.accelerator",
)
"""Those whose names docs/reference/api.md lists."""

BAR = "\\|"
"""A bar in the cell of a table."""

EXAMPLES: dict[str, Any] = {
    "save": "runs/mine",
    "save_interval": 500,
    "save_interval_minutes": 30.0,
    "save_signal": "SIGUSR1",
    "save_optim": False,
    "save_rng": False,
    "save_tokenizer_assets": False,
    "async_save": True,
    "on_save_failure": "warn",
    "max_save_failures": 5,
    "save_retries": 5,
    "save_retry_seconds": 10.0,
    "check_free_space": False,
    "checksum": "sha256",
    "wait_timeout_minutes": 30.0,
    "writer_stall_seconds": 120.0,
    "load": "runs/mine",
    "integrity": "full",
    "fallback": False,
    "load_optim": False,
    "load_rng": False,
    "load_dataloader_state": "require",
    "load_main_params_from_ckpt": True,
    "ckpt_step": 5000,
    "exit_on_missing_checkpoint": True,
    "dist_ckpt_strictness": "raise_all",
    "safe_globals": ["argparse.Namespace"],
    "pretrained_checkpoint": "runs/base",
    "finetune": True,
    "ckpt_format": "zarr",
    "io_backend": "stock",
    "async_when_busy": "skip",
    "fully_parallel_save": False,
    "fully_parallel_load": "auto",
    "ckpt_assume_constant_structure": True,
    "storage_writers_per_rank": 2,
    "strict_fsdp_dtensor_load": True,
    "most_recent_k": 5,
    "save_retain_interval": 5000,
    "retain_every_hours": 24.0,
    "retain_best_k": 3,
    "retain_best_metric": "loss",
    "retain_best_mode": "max",
    "retain_iterations": [1000, 20000],
    "non_persistent_save_interval": 50,
    "non_persistent_ckpt_type": "local",
    "non_persistent_global_ckpt_dir": "runs/mine/recovery",
    "non_persistent_local_ckpt_dir": "/local/checkpoints",
    "non_persistent_local_ckpt_algo": "atomic",
    "in_memory_limit_gib": 64.0,
    "in_memory_release_minutes": 20.0,
    "replication": True,
    "replication_jump": 8,
    "replication_factor": 2,
    "dist_ckpt_optim_fully_reshardable": True,
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "mirror": "s3://mybucket/runs/mine",
    "mirror_required": True,
    "staging_dir": "/scratch/staging",
    "staging_keep": 1,
    "upload_threads": 8,
    "upload_wait_minutes": 60.0,
    "custom_manager_class": "mypackage.checkpoint.MyCheckpointManager",
}
"""A setting for each field, as it would stand in a recipe."""

WRONG: dict[str, dict[str, Any]] = {
    "save": {"save": ""},
    "save_interval": {"save_interval": -1},
    "save_interval_minutes": {"save_interval_minutes": 0.0},
    "save_signal": {"save_signal": "SIGUSR1"},
    "async_save": {"async_save": True},
    "max_save_failures": {"max_save_failures": 0},
    "save_retries": {"save_retries": -1},
    "save_retry_seconds": {"save_retry_seconds": -1.0},
    "wait_timeout_minutes": {"wait_timeout_minutes": 0.0},
    "writer_stall_seconds": {"writer_stall_seconds": 20.0},
    "load": {"load": ""},
    "load_main_params_from_ckpt": {"load_main_params_from_ckpt": True},
    "ckpt_step": {"ckpt_step": 5000},
    "exit_on_missing_checkpoint": {"exit_on_missing_checkpoint": True},
    "ckpt_format": {"ckpt_format": "zar"},
    "storage_writers_per_rank": {"storage_writers_per_rank": 0},
    "strict_fsdp_dtensor_load": {"strict_fsdp_dtensor_load": True},
    "in_memory_limit_gib": {"in_memory_limit_gib": 0.0},
    "in_memory_release_minutes": {"in_memory_release_minutes": 0.0},
    "most_recent_k": {"most_recent_k": 0},
    "save_retain_interval": {"save_interval": 500, "save_retain_interval": 1200},
    "retain_every_hours": {"retain_every_hours": 0.0},
    "retain_best_k": {"retain_best_k": 3},
    "retain_best_metric": {"retain_best_metric": "loss"},
    "retain_best_mode": {"retain_best_mode": "max"},
    "retain_iterations": {"retain_iterations": [1000]},
    "mirror": {"save": "runs/mine", "mirror": "gs://mybucket/runs"},
    "mirror_required": {"mirror_required": True},
    "staging_dir": {"save": "runs/mine", "staging_dir": "/scratch/staging"},
    "staging_keep": {"staging_keep": 0},
    "upload_threads": {"upload_threads": 0},
    "upload_wait_minutes": {"save": "runs/mine", "mirror": "s3://my-bucket/runs", "upload_wait_minutes": 120.0},
    "custom_manager_class": {"custom_manager_class": "MyCheckpointManager"},
}
"""Settings that break a field's rule."""


def page() -> str:
    """The whole page."""
    parts = [
        "# The fields of `checkpoint`",
        "Generated by `scripts/generate_reference.py` from "
        "[CheckpointConfig](../../bridge/training/config/checkpoint.py). Fields that this version does not carry out "
        "are refused when they are set to anything but their default.",
    ]
    parts += [entry(name) for name in (item.name for item in fields(CheckpointConfig))]
    return "\n\n".join(parts) + "\n"


def entry(name: str) -> str:
    """One field: type, default, meaning, rule and example."""
    annotation = CheckpointConfig.__dataclass_fields__[name].type
    lines = [
        f"## `{name}`",
        "",
        descriptions(CheckpointConfig)[name],
        "",
        f"- Type: `{annotation}`",
        f"- Default: `{_yaml(getattr(CheckpointConfig(), name))}`",
    ]
    if f"checkpoint.{name}" in NOT_AVAILABLE:
        lines.append("- Not carried out by this version")
    if name in WRONG:
        (problem,) = CheckpointConfig(**WRONG[name]).violations()
        lines.append(f"- Rule: {_yaml(WRONG[name])} is refused with: {problem}")
    lines.append(f"- Example: `{name}: {_yaml(EXAMPLES[name])}`")
    return "\n".join(lines)


def sections_page() -> str:
    """The page of all sections but `checkpoint`: the fields of each in a table."""
    parts = [
        "# The other sections",
        "Generated by `scripts/generate_reference.py` from the dataclasses in "
        "[bridge/training/config](../../bridge/training/config). The section `checkpoint` has "
        "[a page of its own](checkpoint-config.md); [Configuration](../configuration.md) says how recipes are put "
        "together. A setting that breaks a rule is refused at the start, with all others that do. None in a "
        "description is `null` in a recipe.",
    ]
    for name, declared in field_types(ConfigContainer).items():
        section = section_type(declared)
        if section is not None and section is not CheckpointConfig:
            parts += [f"## `{name}`", _summary(section), _table(name, section)]
    return "\n\n".join(parts) + "\n"


def _table(section: str, declared: type) -> str:
    said = descriptions(declared)
    rows = [
        f"| `{name}` | {_in_words(kind)} | `{_yaml(default_of(declared, name))}` | {_later(section, name)}{text} |"
        for (name, kind), text in zip(field_types(declared).items(), said.values(), strict=True)
    ]
    return "\n".join(["| Field | Type | Default | |", "|---|---|---|---|", *rows])


def _in_words(declared: Any) -> str:
    """A type, as messages have it."""
    return describe(declared).replace("'", "`")


def _later(section: str, name: str) -> str:
    return "Not carried out by this version. " if f"{section}.{name}" in NOT_AVAILABLE else ""


def api_page() -> str:
    """The page of the documented Python names: a line about each here, and what the site adds from its docstring."""
    parts = [
        "# Python",
        "Generated by `scripts/generate_reference.py`. The site shows the signature and the whole docstring of each "
        "name; in the repository they are in the source. Names with an underscore, which the documented API has too, "
        "are in the source only.",
    ]
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = [name for name in sorted(module.__all__, key=str.lower) if not name.startswith("_")]
        documented = [name for name in names if is_documented(getattr(module, name))]
        rows = [f"| `{name}` | {_summary(getattr(module, name)).replace('|', BAR)} |" for name in documented]
        parts += [f"## `{package}`", _summary(module), "\n".join(["| Name | |", "|---|---|", *rows])]
        parts += [f"::: {package}.{name}" for name in documented]
    return "\n\n".join(parts) + "\n"


def is_documented(value: Any) -> bool:
    """Whether a name stands for a class or a function; others are described where they are used."""
    return inspect.isclass(value) or inspect.isroutine(value)


def _summary(documented: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files, and write nothing")
    only_check = parser.parse_args().check
    status = 0
    generated = {
        PAGE: page(),
        SECTIONS: sections_page(),
        API: api_page(),
        SCHEMA: json.dumps(recipe_schema(), indent=2) + "\n",
    }
    for path, text in generated.items():
        if not only_check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is not up to date; run scripts/generate_reference.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
