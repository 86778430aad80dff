"""The images that a model is measured on: of any data set, as many as asked for, with the channels that it takes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ..data import ImageData, StreamData, is_stream, load_dataset
from ..models import trained_classes
from ..pixels import input_channels

DEFAULT_N = 1000
Data = TypeVar('Data', ImageData, StreamData)


def read_split(
    model: nn.Module,
    dataset: str,
    data_dir: str | None,
    split: str,
    *,
    n: int | None = None,
    img_size: int | None = None,
    download: bool = False,
    processes: int = 1,
) -> ImageData:
    """A split to measure a model on, in memory; of a streamed data set n images at the model's size and crop.

    Args:
        model: says the size of streamed images, the channels and the classes.
        dataset: as load_dataset and StreamData take it.
        data_dir: folder that holds the data.
        split: its name.
        n: how many images of a streamed data set, evenly from first to last; None: 1000, or all. Others are read whole.
        img_size: side of streamed images; None: the model's.
        download: whether torchvision may fetch the data.
        processes: that measure together.

    Raises:
        FileNotFoundError, ImportError, ValueError: as load_dataset and StreamData.
    """
    if not is_stream(dataset):
        return fit_channels(model, load_dataset(dataset, data_dir, split, download))
    config = dict(getattr(model, 'pretrained_cfg', None) or {})
    size = img_size or config.get('img_size') or config.get('input_size', (3, 224, 224))[-1]
    options: dict[str, Any] = {'download': download, 'classes': trained_classes(model), 'data_config': config}
    if dataset.partition('/')[0] in ('wds', 'hfids', 'tfds'):  # folders know their classes, and may lack some
        options['num_classes'] = getattr(model, 'num_classes', None)
    stream = StreamData(dataset, data_dir, split, size, **options)
    if stream.iterable and processes > 1:
        raise ValueError(f'{dataset} has an order, not numbers, so it is measured in one process, without torchrun')
    n = min(DEFAULT_N, len(stream)) if n is None else n
    return fit_channels(model, (stream.first(n) if stream.iterable else evenly(stream, n)).in_memory())


def fit_channels(model: nn.Module, data: ImageData) -> ImageData:
    """The images with the channels that a model takes."""
    channels = input_channels(model)
    return data.with_channels(channels) if channels else data


def default_batch_size(data: ImageData) -> int:
    """250 images of up to 64 pixels a side; of larger ones as many pixels, which is 20 of 224."""
    height, width = data.images.shape[-2:]
    return max(1, min(250, 250 * 64 * 64 // (height * width)))


def evenly(data: Data, n: int | None) -> Data:
    """So many images from first to last, evenly, or all: those of a folder come class by class.

    Raises:
        ValueError: if there are not n.
    """
    if n is None:
        return data
    data.first(n)
    return data.subset(torch.arange(n) * len(data) // n)
