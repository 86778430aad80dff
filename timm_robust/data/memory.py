"""Image data sets held in memory, as uint8: CIFAR-10 takes 150 MB, so it is decoded once and lies on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from ..pixels import to_pixels
from .classes import new_labels

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
        last = self.num_classes - 1
        known = labels.clamp(0, last)
        if not torch.equal(labels, known):
            row = int((labels != known).nonzero()[0])
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
        return to_pixels(images)

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
