"""Which images a data set holds, in a few characters, cheap enough for every start of a run."""

from __future__ import annotations

import contextlib
import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from .extra import ExtraImages
from .memory import ImageData
from .stream_data import StreamData

HASHED = 50_000
"""Images hashed at most, evenly spaced; labels are all hashed."""
_SIZED = 1_000  # files whose size is asked for: on a network disk that may take a millisecond each


def fingerprint(data: Any) -> str:
    """Number of images and a hash: '49000 images #3f2a9c01d4e5b687'; equal for equal data, wherever it lies.

    Hashed are labels and pixels of data in memory and of generated images, labels, names and sizes of images in files,
    names and sizes of the files of a web data set. Of other streams the number alone is known.
    """
    digest = hashlib.sha256()
    if isinstance(data, StreamData):
        count, known = _hash_stream(data, digest)
    else:
        count, known = len(data), True
        rows = torch.arange(0, count, math.ceil(count / HASHED))
        if isinstance(data, ExtraImages):
            images, _ = data[rows]
            labels = data.labels
        else:
            assert isinstance(data, ImageData)
            images, labels = data.images[rows.to(data.device)], data.labels.cpu().numpy()
        digest.update(labels.astype('<i8').data)
        digest.update(images.contiguous().cpu().numpy().data)
    return f'{count} images' + (f' #{digest.hexdigest()[:16]}' if known else '')


def _hash_stream(data: StreamData, digest: Any) -> tuple[int, bool]:
    """Put into the digest what is known without opening an image; returns the number, and whether anything is known."""
    reader: Any = getattr(data.dataset, 'reader', data.dataset)
    info = getattr(reader, 'split_info', None)
    if data.iterable:
        files = [str(name) for name in getattr(info, 'filenames', ())]
        sizes = _sizes(Path(reader.root), files) if reader.root else []
        digest.update('\n'.join([*files, *sizes]).encode() if files else b'')
        return getattr(info, 'num_samples', None) or len(data), bool(files)  # len is rounded to processes and workers
    known = False
    with contextlib.suppress(ValueError):  # the reader cannot tell them
        digest.update(data.labels.numpy().astype('<i8').data)
        known = True
    if hasattr(reader, 'samples') and hasattr(reader, 'root'):  # folders and tar files of images
        entries = [reader.samples[row][0] for row in data.rows.tolist()]  # paths, or entries of tar files
        names = [str(getattr(entry, 'name', entry)).removeprefix(str(reader.root)).lstrip('/') for entry in entries]
        sizes = [str(entry.size) for entry in entries if hasattr(entry, 'size')] or _sizes(Path(reader.root), names)
        digest.update('\n'.join([*names, *sizes]).encode(errors='surrogateescape'))  # a name may be no text
        known = True
    return len(data), known


def _sizes(root: Path, names: list[str]) -> list[str]:
    """Bytes of some of these files; nothing for one that is no local file."""
    paths = [root / name for name in names[:: max(math.ceil(len(names) / _SIZED), 1)]]
    return [str(path.stat().st_size) for path in paths if path.is_file()]
