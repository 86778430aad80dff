"""Training batches out of a data set on the disk, augmented by timm's transforms in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch

from .batches import EpochOrder, seed_of
from .stream_data import StreamData
from .transforms import Samples, SampleStream, train_transform


class StreamBatches:
    """An endless stream of augmented training batches from the disk, to be asked for one after the other.

    An epoch visits the images in a new random order and drops the incomplete last batch. For map-style data batch
    `step` is a pure function of (seed, step), whatever the number of workers: the order follows from (seed, epoch), the
    augmentation of a sample from (seed, epoch, number of the image). Any other step than the next one restarts the
    workers there. Iterable data is shuffled by timm's reader within and across its files: batches depend on the number
    of workers too, an epoch may repeat some images and miss others where the workers' shares differ, and a restart in
    mid-epoch reads and drops the batches from the epoch's start on.

    Args:
        data: the training images; its `img_size`, `workers` and `device` hold here too, its transform does not.
        batch_size: images a batch, at most len(data).
        seed: any whole number.
        hflip: probability of a horizontal flip.
        own: the rows of each batch that are read, where several processes share a batch of map-style data.

    Raises:
        ValueError: for a setting that cannot be meant.
    """

    def __init__(
        self,
        data: StreamData,
        batch_size: int,
        seed: int,
        *,
        hflip: float = 0.5,
        own: slice = slice(None),
    ) -> None:
        """Check the settings; no worker is started yet."""
        if not 0 < batch_size <= len(data):
            raise ValueError(f'batch_size {batch_size} must lie in 1..{len(data)}, the number of training images')
        if data.iterable and len(data) != len(data.dataset):
            raise ValueError(
                f'{data.name} has an order, not numbers, so it cannot train on its first {len(data)} images'
            )
        self.data, self.batch_size, self.seed, self.own = data, batch_size, seed, own
        self.steps_per_epoch = len(data) // batch_size
        self.transform = train_transform(data.img_size, hflip)
        self._order, self._rows = EpochOrder(len(data), seed), data.rows
        self._next, self._batches = -1, iter(())

    _batches: Iterator[list[torch.Tensor]]

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step` of the run, counted from 0 through all epochs: (x [B, 3, H, W] in [0, 1], y [B])."""
        if step < 0:
            raise IndexError(f'step {step} is negative; steps count from 0')
        epoch, position = divmod(step, self.steps_per_epoch)
        if step != self._next or (self.data.iterable and position == 0):
            self._batches = iter(())  # ends the workers before new ones start
            self._batches = self._open_epoch(epoch, position) if self.data.iterable else self._open(step)
        self._next = -1
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError(f'{self.data.name} ended before step {step}; its split holds fewer images than it claims')
        self._next = step + 1
        return self.data.place(*batch)

    def _open(self, step: int) -> Iterator[list[torch.Tensor]]:
        """All batches of map-style data from a step on; the workers go on from epoch to epoch."""
        keys = _keys(self._order, self._rows, self.batch_size, step, self.own)
        return iter(self.data.loader(Samples(self.data.dataset, self.transform, self.seed), 0, batch_sampler=keys))

    def _open_epoch(self, epoch: int, position: int) -> Iterator[list[torch.Tensor]]:
        """The batches of one epoch of iterable data from a position on."""
        seed = seed_of(self.seed, 'epoch', epoch)
        dataset = self.data.open(seed, self.batch_size)
        dataset.set_epoch(epoch)
        samples = SampleStream(dataset, self.transform, seed, None)
        batches = iter(self.data.loader(samples, seed, batch_size=self.batch_size, drop_last=True))
        for _ in range(position):
            next(batches)
        return batches


def _keys(
    order: EpochOrder, rows: torch.Tensor, batch_size: int, first: int, own: slice
) -> Iterator[list[tuple[int, int]]]:
    """What `Samples` is asked for, batch after batch from a step on, without end.

    It does not know the StreamBatches: a loader in a reference cycle takes seconds to end each worker.
    """
    for step in count(first):
        epoch, indices = order.batch(step, batch_size)
        yield [(epoch, row) for row in rows[indices[own]].tolist()]
