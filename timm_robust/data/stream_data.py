"""Data sets too large for memory, read through timm's readers by worker processes, at any image size."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..pixels import to_pixels
from .classes import class_names, new_labels, read_labels
from .memory import ImageData
from .sources import open_dataset, source_name
from .transforms import Samples, SampleStream, eval_transform, read_sample

MOST_UNREADABLE = 0.01
"""Of the pictures of a split: with more, neither training nor a measurement is what it says it is."""
_logger = logging.getLogger('timm_robust')


def reader_fault(error: BaseException) -> str | None:
    """What to do where worker processes died, or could not hand their images over; None for another error."""
    found = re.search(r'DataLoader worker \(pid[^.\n]*|unable to \w+[^\n]*/torch_[^\n]*', str(error))
    if found is None:
        return None
    return (
        f'{found[0]}: a loader process was killed, or memory or /dev/shm is full; type fewer --workers (0: none), '
        'or give a container more (docker run --shm-size 8g)'
    )


class StreamData:
    """One split of a data set on the disk; images are resized and cropped at the centre, in [0, 1], not normalised.

    Folders, `torch/` and `hfds/` data sets are map-style: an image has a number. `wds/`, `hfids/` and `tfds/` are
    iterable: they have an order only, so they cannot be split here, and `first` reads in one process.

    Args:
        name: '' or 'folder' (folders of images by class, or a `.tar` of such), 'torch/<name>', 'hfds/<name>',
            'wds/<name>', 'hfids/<name>' or 'tfds/<name>', as timm's train script takes them.
        root: the folder or the `.tar` file; a folder may hold a folder or a `.tar` for each split.
        split: as the reader names it; for 'wds/' without an `_info.json` 'x-{0000..0009}.tar|10000', the number of
            images last.
        img_size: pixels a side, after resizing and cropping as `eval_transform` does it.
        data_config: of the model that sees them, for its crop_pct and interpolation.
        workers: processes that read and decode; 0: this one.
        num_classes: needed where the reader does not know the classes ('wds/'); elsewhere at least as many.
        classes: those of training: the labels are theirs, by name, and this split may lack some; see `new_labels`.
        download: whether torchvision, Hugging Face or TensorFlow may fetch the data.

    Raises:
        FileNotFoundError: if there are no such files.
        ImportError: if the reader's library is missing.
        ValueError: for an unknown name, split or setting.
    """

    def __init__(
        self,
        name: str,
        root: str | None,
        split: str = 'train',
        img_size: int = 224,
        *,
        data_config: Mapping[str, Any] | None = None,
        workers: int = 4,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        download: bool = False,
    ) -> None:
        """Open the data set and learn its size and classes; no image is read."""
        self._options: dict[str, Any] = {'name': name, 'root': root, 'split': split, 'download': download}
        self.img_size, self.workers, self.device, self.channels = img_size, workers, torch.device('cpu'), 3
        self.transform = eval_transform(img_size, data_config)
        self.dataset = open_dataset(**self._options)
        self.iterable = isinstance(self.dataset, IterableDataset)
        self.name = source_name(name, root)
        own = class_names(self.dataset, len(classes) if classes else num_classes, self.name, fill=not classes)
        table = new_labels(own, classes, self.name) if classes else None
        self.classes = tuple(classes or own)
        self._own, self._labels = len(own), None if table is None else torch.tensor(table)
        self.unreadable: dict[int, str] = {}
        self._most_unreadable = MOST_UNREADABLE
        self._size = len(self.dataset)
        self.rows = torch.arange(0 if self.iterable else self._size)  # of the data set as timm reads it
        self._all_labels: torch.Tensor | None = None
        if not self._size:
            raise ValueError(
                f'{self.name}: the reader knows no number of images; type it, as in --split "{split}|10000"'
            )

    def __len__(self) -> int:
        """Number of images."""
        return self._size

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image included."""
        return len(self.classes)

    @property
    def labels(self) -> torch.Tensor:
        """The label of each image, [N] of int64, read without decoding any image.

        Raises:
            ValueError: if the reader cannot tell them, and for a label without a class.
        """
        if self._all_labels is None:
            labels = torch.as_tensor(read_labels(self.dataset, self.name), dtype=torch.int64)
            self._all_labels = self._relabelled(labels)
        return self._all_labels[self.rows]

    def names(self) -> list[str]:
        """The file of each image, relative to the folder, or its number where the reader has no names."""
        return [self._file_name(row) for row in self.rows.tolist()]

    def to(self, device: torch.device | str) -> StreamData:
        """The same data, handed out on a device."""
        return self._with(device=torch.device(device))

    def subset(self, indices: torch.Tensor | Sequence[int]) -> StreamData:
        """The images with these indices, in this order."""
        if self.iterable:
            raise ValueError(f'{self.name} has an order, not numbers; validate on its own split, with --val-size 0')
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        return self._with(rows=rows, _size=len(rows), unreadable={})

    def first(self, n: int) -> StreamData:
        """The first n images.

        Raises:
            ValueError: if there are not n.
        """
        if not 0 < n <= len(self):
            raise ValueError(f'cannot take the first {n} images of {self.name}; allowed: 1..{len(self)}')
        return self._with(_size=n, workers=min(self.workers, 1)) if self.iterable else self.subset(range(n))

    def probe(self, n: int) -> StreamData:
        """The first n images, or all, however many of them can be read: to time their reading."""
        return self.first(min(n, len(self)))._with(_most_unreadable=1.0)

    @property
    def readers(self) -> int:
        """Processes that read: `workers`, but of an iterable data set no more than it has files; 0: this one."""
        if not self.iterable:
            return self.workers
        reader = self.dataset.reader  # a worker needs a file of its own
        files = len(getattr(getattr(reader, 'split_info', None), 'filenames', ()))
        own = files // getattr(reader, 'dist_num_replicas', 1)
        return min(self.workers, max(own, 1)) if files else self.workers

    def with_channels(self, n: int) -> StreamData:
        """The same images with n channels; for 1 they must be grey, and the first of another kind ends the reading.

        Raises:
            ValueError: for n other than 1 and 3.
        """
        if n not in (1, 3):
            raise ValueError(f'{self.name} has images of 3 channels, the model takes {n}; allowed: 1 for grey, and 3')
        return self._with(channels=n)

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image once, in order: (x float32 in [0, 1], y); the last batch (of each worker) may be smaller.

        Pictures that cannot be read are left out, and noted in `unreadable`, row -> name.

        Raises:
            ValueError: for a label without a class, if an iterable data set has more or fewer images than it said, and
                after the last image if more than 1 % were unreadable.
        """
        if self.iterable:
            dataset: Any = SampleStream(self.open(0), self.transform, 0, len(self) if self.workers < 2 else None)
            loader = self.loader(dataset, 0, batch_size=batch_size)
        else:
            keys = [(0, row) for row in self.rows.tolist()]
            loader = self.loader(Samples(self.dataset, self.transform), 0, batch_size=batch_size, sampler=keys)
        seen = 0
        for x, y, bad in loader:
            seen += len(y)
            self._note(bad)
            if (good := bad < 0).any():
                yield self._place(x[good], y[good])
        self._check_readable()
        shared = getattr(getattr(self.dataset, 'reader', None), 'dist_num_replicas', 1) > 1  # len is rounded then
        if seen != len(self) and not shared:
            raise ValueError(f'{self.name} holds {seen} readable images, not the {len(self)} that its split claims')

    def in_memory(self) -> ImageData:
        """The images, decoded once: what evaluation takes; 5,000 of 224x224 need 750 MB."""
        parts = [((255 * x).round().to(torch.uint8), y) for x, y in self.to('cpu').batches(256)]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        notes = (f'{self._found_unreadable()}, and left out',) if self.unreadable else ()
        return ImageData(images, labels, self.classes, self.name, notes).to(self.device)

    def open(self, seed: int, batch_size: int | None = None) -> Any:
        """An iterable data set anew, for one pass by all workers; with a batch size for training: shuffled, endless."""
        options = {**self._options, 'seed': seed % 2**31}
        if batch_size is not None:
            options |= {'is_training': True, 'batch_size': batch_size}
        return open_dataset(**options)

    def loader(self, dataset: Any, seed: int, **options: Any) -> DataLoader:
        """Worker processes over samples; their seeds come from `seed`, not from the global random numbers."""
        generator, workers = torch.Generator().manual_seed(seed), self.readers
        if self.iterable:
            dataset.dataset.set_loader_cfg(num_workers=workers)
        pinned = self.device.type == 'cuda'
        return DataLoader(dataset, num_workers=workers, pin_memory=pinned, generator=generator, **options)

    def place(self, x: torch.Tensor, y: torch.Tensor, bad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A training batch on the device; others of the batch, in order, stand in for pictures that cannot be read.

        Args:
            x: images [B, 3, H, W] of uint8.
            y: labels [B], as the reader counts.
            bad: the numbers of those that were unreadable, -1 for all others, [B].

        Raises:
            ValueError: for a label without a class, and if more than 1 % of the pictures met so far are unreadable.
        """
        self._note(bad)
        self._check_readable()
        good = (bad < 0).nonzero()[:, 0]
        if len(good) < len(bad):
            if not len(good):
                raise ValueError(f'{self._found_unreadable()}: a whole batch; mend or delete them')
            stand_in = torch.where(bad < 0, torch.arange(len(bad)), good[torch.arange(len(bad)) % len(good)])
            x, y = x[stand_in], y[stand_in]
        return self._place(x, y)

    def _place(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch on the device: float32 in [0, 1] and labels."""
        y = self._relabelled(y)
        if self.channels == 1:
            if not torch.equal(x, x[:, :1].expand_as(x)):
                raise ValueError(f'{self.name} has images in colour, the model takes 1 channel; use others, or it')
            x = x[:, :1]
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        return to_pixels(x), y

    def _relabelled(self, labels: torch.Tensor) -> torch.Tensor:
        """The reader's labels as `classes` counts them; those without a class are refused."""
        wrong = labels[(labels < 0) | (labels >= self._own)]
        if len(wrong):
            raise ValueError(f'{self.name}: label {int(wrong[0])} is not in 0..{self._own - 1}; is it unlabelled?')
        return labels if self._labels is None else self._labels[labels]

    def _note(self, bad: torch.Tensor) -> None:
        """Note the numbers (not -1) of pictures that could not be read, each once, with a line in the log."""
        for row in bad[bad >= 0].tolist():
            if row in self.unreadable:
                continue
            self.unreadable[row] = self._file_name(row)
            try:
                read_sample(self.dataset, row)
                reason = 'not at first'
            except Exception as error:
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
            _logger.warning('%s: %s cannot be read (%s)', self.name, self.unreadable[row], reason)

    def _file_name(self, row: int) -> str:
        try:
            return str(self.dataset.filename(row))
        except Exception:  # torchvision's and some of timm's readers have no names
            return f'number {row}'

    def _check_readable(self) -> None:
        """Refuse a split of which too much is unreadable."""
        if len(self.unreadable) > self._most_unreadable * len(self):
            raise ValueError(f'{self._found_unreadable()}; at most {MOST_UNREADABLE:.0%} may be; mend or delete them')

    def _found_unreadable(self) -> str:
        names = [*self.unreadable.values()]
        more = ', ...' if len(names) > 3 else ''
        return f'{len(names)} of {len(self)} pictures of {self.name} cannot be read ({", ".join(names[:3])}{more})'

    def _with(self, **changes: Any) -> StreamData:
        """A copy with changes; the opened data set is shared."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other
