"""Image data sets held in memory: uint8 on the training device, handed out as float32 in [0, 1].

CIFAR-10 takes 150 MB, so it is decoded once, then cropped and flipped on the device: no worker processes, no disk
cache, and nothing to restore on resume, because batch number `step` depends on the seed and the step alone.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

DATASETS = ('cifar10', 'cifar100', 'torch/cifar10', 'torch/cifar100', 'parquet', 'digits')
SPLITS = ('train', 'test', 'validation')
_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100}
_CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_PARQUET_FOLDERS = ('.', 'data', 'plain_text', 'cifar100', 'default')  # Hugging Face names the folder after the config
_IMAGE_COLUMNS = ('img', 'image')
_LABEL_COLUMNS = ('label', 'fine_label')
_DIGITS_TEST = 360


@dataclass(frozen=True)
class ImageData:
    """Images and labels of one split, on one device.

    Args:
        images: [N, C, H, W] of uint8.
        labels: [N] of int64, each in 0..num_classes - 1.
        classes: the name of each class.
        name: the data set, as model tags spell it: 'cifar10'.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    name: str

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

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: torch.Tensor | Sequence[int]) -> ImageData:
        """The images with these indices, in this order (a copy)."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def first(self, n: int) -> ImageData:
        """The first n images, as RobustBench's n_examples takes them.

        Raises:
            ValueError: if there are not n, so that a result never claims a size it lacks.
        """
        if not 0 < n <= len(self):
            raise ValueError(f'cannot take the first {n} images of {self.name}; allowed: 1..{len(self)}')
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    def pixels(self, indices: torch.Tensor | slice | None = None) -> torch.Tensor:
        """The images (all, or these) as float32 in [0, 1]."""
        images = self.images if indices is None else self.images[indices]
        return images.float().div_(255)

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image once, in order: (x float32 in [0, 1], y); the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.pixels(part), self.labels[part]


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
    """

    def __init__(self, data: ImageData, batch_size: int, seed: int, crop_padding: int = 4, hflip: float = 0.5) -> None:
        """Check the sizes; nothing is drawn yet."""
        if not 0 < batch_size <= len(data):
            raise ValueError(f'batch_size {batch_size} must lie in 1..{len(data)}, the number of training images')
        if crop_padding < 0 or not 0 <= hflip <= 1:
            raise ValueError(f'crop_padding must be >= 0 and hflip in [0, 1], got {crop_padding} and {hflip}')
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.crop_padding, self.hflip = crop_padding, hflip
        self.steps_per_epoch = len(data) // batch_size
        self._generator = torch.Generator(data.images.device)
        self._order: tuple[int, torch.Tensor] | None = None

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step` of the run, counted from 0 through all epochs: (x [B, C, H, W] in [0, 1], y [B])."""
        if step < 0:
            raise IndexError(f'step {step} is negative; steps count from 0')
        indices = self.indices(step)
        return self._augment(self.data.images[indices], step).float().div_(255), self.data.labels[indices]

    def indices(self, step: int) -> torch.Tensor:
        """Which images batch `step` holds, [B]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = self._seeded('epoch', epoch)
            self._order = epoch, torch.randperm(len(self.data), generator=generator, device=generator.device)
        return self._order[1][position * self.batch_size :][: self.batch_size]

    def _augment(self, images: torch.Tensor, step: int) -> torch.Tensor:
        """Crop and flip by one gather: pixel (i, j) comes from padded pixel (dy + i, dx + j), j mirrored in a flip."""
        size, channels, height, width = images.shape
        generator, device, pad = self._seeded('step', step), images.device, self.crop_padding
        offsets = torch.randint(2 * pad + 1, (2, size, 1), generator=generator, device=device)
        flip = torch.rand(size, 1, generator=generator, device=device) < self.hflip
        columns = torch.arange(width, device=device)
        columns = offsets[1] + torch.where(flip, width - 1 - columns, columns)
        rows = offsets[0] + torch.arange(height, device=device)
        index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None]).view(size, 1, -1).expand(-1, channels, -1)
        return F.pad(images, (pad,) * 4).flatten(2).gather(2, index).view_as(images)

    def _seeded(self, stream: str, number: int) -> torch.Generator:
        """The generator, set to the start of one stream of random numbers (hashed: neighbours share nothing)."""
        digest = hashlib.blake2b(f'{self.seed}/{stream}/{number}'.encode(), digest_size=8).digest()
        return self._generator.manual_seed(int.from_bytes(digest, 'big') >> 1)


def split_holdout(data: ImageData, n: int, seed: int) -> tuple[ImageData, ImageData]:
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


def load_dataset(
    name: str, data_dir: str | Path | None = None, split: str = 'train', download: bool = False
) -> ImageData:
    """Read one split of a data set into memory, on the CPU.

    Args:
        name: 'cifar10', 'cifar100' (torchvision's files or Hugging Face parquet files, whichever the folder holds),
            'torch/cifar10', 'torch/cifar100' (torchvision only), 'parquet' (Hugging Face parquet files of any image
            classification data set with images of one size), or 'digits' (scikit-learn's, needs no folder).
        data_dir: the folder that holds the data.
        split: 'train' or 'test'; for 'parquet' also 'validation'.
        download: whether torchvision may fetch CIFAR into data_dir.

    Raises:
        FileNotFoundError: if the data is not there, with the layouts looked for and what to type.
        ImportError: if a library of the extras is missing.
        ValueError: for an unknown name or split, and for a file with a wrong row, naming it.
    """
    if name not in DATASETS:
        raise ValueError(f'dataset {name!r} is unknown; allowed: {", ".join(DATASETS)}')
    splits = SPLITS if name == 'parquet' else SPLITS[:2]
    if split not in splits:
        raise ValueError(f'split {split!r} of {name} is unknown; allowed: {", ".join(splits)}')
    if name == 'digits':
        return _load_digits(split)
    fetch = '' if name == 'parquet' else ', or fetch it into that folder with --dataset-download'
    if data_dir is None:
        raise FileNotFoundError(f'dataset {name!r} needs a folder: add --data-dir FOLDER{fetch}')
    return _load_folder(name, Path(data_dir), split, download, fetch)


def _load_folder(name: str, folder: Path, split: str, download: bool, fetch: str) -> ImageData:
    """The first layout that the folder holds: torchvision's, then parquet; else a download, if allowed."""
    cifar, layouts = name.removeprefix('torch/'), []
    if name != 'parquet':
        kind = _cifar_class(cifar)
        layouts.append(f'{kind.base_folder}/ or {kind.filename} (torchvision)')
        if (folder / kind.base_folder).is_dir() or (folder / kind.filename).is_file():
            return _load_torchvision(cifar, folder, split, download)
    if not name.startswith('torch/'):
        pattern = 'val*.parquet' if split == 'validation' else f'{split}*.parquet'
        layouts.append(f'{pattern} there or in {", ".join(_PARQUET_FOLDERS[1:])} (Hugging Face)')
        for files in (sorted((folder / sub).glob(pattern)) for sub in _PARQUET_FOLDERS):
            if files:
                return _load_parquet(folder.resolve().name if name == 'parquet' else name, files)
    if download and name != 'parquet':
        return _load_torchvision(cifar, folder, split, download)
    state = 'holds' if folder.is_dir() else 'does not exist, so it holds'
    raise FileNotFoundError(
        f'folder {folder} {state} no {split} split of {name}; looked for {"; ".join(layouts)}. '
        f'Name the right folder with --data-dir{fetch}'
    )


def _cifar_class(name: str) -> Any:
    """The torchvision class that reads 'cifar10' or 'cifar100'."""
    from torchvision import datasets

    return {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}[name]


def _load_torchvision(name: str, folder: Path, split: str, download: bool) -> ImageData:
    """CIFAR by torchvision, which checks every file's MD5; an intact archive is unpacked without the network."""
    from torchvision.datasets.utils import check_integrity

    kind = _cifar_class(name)
    unpack = check_integrity(str(folder / kind.filename), kind.tgz_md5)
    try:
        data = kind(str(folder), train=split == 'train', download=download or unpack)
    except (RuntimeError, OSError) as error:
        if download:
            raise OSError(f'cannot fetch {name} into {folder}: {error}; put {kind.url} there by hand') from error
        raise FileNotFoundError(
            f'{name} in {folder} is incomplete or damaged: {error}; fetch it again with --dataset-download'
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageData(images, torch.tensor(data.targets), tuple(data.classes), name)


def _load_digits(split: str) -> ImageData:
    """The 1,797 digits of scikit-learn, 8x8 grey of 0..16, as 32x32 RGB; 360 of them, stratified, are the test set."""
    digits = _optional('sklearn.datasets', 'demo').load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    grey = F.interpolate(grey, size=(32, 32), mode='bilinear', align_corners=False).round_().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    data = ImageData(grey.repeat(1, 3, 1, 1), labels, tuple(str(i) for i in range(10)), 'digits')
    return split_holdout(data, _DIGITS_TEST, seed=0)[split == 'test']


def _load_parquet(name: str, files: list[Path]) -> ImageData:
    """Decode files of rows (image {bytes, path}, label) into RGB; the Hugging Face schema names the classes, if any."""
    encoded, labels, classes = [], [], tuple[str, ...]()
    for file in files:
        file_images, file_labels, file_classes = _read_parquet(file)
        encoded.append((file, file_images))
        labels += file_labels
        classes = classes or file_classes
    if not labels:
        raise ValueError(f'{files[0]} holds no rows')
    known = _NUM_CLASSES.get(name)
    if not classes:
        classes = _CIFAR10_CLASSES if known == 10 else tuple(str(i) for i in range(known or max(labels) + 1))
    if known and len(classes) != known:
        raise ValueError(f'{files[0]} has {len(classes)} classes, {name} has {known}; to use it, say --dataset parquet')
    return ImageData(_decode(encoded, len(labels)), torch.tensor(labels), classes, name)


def _read_parquet(file: Path) -> tuple[list[bytes], list[int], tuple[str, ...]]:
    """The encoded images, the labels and, where the file names them, the classes."""
    try:
        table = _optional('pyarrow.parquet', 'train').read_table(file)
    except (ValueError, OSError) as error:
        raise ValueError(f'{file} is no whole parquet file (or a Git LFS pointer to one): {error}') from error
    image, label = _column(file, table, _IMAGE_COLUMNS), _column(file, table, _LABEL_COLUMNS)
    try:
        encoded = [item for chunk in table[image].chunks for item in chunk.field('bytes').to_pylist()]
    except (AttributeError, KeyError):
        raise ValueError(f'{file}: column {image} is {table[image].type}, not a struct with `bytes`') from None
    labels = table[label].to_pylist()
    for row, value in enumerate(labels):
        if not isinstance(value, int):
            raise ValueError(f'{file}, row {row}: {label} {value!r} is not a whole number')
    try:
        features = json.loads(table.schema.metadata[b'huggingface'])['info']['features']
        return encoded, labels, tuple(features[label]['names'])
    except (TypeError, KeyError, ValueError):
        return encoded, labels, ()


def _column(file: Path, table: Any, allowed: tuple[str, ...]) -> str:
    """The one of these columns that the table has."""
    for name in allowed:
        if name in table.column_names:
            return name
    raise ValueError(f'{file} has no column {" or ".join(allowed)}; it has {", ".join(table.column_names)}')


def _decode(encoded: list[tuple[Path, list[bytes]]], count: int) -> torch.Tensor:
    """PNG or JPEG bytes to one [N, 3, H, W] of uint8; threads gain nothing on small images (measured on CIFAR)."""
    pil = _optional('PIL.Image', 'train')
    images: torch.Tensor | None = None
    for number, (file, row, item) in enumerate((file, *entry) for file, rows in encoded for entry in enumerate(rows)):
        try:
            with pil.open(io.BytesIO(item)) as image:
                pixels = np.asarray(image.convert('RGB'))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f'{file}, row {row}: no readable image: {error}') from error
        if images is None:
            images = torch.empty(count, 3, *pixels.shape[:2], dtype=torch.uint8)
            target = images.numpy()
        if pixels.shape[:2] != target.shape[2:]:
            sizes = '{}x{}, others are {}x{}'.format(*pixels.shape[:2], *target.shape[2:])
            raise ValueError(f'{file}, row {row}: the image is {sizes}; resize all to one size first')
        target[number] = pixels.transpose(2, 0, 1)
    assert images is not None
    return images


def _optional(module: str, extra: str) -> Any:
    """Import a library that only an extra of the package installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is not installed; type: pip install timm-robust[{extra}]') from error
