"""The in-memory tier: snapshots in shared memory that outlive the trainer."""
