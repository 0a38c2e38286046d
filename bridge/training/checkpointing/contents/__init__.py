"""What is in a checkpoint, one module a part. Saving and loading join the parts."""
