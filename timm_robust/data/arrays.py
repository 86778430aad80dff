"""Images and labels as NumPy files: an `.npz` with `image` and `label`, or a pair of `.npy` files.

They are read whole (`load_arrays`) or mapped from the disk row by row (`map_arrays`). Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .classes import number_classes
from .memory import ImageData

SPLITS = ('train', 'test', 'validation')
_SHAPES = '[N, H, W, 3], [N, 3, H, W] or, grey, [N, H, W], [N, H, W, 1], [N, 1, H, W]'


def find_pair(folder: Path, prefix: str) -> tuple[Path, Path] | None:
    """The files <prefix>image.npy and <prefix>label.npy of a folder, each also in the plural."""
    found = []
    for kind in ('image', 'label'):
        files = [folder / f'{prefix}{kind}{plural}.npy' for plural in ('', 's')]
        found += [file for file in files if file.is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def find_arrays(name: str, folder: Path, split: str) -> tuple[Path, ...]:
    """The file (`npz`) or the two files (`npy`) of one split; none where they are not there.

    Raises:
        ValueError: if the path names the `.npz` file of another split, so that no test is run on training images.
    """
    if name == 'npy':
        return find_pair(folder, f'{split}_') or ()
    if not folder.is_file():
        return (folder / f'{split}.npz',) if (folder / f'{split}.npz').is_file() else ()
    if folder.stem in SPLITS and folder.stem != split:
        raise ValueError(f'{folder} is not the {split} split; name its folder with --data-dir, or type {folder.stem!r}')
    return (folder,)


def load_arrays(files: tuple[Path, ...]) -> ImageData:
    """Read images and labels into memory; `classes.txt` beside the file may name the classes, one a line.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    images, labels = (_read(*place) for place in _places(files))
    layout = check_arrays(images, labels, str(files[0]))
    folder = files[0].resolve().parent
    names = folder / 'classes.txt'
    text = names.read_text(encoding='utf-8').rstrip() if names.is_file() else ''
    classes = tuple(map(str.strip, text.split('\n'))) if text else number_classes(labels, files[-1])
    pixels = channels_first(torch.from_numpy(images), layout).contiguous()
    name = folder.name if len(files) == 2 or files[0].stem in SPLITS else files[0].stem
    return ImageData(pixels, torch.from_numpy(labels.astype(np.int64)), classes, name)


def map_arrays(files: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray, str]:
    """Images and labels as arrays that stay on the disk, and the images' layout: 'NHWC', 'NCHW' or 'NHW'.

    Raises:
        ValueError: naming the file and what is wrong with it; for a compressed `.npz`, with what unpacks it.
    """
    images, labels = (_map(*place) for place in _places(files))
    return images, labels, check_arrays(images, labels, str(files[0]))


def check_arrays(images: np.ndarray, labels: np.ndarray, where: str) -> str:
    """Refuse arrays of the wrong type or shape, and return the layout of the images: 'NHWC', 'NCHW' or 'NHW'."""
    if images.dtype != np.uint8:
        raise ValueError(
            f'{where}: the images are {images.dtype}, they must be uint8 of 0..255; '
            "for floats in [0, 1], save (255 * image).round().astype('uint8')"
        )
    shape = images.shape
    if len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3)):
        layout = 'NHWC' if shape[3] in (1, 3) else 'NCHW'
    elif len(shape) == 3:
        layout = 'NHW'
    else:
        raise ValueError(f'{where}: the images have the shape {list(shape)}; allowed: {_SHAPES}')
    if 0 in shape:
        raise ValueError(f'{where} holds no images, its shape is {list(shape)}')
    if labels.dtype.kind not in 'iu':
        raise ValueError(f'{where}: the labels are {labels.dtype}, they must be whole numbers, such as int64')
    if labels.shape != shape[:1]:
        raise ValueError(
            f'{where}: the labels have the shape {list(labels.shape)}, {shape[0]} images need [{shape[0]}]'
        )
    return layout


def channels_first(images: torch.Tensor, layout: str) -> torch.Tensor:
    """A view as [N, 3, H, W]; grey images get three equal channels."""
    if layout == 'NHW':
        images = images[:, None]
    elif layout == 'NHWC':
        images = images.permute(0, 3, 1, 2)
    return images.expand(-1, 3, -1, -1)


def _places(files: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """Where images and labels are: a file each, and the name of the array where one `.npz` holds both."""
    return [(files[0], 'image'), (files[0], 'label')] if len(files) == 1 else [(file, '') for file in files]


def _read(file: Path, key: str) -> np.ndarray:
    """An array, in memory."""
    with _opened(file, key) as (stream, _):
        return np.lib.format.read_array(stream, allow_pickle=False)


def _map(file: Path, key: str) -> np.ndarray:
    """An array that stays on the disk, read-only; one of an `.npz` at its place inside the archive."""
    with _opened(file, key) as (stream, entry):
        if entry is not None and entry.compress_type != zipfile.ZIP_STORED:
            folder = file.with_suffix('')
            raise ValueError(
                'it is compressed, so its rows cannot be read one by one; unpack it once with '
                f'`python -m zipfile -e {file} {folder}` and name the folder {folder} instead'
            )
        if np.lib.format.read_magic(stream) != (1, 0):  # as numpy writes every array of numbers
            raise ValueError('its version of the format is not 1.0; save it again with numpy.save')
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise ValueError('it holds Python objects; save plain arrays of numbers')
        if by_column and len(shape) > 1:
            raise ValueError('it is stored column by column; save numpy.ascontiguousarray(...) of it')
        if 0 in shape:
            return np.empty(shape, dtype)
        start = stream.tell() + (0 if entry is None else _start(file, entry))
        mapped = np.memmap(file, dtype, 'r', start, shape)
    memory: Any = mapped.base
    if hasattr(mmap, 'MADV_RANDOM') and len(memory) > os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2:
        memory.madvise(mmap.MADV_RANDOM)  # larger than the cache can be: what is read around a row is in vain
    return mapped


def _start(file: Path, entry: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins: its local header repeats the name, and has an extra field of its own."""
    with open(file, 'rb') as raw:
        raw.seek(entry.header_offset + 26)
        name, extra = struct.unpack('<HH', raw.read(4))
    return entry.header_offset + 30 + name + extra


@contextlib.contextmanager
def _opened(file: Path, key: str) -> Iterator[tuple[IO[bytes], zipfile.ZipInfo | None]]:
    """A `.npy` file, or the one of this name in an `.npz` and its entry there.

    Raises:
        ValueError: naming the file, for whatever goes wrong in reading it, here or in the body.
    """
    where = f'{file}, array {key!r}' if key else str(file)
    try:
        if key:
            with zipfile.ZipFile(file) as archive:
                held = archive.namelist()
                if f'{key}.npy' not in held:
                    raise ValueError(f'the file holds {", ".join(held) or "nothing"}; needed: image.npy, label.npy')
                entry = archive.getinfo(f'{key}.npy')
                with archive.open(entry) as stream:
                    yield stream, entry
        else:
            with open(file, 'rb') as stream:
                yield stream, None
    except zipfile.BadZipFile as error:
        raise ValueError(f'{file} is no whole .npz file (or a Git LFS pointer to one): {error}') from error
    except (ValueError, OverflowError, OSError, EOFError, RuntimeError, zlib.error) as error:
        objects = 'Object arrays' in str(error)  # numpy's words
        reason = 'it holds Python objects; save plain arrays of numbers' if objects else error
        raise ValueError(f'{where} cannot be read: {reason}') from error
