"""Images and labels as NumPy files: an `.npz` with `image` and `label`, or a pair of `.npy` files.

They are read whole (`load_arrays`) or mapped from the disk row by row (`map_arrays`). Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .memory import ImageData, number_classes

_SHAPES = '[N, H, W, 3], [N, 3, H, W] or, grey, [N, H, W], [N, H, W, 1], [N, 1, H, W]'
_UNREADABLE = (ValueError, OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
_SPLIT_NAMES = ('train', 'test', 'validation')


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
    if folder.stem in _SPLIT_NAMES and folder.stem != split:
        raise ValueError(f'{folder} is not the {split} split; name its folder with --data-dir, or type {folder.stem!r}')
    return (folder,)


def load_arrays(files: tuple[Path, ...]) -> ImageData:
    """Read images and labels into memory; `classes.txt` beside the file may name the classes, one a line.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    folder = files[0].resolve().parent
    if len(files) == 1:
        images, labels = (_read_member(files[0], key) for key in ('image', 'label'))
        name = folder.name if files[0].stem in _SPLIT_NAMES else files[0].stem
    else:
        images, labels = (_read_file(file) for file in files)
        name = folder.name
    layout = check_arrays(images, labels, str(files[0]))
    names = folder / 'classes.txt'
    classes = tuple(names.read_text(encoding='utf-8').split('\n')) if names.is_file() else ()
    classes = tuple(line.strip() for line in classes if line.strip()) or number_classes(labels, files[-1])
    pixels = channels_first(torch.from_numpy(images), layout).contiguous()
    return ImageData(pixels, torch.from_numpy(labels.astype(np.int64)), classes, name)


def map_arrays(files: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray, str]:
    """Images and labels as arrays that stay on the disk, and the images' layout: 'NHWC', 'NCHW' or 'NHW'.

    Raises:
        ValueError: naming the file and what is wrong with it; for a compressed `.npz`, with what unpacks it.
    """
    if len(files) == 1:
        images, labels = (_map_member(files[0], key) for key in ('image', 'label'))
    else:
        images, labels = (_map_file(file) for file in files)
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


def _read_file(file: Path) -> np.ndarray:
    """A `.npy` file, in memory."""
    try:
        with open(file, 'rb') as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except _UNREADABLE as error:
        raise _unreadable(str(file), error) from error


def _read_member(file: Path, key: str) -> np.ndarray:
    """One array of an `.npz` file, compressed or not, in memory."""
    with _open_zip(file) as archive:
        member = _member(file, archive, key)
        try:
            with archive.open(member) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        except _UNREADABLE as error:
            raise _unreadable(f'{file}, array {key!r}', error) from error


def _map_member(file: Path, key: str) -> np.ndarray:
    """One uncompressed array of an `.npz` file, mapped at its place inside the archive."""
    where = f'{file}, array {key!r}'
    with _open_zip(file) as archive:
        member = _member(file, archive, key)
        if member.compress_type != zipfile.ZIP_STORED:
            folder = file.with_suffix('')
            raise ValueError(
                f'{file} is compressed, so its rows cannot be read one by one; unpack it once with '
                f'`python -m zipfile -e {file} {folder}` and name the folder {folder} instead'
            )
        try:
            with archive.open(member) as stream:
                header = _read_header(stream)
        except _UNREADABLE as error:
            raise _unreadable(where, error) from error
    with open(file, 'rb') as raw:  # the local header repeats the name, and its extra field may differ in length
        raw.seek(member.header_offset + 26)
        name, extra = struct.unpack('<HH', raw.read(4))
    return _map(file, where, member.header_offset + 30 + name + extra, *header)


def _map_file(file: Path) -> np.ndarray:
    """A `.npy` file, mapped."""
    try:
        with open(file, 'rb') as stream:
            header = _read_header(stream)
    except _UNREADABLE as error:
        raise _unreadable(str(file), error) from error
    return _map(file, str(file), 0, *header)


def _read_header(stream: IO[bytes]) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Length of the header of a `.npy` file, and the shape, column order and type of the array."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f'version {version} of the format is not supported')
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns, dtype = read(stream)
    return stream.tell(), shape, columns, dtype


def _map(file: Path, where: str, start: int, header: int, shape: tuple[int, ...], columns: bool, dtype: Any) -> Any:
    """The array whose `.npy` file begins at byte `start`, read-only."""
    if dtype.hasobject:
        raise _unreadable(where, 'it holds Python objects')
    if columns and len(shape) > 1:
        raise ValueError(f'{where} is stored column by column; save numpy.ascontiguousarray(...) of it')
    count, start = math.prod(shape), start + header
    if start + count * dtype.itemsize > file.stat().st_size:
        raise _unreadable(where, f'it is cut off: {count} values of {dtype} end after the file')
    if not count:
        return np.empty(shape, dtype)
    with open(file, 'rb') as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, 'MADV_RANDOM') and len(mapped) > os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2:
        mapped.madvise(mmap.MADV_RANDOM)  # larger than the cache can be: what is read around a row is in vain
    return np.frombuffer(mapped, dtype, count, start).reshape(shape)


def _open_zip(file: Path) -> zipfile.ZipFile:
    """The archive that an `.npz` file is."""
    try:
        return zipfile.ZipFile(file)
    except _UNREADABLE as error:
        raise ValueError(f'{file} is no whole .npz file (or a Git LFS pointer to one): {error}') from error


def _member(file: Path, archive: zipfile.ZipFile, key: str) -> zipfile.ZipInfo:
    """The entry of one array."""
    try:
        return archive.getinfo(f'{key}.npy')
    except KeyError:
        held = ', '.join(name.removesuffix('.npy') for name in archive.namelist()) or 'nothing'
        raise ValueError(f'{file} has no array {key!r}; it holds {held}; needed: image, label') from None


def _unreadable(where: str, error: object) -> ValueError:
    """What to say of an array that cannot be read."""
    if 'object' in str(error).lower():
        error = 'it holds Python objects, which only unpickling could read; save plain arrays of numbers'
    return ValueError(f'{where} is no readable array: {error}')
