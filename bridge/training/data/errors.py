"""What the data pipeline raises."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset cannot be built or read as asked; the message names the setting that changes it."""


class DataExhaustedError(DatasetError):
    """The dataset holds no further whole micro-batch for all data-parallel ranks."""


class DataStateError(DatasetError):
    """A saved data position does not fit this run."""


class PrepareError(ValueError):
    """Text cannot be prepared as asked; the message names the option that changes it."""
