"""Settings that are part of the documented API and that this version does not carry out."""

from __future__ import annotations

NOT_AVAILABLE: frozenset[str] = frozenset(
    {
        "ddp.use_megatron_fsdp",
        "checkpoint.ckpt_format",
        "checkpoint.ckpt_assume_constant_structure",
        "checkpoint.non_persistent_save_interval",
        "checkpoint.non_persistent_ckpt_type",
        "checkpoint.non_persistent_global_ckpt_dir",
        "checkpoint.non_persistent_local_ckpt_dir",
        "checkpoint.non_persistent_local_ckpt_algo",
        "checkpoint.replication",
        "checkpoint.replication_jump",
        "checkpoint.replication_factor",
        "checkpoint.most_recent_k",
        "checkpoint.strict_fsdp_dtensor_load",
    }
)
"""Settings that may hold nothing but their default: another value is refused, never ignored."""
