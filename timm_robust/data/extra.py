"""Generated images beside a data set: millions of rows that stay on the disk."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .arrays import channels_first, find_pair, map_arrays

_IMAGES = re.compile(r'(.*_)?images?\.npy')


class ExtraImages:
    """Images and labels out of a memory-mapped file: 20 million rows take no memory but what the system caches.

    Args:
        path: an uncompressed `.npz` with `image` and `label` (such as those of Wang et al., 2023, "Better Diffusion
            Models Further Improve Adversarial Training"); or the `x_image.npy` of a pair, with `x_label.npy` beside
            it; or a folder that holds one of either. Images are uint8 of [N, H, W, 3], [N, 3, H, W] or, grey,
            [N, H, W].
        num_classes: labels lie in 0..num_classes - 1.

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ValueError: for arrays of the wrong type, shape or length, labels out of range, and a compressed `.npz`.
    """

    def __init__(self, path: str | Path, num_classes: int) -> None:
        """Map the file and check everything but the pixels."""
        files = _find(Path(path))
        self._images, self.labels, self._layout = map_arrays(files)
        self.num_classes, self.name = num_classes, str(files[0])
        if self.labels.min() < 0 or self.labels.max() >= num_classes:
            row = int(((self.labels < 0) | (self.labels >= num_classes)).argmax())
            raise ValueError(
                f'{files[-1]}, row {row}: label {self.labels[row]} is not in 0..{num_classes - 1}, the classes of the '
                'data; is it unlabelled, or of another data set?'
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (3, H, W)."""
        return tuple(self[torch.zeros(1, dtype=torch.int64)][0].shape[1:])

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The images [B, 3, H, W] of uint8 (a view of rows as stored) and labels [B] of int64 with these indices."""
        rows = indices.numpy()
        images, labels = torch.from_numpy(self._images[rows]), torch.from_numpy(self.labels[rows].astype('int64'))
        return channels_first(images, self._layout), labels


def _find(path: Path) -> tuple[Path, ...]:
    """The `.npz` file, or the files of images and of labels, that a path means."""
    if path.is_dir():
        firsts = [file for file in sorted(path.iterdir()) if file.suffix == '.npz' or _IMAGES.fullmatch(file.name)]
        if len(firsts) != 1:
            held = ', '.join(file.name for file in firsts) or 'neither'
            error = ValueError if firsts else FileNotFoundError
            raise error(f'folder {path} must hold one .npz or one pair x_image.npy, x_label.npy; it holds {held}')
        return _find(firsts[0])
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; name an .npz file, the x_image.npy of a pair, or their folder')
    if path.suffix == '.npz':
        return (path,)
    match = _IMAGES.fullmatch(path.name)
    if match is None:
        raise ValueError(f'{path} is neither an .npz file nor the images of a pair, such as x_image.npy')
    prefix = match[1] or ''
    pair = find_pair(path.parent, prefix)
    if pair is None:
        raise FileNotFoundError(f'{path} needs its labels beside it, in {prefix}label.npy or {prefix}labels.npy')
    return path, pair[1]
