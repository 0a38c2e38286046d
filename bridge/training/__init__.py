"""Training: configuration, state, the loop, and the checkpoint layer that it exists to prove."""
