"""Image data sets for training and evaluation, all as images in [0, 1]: attacks and eps count in pixels.

`ImageData` holds a data set in memory and `TrainBatches` draws from it; `MixedBatches` adds generated images out of a
file of any size; `StreamData` and `StreamBatches` read what fits no memory. Batch number `step` of each stream depends
on the seed and the step alone, so a resumed run needs no state of its data (web data sets: see `StreamBatches`).
"""

from .batches import TrainBatches
from .extra import ExtraImages
from .fingerprints import fingerprint
from .memory import ImageData, split_holdout
from .mixed import MixedBatches
from .readers import CIFAR10_CLASSES, DATASETS, SPLITS, is_named_by_folder, load_dataset
from .sources import has_split, is_stream, same_split
from .stream_batches import StreamBatches
from .stream_data import StreamData, reader_fault
from .transforms import eval_transform

__all__ = [
    'CIFAR10_CLASSES',
    'DATASETS',
    'SPLITS',
    'ExtraImages',
    'ImageData',
    'MixedBatches',
    'StreamBatches',
    'StreamData',
    'TrainBatches',
    'eval_transform',
    'fingerprint',
    'has_split',
    'is_named_by_folder',
    'is_stream',
    'load_dataset',
    'reader_fault',
    'same_split',
    'split_holdout',
]
