"""What the planning of a save begins with, whatever the format: the state taken apart, compared and validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.formats.planning import SavePlanning, ranks_of, validate_sharding
from bridge.training.checkpointing.formats.structure import Structure, Verdict
from bridge.training.checkpointing.layout import COMMON
from bridge.training.checkpointing.sidecar import Sidecar, torch_bytes

CONTENT_METADATA = "content_metadata"


@dataclass(frozen=True)
class Prepared:
    """One rank's state, ready to be planned."""

    sharded: dict[str, Any]
    sidecars: tuple[Sidecar, ...]
    """The common state, on rank 0."""
    structure: Structure
    verdict: Verdict


def prepare(
    state_dict: dict[str, Any],
    content_metadata: dict[str, Any],
    ranks: Ranks,
    planning: SavePlanning,
    *,
    writers_per_rank: int,
    group: Any | None,
    preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None,
    reuse: bool,
) -> Prepared:
    """Take a state dict apart, and compare its structure with that of the save before. Collective.

    A structure that is new is validated; the arguments are those of `formats.PlanSave`.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    state_dict[CONTENT_METADATA] = content_metadata

    def take_apart() -> tuple[dict[str, Any], dict[str, Any], Structure]:
        sharded, common = save_preprocess(state_dict, validate_access_integrity=False)
        return sharded, common, Structure.of(nested_values(sharded), writers_per_rank, ranks_of(group))

    sharded, common, structure = ranks.run("preparing the sharded state", take_apart)
    # Before anything is exchanged: what cannot be pickled would fail on rank 0 alone, amid a collective.
    sidecars = ranks.run(
        "serializing the common state", lambda: (Sidecar(COMMON, torch_bytes(common)),) if ranks.is_first else ()
    )
    verdict = planning.compare(structure, ranks, reuse=reuse)
    if not verdict.valid:
        compared = common
        if preprocess_common is not None:
            compared = ranks.run("preparing the common state for comparison", lambda: preprocess_common(common))
        validate_sharding(sharded, compared, ranks)
    return Prepared(sharded, sidecars, structure, verdict)


def share_out(sharded: dict[str, Any], group: Any, ranks: Ranks, *, validate: bool) -> None:
    """Share the writing of replicas among the ranks of a group: replica ids change accordingly. Collective.

    Parts that do not lie in a grid are left to the ranks that have them: a rank's share of them lies in one piece,
    and would be torn apart.

    Args:
        sharded: this rank's shards.
        group: the ranks that share.
        ranks: all ranks.
        validate: check what has become of the sharding.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors afterwards.
    """
    regular = {
        str(place): item
        for place, item in enumerate(nested_values(sharded))
        if isinstance(item, ShardedTensor) and item.has_regular_grid
    }
    distribution = ranks.run(
        "sharing out the writing", lambda: determine_main_replica_uniform_distribution(regular, group)
    )
    ranks.run(
        "taking a share of the writing",
        lambda: distribute_main_replicas_with_precomputed_distribution(regular, group, distribution),
    )
    if validate:
        validate_sharding(sharded, None, ranks)
