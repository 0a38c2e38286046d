"""Training data: indexed text, the dataset over it, and the iterator that a checkpoint can hold."""

from bridge.training.data.dataset import build_train_dataset
from bridge.training.data.errors import DataExhaustedError, DatasetError, DataStateError, PrepareError
from bridge.training.data.iterator import TrainDataIterator

__all__ = [
    "DataExhaustedError",
    "DataStateError",
    "DatasetError",
    "PrepareError",
    "TrainDataIterator",
    "build_train_dataset",
]
