"""Object storage: checkpoints under `s3://` URLs, uploaded in the background and loaded by ranges.

Nothing in here that uploads imports torch: the process that does it starts at once and stays small.
"""
