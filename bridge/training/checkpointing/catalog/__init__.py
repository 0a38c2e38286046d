"""What a directory of checkpoints holds, without a run: for people, programs and the command line.

Everything here only looks, unless its name says otherwise, needs no other rank, and works where there is no
accelerator. Which checkpoint a run would load is found out by the code that a run finds it with.
"""

from bridge.training.checkpointing.catalog.choosing import Choice, choose, recorded_settings
from bridge.training.checkpointing.catalog.contents import (
    Contents,
    StoredObject,
    StoredTensor,
    find_checkpoint,
    read_contents,
)
from bridge.training.checkpointing.catalog.diagnosing import Diagnosis, Finding, diagnose, wanted_by
from bridge.training.checkpointing.catalog.differences import Changed, Differences, Values, compare
from bridge.training.checkpointing.catalog.entries import Catalog, CatalogEntry, read_catalog, read_entry
from bridge.training.checkpointing.catalog.estimating import Estimate, estimate
from bridge.training.checkpointing.catalog.listing import Listed, list_all
from bridge.training.checkpointing.catalog.manifests import ManifestHead, read_head
from bridge.training.checkpointing.catalog.owners import Owner, find_owner
from bridge.training.checkpointing.catalog.pruning import Judged, Pruned, plan_pruning, prune
from bridge.training.checkpointing.catalog.repairing import Repair, Repairs, plan_repairs, repair
from bridge.training.checkpointing.catalog.tiers import Snapshots, snapshots_of
from bridge.training.checkpointing.catalog.verifying import Verification, Verified, verify_directory

__all__ = [
    "Catalog",
    "CatalogEntry",
    "Changed",
    "Choice",
    "Contents",
    "Diagnosis",
    "Differences",
    "Estimate",
    "Finding",
    "Judged",
    "Listed",
    "ManifestHead",
    "Owner",
    "Pruned",
    "Repair",
    "Repairs",
    "Snapshots",
    "StoredObject",
    "StoredTensor",
    "Values",
    "Verification",
    "Verified",
    "choose",
    "compare",
    "diagnose",
    "estimate",
    "find_checkpoint",
    "find_owner",
    "list_all",
    "plan_pruning",
    "plan_repairs",
    "prune",
    "read_catalog",
    "read_contents",
    "read_entry",
    "read_head",
    "recorded_settings",
    "repair",
    "snapshots_of",
    "verify_directory",
    "wanted_by",
]
