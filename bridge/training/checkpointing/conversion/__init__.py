"""How a checkpoint becomes one of another format: planned, done and verified in parts. `convert` joins them."""
