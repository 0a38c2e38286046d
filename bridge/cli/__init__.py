"""`bridge-ckpt`: what can be done with checkpoints from a shell."""
