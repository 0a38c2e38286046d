"""All violations of a configuration: types, settings that this version lacks, and rules between settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bridge.training.config import parallel_rules, rules
from bridge.training.config.availability import NOT_AVAILABLE
from bridge.training.config.checkpoint_rules import checkpoint_rules, replication_world_rules
from bridge.training.config.fsdp_rules import fsdp_checkpoint_rules, fsdp_rules
from bridge.training.config.peft import peft_rules
from bridge.training.config.schema import (
    Mismatch,
    Violation,
    convert,
    default_of,
    field_types,
    is_section,
    section_type,
    show,
)
from bridge.training.config.torch_fsdp2_rules import torch_fsdp2_rules

if TYPE_CHECKING:
    from bridge.training.config.checkpoint import CheckpointConfig
    from bridge.training.config.container import ConfigContainer

Rule = Callable[..., Iterator[Violation]]

RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("model",), rules.architecture_rules),
    (("model",), rules.mixture_of_experts_rules),
    (("model",), rules.recompute_rules),
    (("model",), parallel_rules.model_parallel_rules),
    (("optimizer",), rules.optimizer_rules),
    (("optimizer", "model", "ddp"), rules.loss_scale_rules),
    (("scheduler", "optimizer", "train"), rules.scheduler_rules),
    (("ddp", "optimizer"), rules.ddp_rules),
    (("train",), rules.training_rules),
    (("train", "checkpoint"), rules.signal_rules),
    (("dataset",), rules.dataset_rules),
    (("tokenizer",), rules.tokenizer_rules),
    (("rng", "dist", "logger"), rules.run_rules),
    (("logger",), rules.event_rules),
    (("rerun_state_machine",), rules.rerun_rules),
    (("checkpoint",), checkpoint_rules),
    (("checkpoint",), fsdp_checkpoint_rules),
    (("ddp", "model", "checkpoint", "peft", "rerun_state_machine"), fsdp_rules),
    (("dist", "ddp", "model", "checkpoint"), torch_fsdp2_rules),
    (("peft", "checkpoint"), peft_rules),
)
"""Every rule with the sections that it reads, in the order in which violations are reported."""


def violations(config: ConfigContainer, world_size: int | None) -> list[str]:
    """One line for each thing that is wrong, empty when all is well.

    A rule is left out while one of its sections holds a value of the wrong type, and what a rule says about a
    setting that this version lacks is left out beside the refusal of that setting.
    """
    found: list[Violation] = []
    well_typed: dict[str, Any] = {}
    for name, declared in field_types(type(config)).items():
        section = getattr(config, name)
        expected = section_type(declared)
        if section is None and not is_section(declared):
            well_typed[name] = None
        elif type(section) is not expected:
            wanted = expected.__name__ if expected is not None else "section"
            found.append(Violation(name, section, "is not valid", f"set it to a {wanted}"))
        else:
            found += _section_violations(name, section)
            if _is_well_typed(section):
                well_typed[name] = section
    refused = {violation.setting for violation in found}
    for sections, rule in RULES:
        if well_typed.keys() >= set(sections):
            broken = rule(*(well_typed[name] for name in sections))
            found += [violation for violation in broken if violation.setting not in refused]
    if world_size is not None and well_typed.keys() >= {"model", "train"}:
        found += parallel_rules.world_size_rules(config.model, config.train, world_size)
    if world_size is not None and "checkpoint" in well_typed:
        found += replication_world_rules(config.checkpoint, world_size)
    return [str(violation) for violation in found]


def checkpoint_violations(section: CheckpointConfig) -> list[str]:
    """What is wrong with a `CheckpointConfig` on its own, in the words of `violations`."""
    found = list(_section_violations("checkpoint", section))
    refused = {violation.setting for violation in found}
    if _is_well_typed(section):
        rules_of_section = (checkpoint_rules, fsdp_checkpoint_rules)
        found += [found_ for rule in rules_of_section for found_ in rule(section) if found_.setting not in refused]
    return [str(violation) for violation in found]


def _section_violations(name: str, section: Any) -> Iterator[Violation]:
    """Settings of one section that this version lacks or whose values have the wrong type."""
    for field, declared in field_types(type(section)).items():
        yield from _field_violations(section, field, declared, setting=f"{name}.{field}")


def _field_violations(section: Any, field: str, declared: Any, setting: str) -> Iterator[Violation]:
    """At most one: a setting that this version lacks has no better value than its default."""
    value, default = getattr(section, field), default_of(type(section), field)
    if setting in NOT_AVAILABLE:
        if type(value) is not type(default) or value != default:
            yield Violation(setting, value, "is not available in this version", f"leave it at {show(default)}")
        return
    try:
        convert(value, declared)
    except Mismatch as error:
        yield Violation(setting, value, "is not valid", f"set it to {error.wanted}")


def _is_well_typed(section: Any) -> bool:
    """Whether rules can compute with every value of a section."""
    try:
        for field, declared in field_types(type(section)).items():
            convert(getattr(section, field), declared)
    except Mismatch:
        return False
    return True
