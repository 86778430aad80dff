"""`load_dataset`: one split of a data set, read from the disk into memory."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from .arrays import SPLITS, find_arrays, load_arrays
from .classes import number_classes
from .memory import ImageData, split_holdout
from .sources import is_stream
from .transforms import check_depth

CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_CLASSES = {'cifar10': CIFAR10_CLASSES, 'cifar100': tuple(map(str, range(100)))}
_TORCHVISION = {'cifar10': CIFAR10, 'cifar100': CIFAR100, 'torch/cifar10': CIFAR10, 'torch/cifar100': CIFAR100}
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
    source = DATASETS[name]
    if split not in source.splits:
        raise ValueError(f'split {split!r} of {name} is unknown; allowed: {", ".join(source.splits)}')
    fetch = ', or fetch it into that folder with --dataset-download' if source.fetched else ''
    if data_dir is None and source.in_folder:
        raise FileNotFoundError(f'dataset {name!r} needs a folder: add --data-dir FOLDER{fetch}')
    folder, looked_for = Path(data_dir or ''), []
    for layout in source.layouts:
        found = layout(name, folder, split, download)
        if isinstance(found, ImageData):
            return found
        looked_for.append(found)
    if download and source.fetched:
        return _load_torchvision(name, folder, split, download)
    state = 'holds' if folder.is_dir() else 'does not exist, so it holds'
    raise FileNotFoundError(
        f'folder {folder} {state} no {split} split of {name}; looked for {"; ".join(looked_for)}. '
        f'Name the right folder with --data-dir{fetch}'
    )


def _arrays(name: str, folder: Path, split: str, download: bool) -> ImageData | str:
    if arrays := find_arrays(name, folder, split):
        return load_arrays(arrays)
    return f'{split}.npz' if name == 'npz' else f'{split}_image.npy and {split}_label.npy'


def _torchvision(name: str, folder: Path, split: str, download: bool) -> ImageData | str:
    kind = _TORCHVISION[name]
    if (folder / kind.base_folder).is_dir() or (folder / kind.filename).is_file():
        return _load_torchvision(name, folder, split, download)
    return f'{kind.base_folder}/ or {kind.filename} (torchvision)'


def _parquet(name: str, folder: Path, split: str, download: bool) -> ImageData | str:
    pattern = 'val*.parquet' if split == 'validation' else f'{split}*.parquet'
    for files in (sorted((folder / sub).glob(pattern)) for sub in _PARQUET_FOLDERS):
        if files:
            return _load_parquet(folder.resolve().name if name == 'parquet' else name, files)
    return f'{pattern} there or in {", ".join(_PARQUET_FOLDERS[1:])} (Hugging Face)'


def _digits(name: str, folder: Path, split: str, download: bool) -> ImageData | str:
    """The 1,797 digits of scikit-learn, 8x8 grey of 0..16, as 32x32 RGB; 360 of them, stratified, are the test set."""
    digits = _optional('sklearn.datasets', 'scikit-learn').load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    grey = F.interpolate(grey, size=(32, 32), mode='bilinear', align_corners=False).round_().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    data = ImageData(grey.repeat(1, 3, 1, 1), labels, tuple(map(str, range(10))), 'digits')
    train, test = split_holdout(data, _DIGITS_TEST, seed=0)
    return test if split == 'test' else train


class Source(NamedTuple):
    """How a data set is found: ways to read it, each of which says what it looked for if in vain.

    A way takes name, folder, split and whether torchvision may download what is missing.
    """

    layouts: tuple[Callable[[str, Path, str, bool], ImageData | str], ...]
    splits: tuple[str, ...] = SPLITS[:2]
    in_folder: bool = True
    fetched: bool = False
    """Whether torchvision can download it."""


DATASETS = {
    'cifar10': Source((_torchvision, _parquet), fetched=True),
    'cifar100': Source((_torchvision, _parquet), fetched=True),
    'torch/cifar10': Source((_torchvision,), fetched=True),
    'torch/cifar100': Source((_torchvision,), fetched=True),
    'parquet': Source((_parquet,), SPLITS),
    'digits': Source((_digits,), in_folder=False),
    'npz': Source((_arrays,), SPLITS),
    'npy': Source((_arrays,), SPLITS),
}
"""Every data set in memory, by the name that --dataset takes."""


def is_named_by_folder(name: str) -> bool:
    """Whether what --dataset takes says the kind of the files alone: records then have the folder's name."""
    return is_stream(name) or name in ('parquet', 'npz', 'npy')


def _load_torchvision(name: str, folder: Path, split: str, download: bool) -> ImageData:
    """CIFAR by torchvision, which checks every file's MD5; an intact archive is unpacked without the network."""
    kind, name = _TORCHVISION[name], name.removeprefix('torch/')
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


def _load_parquet(name: str, files: list[Path]) -> ImageData:
    """Decode files of rows (image {bytes, path}, label) into RGB; the Hugging Face schema names the classes, if any."""
    rows, labels, classes = [], [], tuple[str, ...]()
    for file in files:
        encoded, file_labels, file_classes = _read_parquet(file)
        rows += [(file, row, item) for row, item in enumerate(encoded)]
        labels += file_labels
        if classes and file_classes and classes != file_classes:
            raise ValueError(
                f'{file} has the classes {", ".join(file_classes[:5])}, {files[0]} has {", ".join(classes[:5])}: their '
                'numbers mean others; keep files of one list in the folder'
            )
        classes = classes or file_classes
    if not labels:
        raise ValueError(f'{files[0]} holds no rows')
    known = _CLASSES.get(name, ())
    classes = classes or known or number_classes(labels, files[0])
    if known and len(classes) != len(known):
        raise ValueError(
            f'{files[0]} has {len(classes)} classes, {name} has {len(known)}; to use it, say --dataset parquet'
        )
    return ImageData(_decode(rows), torch.tensor(labels), classes, name)


def _read_parquet(file: Path) -> tuple[list[bytes], list[int], tuple[str, ...]]:
    """The encoded images, the labels and, where the file names them, the classes."""
    try:
        table = _optional('pyarrow.parquet', 'pyarrow').read_table(file)
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


def _decode(rows: list[tuple[Path, int, bytes]]) -> torch.Tensor:
    """PNG or JPEG bytes to one [N, 3, H, W] of uint8; threads gain nothing on small images (measured on CIFAR)."""
    images: np.ndarray = np.empty(0)
    for number, (file, row, item) in enumerate(rows):
        try:
            with Image.open(io.BytesIO(item)) as image:
                check_depth(image)
                pixels = np.asarray(image.convert('RGB'))
        except MemoryError:
            raise
        except Exception as error:  # also no bytes at all, or a picture of a million pixels a side
            raise ValueError(f'{file}, row {row}: no readable image: {error}') from error
        height, width = pixels.shape[:2]
        if number == 0:
            images = np.empty((len(rows), 3, height, width), np.uint8)
        if (height, width) != images.shape[2:]:
            others = '{}x{}'.format(*images.shape[2:])
            raise ValueError(
                f'{file}, row {row}: the image is {height}x{width}, others are {others}; resize all to one size first'
            )
        images[number] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _optional(module: str, package: str) -> Any:
    """Import from a package that only an extra of ours installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is not installed; type: pip install {package}') from error
