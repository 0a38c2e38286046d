"""What retention would delete, what keeps each of the others, and why; and the deletion itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.training.checkpointing import ownership
from bridge.training.checkpointing.catalog.manifests import read_head
from bridge.training.checkpointing.catalog.repairing import require_unowned
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.errors import CheckpointError, CheckpointMismatchError, CheckpointNotFoundError
from bridge.training.checkpointing.files import delete_trash
from bridge.training.checkpointing.layout import MANIFEST, deleted_iteration, iteration_name, list_checkpoints
from bridge.training.checkpointing.marks import is_marked
from bridge.training.checkpointing.retention.policies import (
    Best,
    Entry,
    EveryHours,
    EveryIterations,
    Listed,
    MostRecent,
    Policy,
    kept_by,
)
from bridge.training.checkpointing.retention.sweeper import SweepPlan, plan_sweep, sweep


@dataclass(frozen=True)
class Judged:
    """One checkpoint, and what keeps it."""

    iteration: int
    path: Path
    total_bytes: int
    reasons: tuple[str, ...]
    """Why it stays; none if it goes."""

    @property
    def stays(self) -> bool:
        """Whether it is kept."""
        return bool(self.reasons)


def plan_pruning(directory: Path, policies: Sequence[Policy], in_use: Collection[Path] = ()) -> list[Judged]:
    """What each policy keeps of a directory. Nothing is changed.

    Args:
        directory: of checkpoints.
        policies: at least one; see `retention.policies`.
        in_use: paths of checkpoints to keep.

    Raises:
        CheckpointMismatchError: all checkpoints are another program's.
        CheckpointError: as `retention.sweeper.sweep`.
    """
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"DIR: {directory} is not a directory; name a directory of checkpoints")
    paths = {iteration: directory / iteration_name(iteration) for iteration in list_checkpoints(directory).iterations}
    if paths and not any((path / MANIFEST).exists() for path in paths.values()):
        raise CheckpointMismatchError(
            f"DIR: no checkpoint in {directory} has a {MANIFEST}, so another program has written them; prune judges "
            "and deletes only what bridge has saved"
        )
    plan = plan_sweep(directory, policies, in_use=in_use)
    judged = []
    for iteration, path in paths.items():
        reasons = () if iteration in plan.removable else _reasons(iteration, path, plan, policies)
        judged.append(Judged(iteration, path, _size(path), reasons))
    return judged


@dataclass(frozen=True)
class Pruned:
    """What came of a deletion."""

    removed: tuple[int, ...]
    """The iterations that are gone, with their files."""
    problems: tuple[str, ...]
    """What is still there, and why."""


def prune(
    directory: Path, policies: Sequence[Policy], in_use: Collection[Path] = (), *, is_sure: bool = False
) -> Pruned:
    """Delete what no policy keeps, by way of the trash. The directory is claimed meanwhile.

    Args:
        directory: of checkpoints.
        policies: at least one.
        in_use: paths of checkpoints to keep.
        is_sure: as for `require_unowned`.

    Raises:
        DirectoryInUseError: a run saves there, which prunes by itself; or nobody can say.
        CheckpointError: as `retention.sweeper.sweep`.
    """
    require_unowned(directory, is_sure=is_sure)
    goes = plan_sweep(directory, policies, in_use=in_use).removable
    new = ownership.claim(directory, "DIR", wait_seconds=0.0, passing=True)
    try:
        with collected() as messages:
            problems, held = _delete(sweep(directory, policies, in_use=in_use))
    finally:
        if new:
            ownership.give_up(directory)
    left = set(list_checkpoints(directory).iterations)
    problems = [*(message for message in messages if message.startswith("could not ")), *problems]
    for iteration in sorted(left.intersection(goes)):
        name = iteration_name(iteration)
        if not any(name in problem for problem in problems):
            problems.append(f"{name} is still there")
    removed = tuple(iteration for iteration in goes if iteration not in left and iteration not in held)
    return Pruned(removed, tuple(problems))


def _delete(trash: Sequence[Path]) -> tuple[list[str], set[int]]:
    """What cannot be deleted, in words, and the iterations that it is of."""
    problems: list[str] = []
    held: set[int] = set()
    for path in trash:
        try:
            delete_trash(path)
        except OSError as error:
            problems.append(f"{path} cannot be deleted, which the next run that saves there tries again: {error}")
            iteration = deleted_iteration(path.name)
            held |= set() if iteration is None else {iteration}
    return problems, held


def describe_policy(policy: Policy) -> str:
    """A policy in words."""
    if isinstance(policy, MostRecent):
        return f"among the {policy.count} most recent"
    if isinstance(policy, EveryIterations):
        return f"a multiple of {policy.interval}"
    if isinstance(policy, EveryHours):
        return f"the first in {policy.hours:g} hours"
    if isinstance(policy, Best):
        which = "lowest" if policy.mode == "min" else "highest"
        return f"among the {policy.count} with the {which} {policy.metric}"
    return "it is named" if isinstance(policy, Listed) else type(policy).__name__


def _reasons(iteration: int, path: Path, plan: SweepPlan, policies: Sequence[Policy]) -> tuple[str, ...]:
    if iteration not in {entry.iteration for entry in plan.entries}:
        return ("marked as damaged, to be looked at" if is_marked(path) else "not a checkpoint with a manifest",)
    reasons = []
    if iteration in plan.tracked:
        reasons.append("the tracker names it")
    elif iteration > plan.tracked[0]:
        reasons.append("newer than what the tracker names")
    if iteration in plan.used:
        reasons.append("a link or a setting leads to it")
    if iteration <= plan.tracked[0]:
        reasons += [describe_policy(policy) for policy in policies if iteration in _kept_by(policy, plan)]
    return tuple(reasons) or ("nothing may be deleted without a policy",)


def _kept_by(policy: Policy, plan: SweepPlan) -> set[int]:
    """As `retention.policies.removable` asks a policy."""
    line: list[Entry] = sorted(
        (entry for entry in plan.entries if entry.iteration <= plan.tracked[0]), key=lambda entry: entry.iteration
    )
    return kept_by(policy, line)


def _size(path: Path) -> int:
    try:
        head = read_head(path)
    except CheckpointError:
        head = None
    return 0 if head is None else head.total_bytes
