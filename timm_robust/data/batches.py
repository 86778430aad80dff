"""Training batches out of a data set in memory, cropped and flipped on its device.

No worker processes, no disk cache, and nothing to restore on resume, because batch number `step` depends on the seed
and the step alone.

>>> data = ImageData(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2, ('cat', 'dog'), 'pets')
>>> x, y = TrainBatches(data, 4, seed=0)[5]  # batch 5 of the run, whatever was asked before
>>> x.shape, len(y)
(torch.Size([4, 3, 32, 32]), 4)
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F

from ..pixels import to_pixels
from .memory import ImageData


class EpochOrder:
    """The order in which each epoch visits n images: a permutation that follows from (seed, epoch); the last is kept.

    Args:
        n: how many images; 20 million take 160 MB and two seconds.
        seed: any whole number or text.
        device: where the order is drawn; CPU and GPU draw others.
    """

    def __init__(self, n: int, seed: int | str, device: torch.device | str = 'cpu') -> None:
        """Nothing is drawn yet."""
        self.n, self.seed = n, seed
        self._generator = torch.Generator(device)
        self._last = -1, torch.empty(0)

    def __call__(self, epoch: int) -> torch.Tensor:
        """The permutation of an epoch, [n] of int64."""
        last, order = self._last
        if last != epoch:
            generator = self._generator.manual_seed(seed_of(self.seed, 'epoch', epoch))
            order = torch.randperm(self.n, generator=generator, device=generator.device)
            self._last = epoch, order
        return order

    def batch(self, step: int, size: int) -> tuple[int, torch.Tensor]:
        """The epoch of batch `step`, counted from 0 through all epochs, and which images it holds, [size] of int64."""
        epoch, position = divmod(step, self.n // size)
        return epoch, self(epoch)[position * size :][:size]


class TrainBatches:
    """An endless stream of augmented training batches; batch `step` is a pure function of (seed, step).

    Each epoch visits the images in a new random order and drops the incomplete last batch. Augmentation: a random crop
    out of the zero-padded image, then a random horizontal flip, each drawn per image. All of it runs on the data's
    device; the random numbers of a CPU and of a GPU differ.

    Args:
        data: the training images.
        batch_size: images a batch, at most len(data).
        seed: any whole number.
        crop_padding: zero pixels added on each side before the crop; 0 for no crop.
        hflip: probability of a flip, in [0, 1].
        own: the rows of each batch that this process trains on; every process draws the whole batch alike.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        seed: int,
        *,
        crop_padding: int = 4,
        hflip: float = 0.5,
        own: slice = slice(None),
    ) -> None:
        """Check the sizes; nothing is drawn yet."""
        if not 0 < batch_size <= len(data):
            raise ValueError(f'batch_size {batch_size} must lie in 1..{len(data)}, the number of training images')
        side = min(data.images.shape[2:])
        if not 0 <= crop_padding <= side or not 0 <= hflip <= 1:
            raise ValueError(
                f'crop_padding must be 0 to {side} for images of {side} pixels a side, and hflip in [0, 1], got '
                f'{crop_padding} and {hflip}'
            )
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.crop_padding, self.hflip, self.own = crop_padding, hflip, own
        self.steps_per_epoch = len(data) // batch_size
        self._generator = torch.Generator(data.images.device)
        self._order = EpochOrder(len(data), seed, data.images.device)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step` of the run, counted from 0 through all epochs: (x [B, C, H, W] in [0, 1], y [B])."""
        if step < 0:
            raise IndexError(f'step {step} is negative; steps count from 0')
        images, labels = self._draw(step)
        x = self._augment(images, step)
        return to_pixels(x[self.own]), labels[self.own]

    def indices(self, step: int) -> torch.Tensor:
        """Which images batch `step` holds, [B]."""
        return self._order.batch(step, self.batch_size)[1]

    def _draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images of the batch as they are, uint8, and their labels."""
        indices = self.indices(step)
        return self.data.images[indices], self.data.labels[indices]

    def _augment(self, images: torch.Tensor, step: int) -> torch.Tensor:
        """Crop and flip by one gather: pixel (i, j) comes from padded pixel (dy + i, dx + j), j mirrored in a flip."""
        size, channels, height, width = images.shape
        device, pad = images.device, self.crop_padding
        generator = self._generator.manual_seed(seed_of(self.seed, 'step', step))
        offsets = torch.randint(2 * pad + 1, (2, size, 1), generator=generator, device=device)
        flip = torch.rand(size, 1, generator=generator, device=device) < self.hflip
        columns = torch.arange(width, device=device)
        columns = offsets[1] + torch.where(flip, width - 1 - columns, columns)
        rows = offsets[0] + torch.arange(height, device=device)
        index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None]).view(size, 1, -1).expand(-1, channels, -1)
        return F.pad(images, (pad,) * 4).flatten(2).gather(2, index).view_as(images)


def seed_of(*parts: Any) -> int:
    """A seed in 0..2^63 - 1 for each stream of random numbers, hashed from its name: neighbours share nothing."""
    digest = hashlib.blake2b('/'.join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') >> 1
