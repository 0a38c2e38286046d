"""Which checkpoints are kept, and the way out of those that are not."""
