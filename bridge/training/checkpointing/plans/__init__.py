"""Decisions about a load: which parts of a checkpoint to restore, and in which form. Pure functions."""
