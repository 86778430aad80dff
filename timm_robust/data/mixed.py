"""Batches mixed from a data set in memory and generated images on the disk, each shuffled across all its rows."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .batches import EpochOrder, TrainBatches, seed_of
from .extra import ExtraImages
from .memory import ImageData


class MixedBatches(TrainBatches):
    """Batches of which round(batch_size * fraction) rows are generated; each follows from (seed, step) alone.

    An epoch is defined by images seen: it is len(data) images, real and generated together, so that recipes with and
    without generated images take the same number of steps (of which `1 - fraction` sees the real images). Both kinds
    run through permutations of their own, across epochs: no row comes twice before all have come once. All rows are
    shuffled within the batch. While a batch is trained on, a thread fetches the next one's generated images.

    Args:
        data: the real images, on the training device.
        extra: the generated images.
        fraction: share of generated images in a batch, in [0, 1].
        batch_size, seed, crop_padding, hflip, own: as of `TrainBatches`.
    """

    def __init__(
        self,
        data: ImageData,
        extra: ExtraImages,
        fraction: float,
        batch_size: int,
        seed: int,
        *,
        crop_padding: int = 4,
        hflip: float = 0.5,
        own: slice = slice(None),
    ) -> None:
        """Check that the two kinds of images go together; nothing is drawn yet."""
        super().__init__(data, batch_size, seed, crop_padding=crop_padding, hflip=hflip, own=own)
        if not 0 <= fraction <= 1:
            raise ValueError(f'fraction {fraction} of generated images must lie in [0, 1], such as 0.7')
        if extra.num_classes != data.num_classes:
            raise ValueError(f'{extra.name} has {extra.num_classes} classes, {data.name} has {data.num_classes}')
        if extra.shape != tuple(data.images.shape[1:]):
            ours = list(data.images.shape[1:])
            raise ValueError(
                f'images of {extra.name} are {list(extra.shape)}, of {data.name} {ours}; resize one of them'
            )
        self.extra, self.fraction = extra, fraction
        self.extra_rows = round(batch_size * fraction)
        if (self.extra_rows in (0, batch_size)) != (fraction in (0, 1)):
            raise ValueError(
                f'fraction {fraction} of {batch_size} images leaves none of one kind; raise the batch size'
            )
        self._data_order = EpochOrder(len(data), f'{seed}/data')
        self._extra_order = EpochOrder(len(extra), f'{seed}/extra')
        self._thread = ThreadPoolExecutor(1, 'MixedBatches')
        self._next: tuple[int, Future[list[torch.Tensor]]] | None = None

    def indices(self, step: int) -> torch.Tensor:
        """Which images batch `step` holds, [B] on the CPU: row i of the data is i, row i of extra is len(data) + i."""
        rows, extra_rows, shuffle = self._rows(step)
        return torch.cat([rows, extra_rows + len(self.data)])[shuffle]

    def _draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images of the batch as they are, uint8, and their labels; a thread begins to fetch the next ones."""
        ahead, self._next = self._next, None
        fetched = ahead[1].result() if ahead is not None and ahead[0] == step else self._fetch(step)
        self._next = step + 1, self._thread.submit(self._fetch, step + 1)
        rows, shuffle, images, labels = (item.to(self.data.device, non_blocking=True) for item in fetched)
        images = torch.cat([self.data.images[rows], images])[shuffle]
        return images, torch.cat([self.data.labels[rows], labels])[shuffle]

    def _rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the data, rows of extra, and the order of both together in the batch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, 'shuffle', step))
        shuffle = torch.randperm(self.batch_size, generator=generator)
        real = self.batch_size - self.extra_rows
        return (
            _stream(self._data_order, step * real, real),
            _stream(self._extra_order, step * self.extra_rows, self.extra_rows),
            shuffle,
        )

    def _fetch(self, step: int) -> list[torch.Tensor]:
        """What the device needs for a batch, in pinned memory for a GPU: rows, order, extra images, their labels."""
        rows, extra_rows, shuffle = self._rows(step)
        fetched = [rows, shuffle, *self.extra[extra_rows]]
        return [item.contiguous().pin_memory() for item in fetched] if self.data.images.is_cuda else fetched


def _stream(order: EpochOrder, start: int, count: int) -> torch.Tensor:
    """Items start..start + count - 1 of the endless stream that runs through one order after the other."""
    parts = []
    while count:
        epoch, position = divmod(start, order.n)
        part = order(epoch)[position : position + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
