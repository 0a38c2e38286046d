"""Training data: indexed text, the dataset over it, and the iterators that a checkpoint can hold."""

from bridge.training.data.building import IteratorBuilder, IteratorRequest, build_train_iterator
from bridge.training.data.dataset import build_train_dataset
from bridge.training.data.errors import DataExhaustedError, DatasetError, DataStateError, PrepareError
from bridge.training.data.iterator import MicroBatchSampler, TrainDataIterator, collate
from bridge.training.data.position import restore_position
from bridge.training.data.stateful_loader import StatefulLoaderIterator

__all__ = [
    "DataExhaustedError",
    "DataStateError",
    "DatasetError",
    "IteratorBuilder",
    "IteratorRequest",
    "MicroBatchSampler",
    "PrepareError",
    "StatefulLoaderIterator",
    "TrainDataIterator",
    "build_train_dataset",
    "build_train_iterator",
    "collate",
    "restore_position",
]
