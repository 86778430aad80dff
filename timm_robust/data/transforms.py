"""What turns an image file into pixels: timm's transforms, random numbers of each sample's own, and the two readers.

All transforms end in uint8: the division by 255 is left to the device, and nothing is normalised.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .batches import seed_of


def train_transform(img_size: int, hflip: float) -> Callable[[Any], torch.Tensor]:
    """timm's random resized crop, flip and change of colours: PIL image -> [3, H, W] of uint8.

    Raises:
        ValueError: unless hflip lies in [0, 1].
    """
    if not 0 <= hflip <= 1:
        raise ValueError(f'hflip must lie in [0, 1], got {hflip}')
    return create_transform(img_size, is_training=True, hflip=hflip, interpolation='random', use_prefetcher=True)


def eval_transform(
    img_size: int | tuple[int, int], data_config: Mapping[str, Any] | None = None
) -> Callable[[Any], torch.Tensor]:
    """Resize the shorter side to img_size / crop_pct, then crop the centre: PIL image -> [C, H, W] of uint8.

    Args:
        img_size: pixels a side, or (height, width).
        data_config: of the model: crop_pct, interpolation and crop_mode of its pretrained_cfg. What it does not say is
            0.875, bilinear and the centre, as RobustBench has it on ImageNet.

    Raises:
        ValueError: for values that timm cannot resize by.
    """
    said = {key: value for key, value in (data_config or {}).items() if value is not None}
    given = {'crop_pct': 0.875, 'interpolation': 'bilinear', **said}
    try:
        config = resolve_data_config({}, pretrained_cfg=given)
        settings = {key: config[key] for key in ('crop_pct', 'interpolation', 'crop_mode', 'mean')}
        transform = create_transform(img_size, use_prefetcher=True, **settings)
        transform(Image.new('RGB', (64, 64)))
        return transform
    except (AssertionError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        said = {key: said.get(key) for key in ('crop_pct', 'interpolation', 'crop_mode')}
        raise ValueError(f"the model's data configuration cannot be resized by, {said}: {error}") from None


@contextlib.contextmanager
def seeded(*parts: Any) -> Iterator[None]:
    """The three global generators that transforms draw from, set from a hash; the caller's state comes back after.

    The CPU's generator alone is set: `torch.manual_seed` would reach for the GPU, in every worker process.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class Samples(Dataset):
    """Images by number out of a map-style data set; a training sample is asked for as (epoch, number).

    Args:
        dataset: what timm made: number -> (PIL image, label).
        transform: PIL image -> uint8.
        seed: of the augmentation.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], torch.Tensor], seed: int = 0) -> None:
        """Keep them."""
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        """The sample, the same in whichever process and order it is made, and -1; or a blank one, 0, and its number."""
        epoch, number = key
        with seeded(self.seed, 'sample', epoch, number):
            try:
                image, label = read_sample(self.dataset, number)
            except MemoryError:
                raise
            except Exception:  # of PIL and of the readers, for files that are no pictures
                return self.transform(Image.new('RGB', (64, 64))), 0, number
            return self.transform(image), label, -1


def read_sample(dataset: Any, number: int) -> tuple[Image.Image, int]:
    """An image of a map-style data set, decoded, and its label.

    Raises:
        Exception: whatever an unreadable picture ends in; timm itself would hand out the next one in its place.
    """
    if hasattr(dataset, 'reader'):
        file, label = dataset.reader[number][:2]
        image = Image.open(file)
    else:
        image, label = dataset[number]
    check_depth(image)
    return image.convert('RGB'), -1 if label is None else int(label)


def check_depth(image: Image.Image) -> None:
    """Refuse a picture of more than 8 bits a channel, which Pillow would cut off at 255."""
    if image.mode[0] in 'IF':
        raise ValueError(f'mode {image.mode} has more than 8 bits a channel; save it with 8')


class SampleStream(IterableDataset):
    """The images of an iterable data set, in its order.

    Args:
        dataset: what timm made: iterates over (PIL image, label).
        transform: PIL image -> uint8.
        seed: of the augmentation; with several worker processes each numbers its own images.
        limit: at most so many images (for one process).
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], torch.Tensor], seed: int, limit: int | None) -> None:
        """Keep them."""
        self.dataset, self.transform, self.seed, self.limit = dataset, transform, seed, limit

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        """One pass, as `Samples`; what is unreadable the readers themselves leave out."""
        worker = get_worker_info()
        for number, (image, label) in enumerate(islice(self.dataset, self.limit)):
            check_depth(image)
            with seeded(self.seed, worker.id if worker else 0, number):
                pixels = self.transform(image.convert('RGB'))
            yield pixels, int(label), -1
