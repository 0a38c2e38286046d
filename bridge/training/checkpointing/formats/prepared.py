"""What the planning of a save begins with, whatever the format: the state taken apart, and compared.

A save whose structure is that of the save before costs one exchange of a few bytes. Otherwise the ranks tell one
another what has changed, and the state that all of them share is compared as well.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import _validate_common_state_dict

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.formats.apart import State, TakenApart, state_of
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.formats.planning import SavePlanning, assign, ranks_of
from bridge.training.checkpointing.formats.structure import Structure, Verdict, Vote, decide
from bridge.training.checkpointing.layout import COMMON
from bridge.training.checkpointing.sidecar import Sidecar, torch_bytes

CONTENT_METADATA = "content_metadata"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """One rank's state, ready to be planned."""

    sharded: dict[str, Any]
    state: list[Any]
    """The shards and objects in it, in their order."""
    sidecars: tuple[Sidecar, ...]
    """The common state, on rank 0."""
    structure: Structure
    verdict: Verdict


@dataclass
class _Taken:
    """What one rank has made of its state."""

    sharded: dict[str, Any]
    state: list[Any]
    common: dict[str, Any]
    sidecars: tuple[Sidecar, ...]
    structure: Structure


def prepare(
    state_dict: State,
    content_metadata: dict[str, Any],
    ranks: Ranks,
    planning: SavePlanning,
    options: SaveOptions,
) -> Prepared:
    """Take a state dict apart, and compare its structure with that of the save before. Collective.

    The arguments are those of `formats.PlanSave`, and the planning that its options hold.

    Raises:
        CheckpointSaveError: something is to be saved that cannot be.
    """
    taken: list[_Taken] = []
    failed: list[Exception] = []

    def take_apart() -> str | None:
        apart = TakenApart({**state_of(state_dict), CONTENT_METADATA: content_metadata})
        structure = Structure.of(apart.items, options.writers_per_rank, ranks_of(options.parallelization_group))
        # Before anything is exchanged: what cannot be pickled would fail on rank 0 alone, amid a collective.
        sidecars = (Sidecar(COMMON, torch_bytes(apart.common)),) if ranks.is_first else ()
        taken.append(_Taken(apart.sharded, apart.items, apart.common, sidecars, structure))
        return planning.unchanged(structure)

    job = None
    try:
        job = take_apart()
    except Exception as error:  # told to the others with the votes
        failed.append(error)
    if ranks.same("comparing the structure with that of the save before", job) and job is not None:
        verdict = Verdict(job, valid=True, planned=True, changes=())
    else:
        verdict = _all_votes(taken, failed, ranks, planning, options)
    (own,) = taken
    return Prepared(own.sharded, own.state, own.sidecars, own.structure, verdict)


def _all_votes(
    taken: list[_Taken],
    failed: list[Exception],
    ranks: Ranks,
    planning: SavePlanning,
    options: SaveOptions,
) -> Verdict:
    """The verdict where not all ranks keep one plan for what they have. Collective."""
    compared: list[dict[str, Any]] = []

    def vote() -> Vote:
        if failed:
            raise failed[0]
        common = taken[0].common
        compared.append(common if options.preprocess_common is None else options.preprocess_common(common))
        return planning.vote(taken[0].structure, lambda: _checksum(compared[0]), ranks)

    verdict = decide(ranks.collect("preparing the sharded state", vote))
    if verdict.changes and ranks.is_first:
        logger.log(
            logging.WARNING if options.assume_constant_structure else logging.INFO,
            "the structure of what is saved has changed since the save before; planning anew (%s)",
            "; ".join(verdict.changes),
        )
    if not verdict.valid and not verdict.alike and ranks.size > 1:
        # It logs what differs, which checksums do not say.
        ranks.run("comparing the common state", lambda: _validate_common_state_dict(compared[0]))
    return verdict


def _checksum(common: dict[str, Any]) -> str:
    """Equal only for equal states; empty where the state has none."""
    try:
        return hashlib.sha256(pickle.dumps(common, protocol=4)).hexdigest()
    except Exception:  # there is no error that an object may not raise while it is pickled
        return ""


def share_out(prepared: Prepared, group: Any, ranks: Ranks) -> None:
    """Find out what each rank writes, and change replica ids accordingly, where it is not known. Collective.

    Parts that do not lie in a grid are left to the ranks that have them.

    Args:
        prepared: this rank's state.
        group: the ranks that share the writing of replicas; None: the main replicas are written.
        ranks: all ranks.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    if group is None and prepared.verdict.valid:
        return
    written = set(assign(prepared.state, ranks, group, only_in_grids=True).places.tolist())
    for place, item in enumerate(prepared.state):
        if isinstance(item, ShardedTensor) and group is not None:
            item.replica_id = 0 if place in written else 1
