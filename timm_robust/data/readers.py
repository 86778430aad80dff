"""`load_dataset`: one split of a data set, read from the disk into memory."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .arrays import find_arrays, load_arrays
from .memory import ImageData, number_classes, split_holdout

DATASETS = ('cifar10', 'cifar100', 'torch/cifar10', 'torch/cifar100', 'parquet', 'digits', 'npz', 'npy')
SPLITS = ('train', 'test', 'validation')
_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100}
_CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_PARQUET_FOLDERS = ('.', 'data', 'plain_text', 'cifar100', 'default')  # Hugging Face names the folder after the config
_IMAGE_COLUMNS = ('img', 'image')
_LABEL_COLUMNS = ('label', 'fine_label')
_DIGITS_TEST = 360


def load_dataset(
    name: str, data_dir: str | Path | None = None, split: str = 'train', download: bool = False
) -> ImageData:
    """Read one split of a data set into memory, on the CPU.

    Args:
        name: 'cifar10', 'cifar100' (torchvision's files or Hugging Face parquet files, whichever the folder holds),
            'torch/cifar10', 'torch/cifar100' (torchvision only), 'parquet' (Hugging Face parquet files of any image
            classification data set with images of one size), 'digits' (scikit-learn's, needs no folder), 'npz'
            (`<split>.npz` with the arrays `image` and `label`) or 'npy' (`<split>_image.npy` and `<split>_label.npy`).
            Images in NumPy files are uint8 of [N, H, W, 3], [N, 3, H, W] or, grey, [N, H, W]; `classes.txt` beside
            them may name the classes, one a line, else there are as many as the largest label says.
        data_dir: the folder that holds the data; for 'npz' also the file itself.
        split: 'train' or 'test'; for 'parquet', 'npz' and 'npy' also 'validation'.
        download: whether torchvision may fetch CIFAR into data_dir.

    Raises:
        FileNotFoundError: if the data is not there, with the layouts looked for and what to type.
        ImportError: if a library of the extras is missing.
        ValueError: for an unknown name or split, and for a file with a wrong row or array, naming it.
    """
    if name not in DATASETS:
        raise ValueError(f'dataset {name!r} is unknown; allowed: {", ".join(DATASETS)}')
    splits = SPLITS if name in ('parquet', 'npz', 'npy') else SPLITS[:2]
    if split not in splits:
        raise ValueError(f'split {split!r} of {name} is unknown; allowed: {", ".join(splits)}')
    if name == 'digits':
        return _load_digits(split)
    fetch = ', or fetch it into that folder with --dataset-download' if 'cifar' in name else ''
    if data_dir is None:
        raise FileNotFoundError(f'dataset {name!r} needs a folder: add --data-dir FOLDER{fetch}')
    return _load_folder(name, Path(data_dir), split, download, fetch)


def _load_folder(name: str, folder: Path, split: str, download: bool, fetch: str) -> ImageData:
    """The first layout that the folder holds: torchvision's, then parquet, or arrays; else a download, if allowed."""
    cifar, layouts = name.removeprefix('torch/'), []
    if name in ('npz', 'npy'):
        if arrays := find_arrays(name, folder, split):
            return load_arrays(arrays)
        pair = f'{split}_image.npy and {split}_label.npy'
        layouts.append(f'{split}.npz' if name == 'npz' else pair)
    if cifar in _NUM_CLASSES:
        kind = _cifar_class(cifar)
        layouts.append(f'{kind.base_folder}/ or {kind.filename} (torchvision)')
        if (folder / kind.base_folder).is_dir() or (folder / kind.filename).is_file():
            return _load_torchvision(cifar, folder, split, download)
    if name == 'parquet' or name in _NUM_CLASSES:
        pattern = 'val*.parquet' if split == 'validation' else f'{split}*.parquet'
        layouts.append(f'{pattern} there or in {", ".join(_PARQUET_FOLDERS[1:])} (Hugging Face)')
        for files in (sorted((folder / sub).glob(pattern)) for sub in _PARQUET_FOLDERS):
            if files:
                return _load_parquet(folder.resolve().name if name == 'parquet' else name, files)
    if download and cifar in _NUM_CLASSES:
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
        numbers = tuple(map(str, range(known))) if known else number_classes(labels, files[0])
        classes = _CIFAR10_CLASSES if known == 10 else numbers
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
        if not isinstance(value, int) or value >= 2**63:
            raise ValueError(f'{file}, row {row}: {label} {value!r} is not a whole number of 64 bits')
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
        except MemoryError:
            raise
        except Exception as error:  # also no bytes at all, or a picture of a million pixels a side
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
