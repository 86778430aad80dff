"""Image data sets held in memory: uint8 on the training device, handed out as float32 in [0, 1].

CIFAR-10 takes 150 MB, so it is decoded once, then cropped and flipped on the device: no worker processes, no disk
cache, and nothing to restore on resume, because batch number `step` depends on the seed and the step alone.

>>> data = ImageData(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2, ('cat', 'dog'), 'pets')
>>> x, y = TrainBatches(data, 4, seed=0)[5]  # batch 5 of the run, whatever was asked before
>>> x.shape, len(y)
(torch.Size([4, 3, 32, 32]), 4)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F

from ..threat_model import MAX_CLASSES

if TYPE_CHECKING:
    from .stream_data import StreamData

Data = TypeVar('Data', 'ImageData', 'StreamData')


@dataclass(frozen=True)
class ImageData:
    """Images and labels of one split, on one device.

    Args:
        images: [N, C, H, W] of uint8.
        labels: [N] of int64, each in 0..num_classes - 1.
        classes: the name of each class.
        name: the data set, as model tags spell it: 'cifar10'.
        notes: what a measurement on it has to say of it, such as pictures that could not be read.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse tensors of the wrong type or shape, and labels without a class."""
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(f'images must be [N, C, H, W] of uint8, got {list(images.shape)} of {images.dtype}')
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f'labels must be [{len(images)}] of int64, got {list(labels.shape)} of {labels.dtype}')
        wrong = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if len(wrong):
            row, last = int(wrong[0]), self.num_classes - 1
            raise ValueError(f'{self.name}, row {row}: label {int(labels[row])} is not in 0..{last}; is it unlabelled?')

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image included."""
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def with_classes(self, classes: Sequence[str]) -> ImageData:
        """The same images with their labels among these classes; raises as `new_labels`."""
        table = new_labels(self.classes, classes, self.name)
        labels = self.labels if table is None else torch.tensor(table, device=self.device)[self.labels]
        return replace(self, labels=labels, classes=tuple(classes))

    def subset(self, indices: torch.Tensor | Sequence[int]) -> ImageData:
        """The images with these indices, in this order (a copy)."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def first(self, n: int) -> ImageData:
        """The first n images, as RobustBench's n_examples takes them.

        Raises:
            ValueError: if there are not n, so that a result never claims a size it lacks.
        """
        if not 0 < n <= len(self):
            raise ValueError(f'cannot take the first {n} images of {self.name}; allowed: 1..{len(self)}')
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    def with_channels(self, n: int) -> ImageData:
        """The same images with n channels: grey ones, whose channels are equal, lose or gain copies.

        Raises:
            ValueError: for images in colour, and for n other than 1 and 3.
        """
        held = self.images.shape[1]
        if n == held:
            return self
        if n not in (1, 3) or not torch.equal(self.images, self.images[:, :1].expand_as(self.images)):
            kind = 'in colour, ' if held == 3 else ''
            raise ValueError(f'{self.name} has images {kind}of {held} channels, the model takes {n}; use others, or it')
        return replace(self, images=self.images[:, :1].expand(-1, n, -1, -1).contiguous())

    def pixels(self, indices: torch.Tensor | slice | None = None) -> torch.Tensor:
        """The images (all, or these) as float32 in [0, 1]."""
        images = self.images if indices is None else self.images[indices]
        return images.float().div_(255)

    def sha256(self) -> str:
        """SHA-256 of the images' bytes, [N, C, H, W], and of the labels' as little-endian int64."""
        digest = hashlib.sha256(self.images.contiguous().cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().astype('<i8').data)
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image once, in order: (x float32 in [0, 1], y); the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.pixels(part), self.labels[part]


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


def number_classes(labels: Any, where: object) -> tuple[str, ...]:
    """Numbers as names of the classes: as many as the largest label, of an array or a list, says.

    Raises:
        ValueError: for a label that no set of images has.
    """
    largest = int(max(labels))
    if largest >= MAX_CLASSES:
        raise ValueError(f'{where}: label {largest} is too large, allowed: up to {MAX_CLASSES - 1}; are these labels?')
    return tuple(map(str, range(largest + 1)))


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
        return x[self.own].float().div_(255), labels[self.own]

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


def new_labels(theirs: Sequence[str], ours: Sequence[str], name: str) -> list[int] | None:
    """The label of each class of a data set among the classes of training, by name; None where labels stay.

    Classes that are called by their numbers, '0', '1', ..., on either side have no names and keep their labels, unless
    all of theirs are found among ours.

    Args:
        theirs: the classes of the data set; it may lack some of ours.
        ours: those that a network was trained on.
        name: of the data set, for the message.

    Raises:
        ValueError: naming the classes that training did not have.
    """
    if tuple(theirs) == tuple(ours[: len(theirs)]):
        return None
    unknown = [c for number, c in enumerate(theirs) if c not in ours and c != str(number)]
    nameless = any(list(names) == [str(number) for number in range(len(names))] for names in (theirs, ours))
    if nameless and not set(theirs) <= set(ours):
        unknown = list(theirs[len(ours) :])
    if unknown:
        raise ValueError(
            f'{name} has classes that training did not have: {_few(unknown)}; those of training are {_few(ours)}; '
            'take these folders away, or name them as in training'
        )
    return [ours.index(c) if c in ours else number for number, c in enumerate(theirs)]


def _few(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f' and {len(names) - 8} more' if len(names) > 8 else ''
    return ', '.join(names[:8]) + more


def split_holdout(data: Data, n: int, seed: int) -> tuple[Data, Data]:
    """Hold n images out, each class in proportion (largest remainders), drawn by the seed; the device has no influence.

    Returns:
        The rest and the n held out, both in the order of the data set.

    Raises:
        ValueError: unless 0 <= n < len(data).
    """
    if not 0 <= n < len(data):
        raise ValueError(f'cannot hold {n} images of {data.name} out; allowed: 0..{len(data) - 1}')
    labels = data.labels.cpu()
    quotas = torch.bincount(labels, minlength=data.num_classes) * n
    counts, remainders = quotas // len(data), quotas % len(data)
    counts[remainders.argsort(descending=True, stable=True)[: n - int(counts.sum())]] += 1
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(data), dtype=torch.bool)
    for label, count in enumerate(counts.tolist()):
        held[order[labels[order] == label][:count]] = True
    return data.subset((~held).nonzero()[:, 0]), data.subset(held.nonzero()[:, 0])
