"""The parallel layout of a run: the sizes that decide which shards a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Sizes of the process groups; `data` counts data-parallel ranks without context parallelism."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1

    @classmethod
    def of(cls, pg_collection: Any, model_chunks: int) -> Layout:
        """The layout of this run."""
        groups = pg_collection

        def size(name: str) -> int:
            group = getattr(groups, name, None)
            return 1 if group is None else int(group.size())

        return cls(
            tensor=size("tp"),
            pipeline=size("pp"),
            virtual_pipeline=max(model_chunks, 1),
            context=size("cp"),
            expert=size("ep"),
            expert_tensor=size("expt_tp"),
            data=size("dp"),
        )

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any]) -> Layout:
        """From a manifest's `parallel_sizes`; names that it does not know are ignored."""
        known = {name: sizes[name] for name in cls.__dataclass_fields__ if isinstance(sizes.get(name), int)}
        return cls(**known)

    def sizes(self) -> dict[str, int]:
        """For a manifest's `parallel_sizes`."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"TP{self.tensor} PP{self.pipeline} VPP{self.virtual_pipeline} CP{self.context} "
            f"EP{self.expert} ETP{self.expert_tensor} DP{self.data}"
        )


def default_pg_collection() -> Any:
    """The process groups that megatron-core's parallel_state holds."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()
