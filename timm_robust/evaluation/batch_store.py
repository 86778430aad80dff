"""What AutoAttack found, batch by batch, kept in a folder, so that a run that was killed goes on where it was.

What is read back is not believed: `load` checks its form, and the attack asks the model again about every image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files import atomic_file

_IDENTITY = 'identity.json'
_ROUNDING = 1e-4  # of the largest logit; that of fp32 is 1e-6


@dataclass(frozen=True, eq=False)
class Found:
    """What one attack found in one batch.

    Args:
        broken: places in the batch of the images that it broke, [M].
        x_adv: their adversarial images, [M, C, H, W].
        labels: the model's labels of these, [M].
        rejected: adversarial images that were claimed and not confirmed.
        messages: warnings.
        seconds: how long it took.
    """

    broken: torch.Tensor
    x_adv: torch.Tensor
    labels: torch.Tensor
    rejected: int
    messages: list[str]
    seconds: float


class BatchStore:
    """A folder with one small file a batch, each written whole or not at all.

    Args:
        folder: made if missing.
        facts: what identifies the measurement: a folder of another one is refused.
        logits: the model's for the first images, [N, classes] on the CPU. They tell apart what the facts do not: two
            models of the same weights and repr with another setting, such as a ViT's number of heads.

    Each file repeats the SHA-256 of identity.json, which holds both, so that where that is damaged or gone, and so
    written anew, no file of another measurement counts.

    Raises:
        ValueError: saying what differs from the measurement that the folder belongs to.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any], logits: torch.Tensor) -> None:
        """Claim the folder, or check that it is this measurement's."""
        self.folder, text = Path(folder), json.dumps(facts | {'logits': logits.tolist()}).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _IDENTITY
        try:
            kept = path.read_bytes()
            theirs = json.loads(kept)
        except (FileNotFoundError, ValueError, RecursionError):
            theirs = None
        if not isinstance(theirs, dict):
            with atomic_file(path) as file:
                file.write(text)
            self.measurement = hashlib.sha256(text).hexdigest()
            return
        self.measurement = hashlib.sha256(kept).hexdigest()  # of their logits, which rounding may tell from these
        differ = [f'{key} {theirs.get(key)}, now {value}' for key, value in facts.items() if theirs.get(key) != value]
        if 'logits' not in theirs:
            differ.append('an older version wrote it, without logits to know the model by')
        elif not _alike(logits, theirs['logits']):
            differ.append(
                'the model has other logits now (a setting that its weights do not show, or a random forward pass)'
            )
        if differ:
            raise ValueError(
                f'{self.folder} belongs to another measurement: {"; ".join(differ)}; name another folder, or delete it'
            )

    def load(self, attack: str, number: int, images: torch.Tensor, shape: Sequence[int]) -> Found | None:
        """What the attack found in this batch; None if it did not get there.

        Args:
            attack: its name.
            number: of the batch.
            images: the places of its images in the data, [N].
            shape: of an image, [C, H, W].

        Raises:
            ValueError: for a file that is damaged, or of another measurement, by name.
        """
        path = self._path(attack, number)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                keys = ('images', 'broken', 'x_adv', 'labels')
                of, broken, x_adv, labels = (torch.from_numpy(arrays[key]) for key in keys)
                about = json.loads(str(arrays['about']))
            measurement = about.pop('measurement', None)
            found = Found(broken, x_adv, labels, **about)
            _check(found, len(images), shape)
        except Exception as error:  # damage ends in errors of NumPy, zipfile, zlib, json and torch
            raise ValueError(f'{path} is damaged ({" ".join(str(error).split())[:200]})') from None
        if measurement != self.measurement or not torch.equal(of, images.cpu()):
            raise ValueError(f'{path} is of another measurement')
        return found

    def save(self, attack: str, number: int, images: torch.Tensor, found: Found) -> None:
        """Keep what the attack found in this batch; images are its places in the data."""
        tensors = {'images': images, 'broken': found.broken, 'x_adv': found.x_adv, 'labels': found.labels}
        arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in tensors.items()}
        about: dict[str, Any] = {key: getattr(found, key) for key in ('rejected', 'messages', 'seconds')}
        arrays['about'] = np.array(json.dumps(about | {'measurement': self.measurement}))
        with atomic_file(self._path(attack, number)) as file:
            np.savez(file, **arrays)

    def _path(self, attack: str, number: int) -> Path:
        return self.folder / f'{attack}-{number:05d}.npz'


def _alike(logits: torch.Tensor, kept: Any) -> bool:
    """Whether the logits that a folder holds are these, but for rounding."""
    try:
        theirs = torch.tensor(kept, dtype=logits.dtype)
    except (TypeError, ValueError, RuntimeError):  # they are no numbers
        return False
    tolerance = _ROUNDING * logits.nan_to_num(0, 0, 0).abs().max().item()
    return logits.shape == theirs.shape and torch.allclose(logits, theirs, 0, tolerance, equal_nan=True)


def _check(found: Found, size: int, shape: Sequence[int]) -> None:
    """Refuse what no attack on a batch of this size can have found."""
    count = len(found.broken)
    wanted = {'broken': ([count], torch.int64), 'x_adv': ([count, *shape], torch.float32)}
    wanted['labels'] = ([count], torch.int64)
    for name, (dimensions, dtype) in wanted.items():
        tensor = getattr(found, name)
        if list(tensor.shape) != dimensions or tensor.dtype != dtype:
            raise ValueError(f'{name} is {list(tensor.shape)} of {tensor.dtype}, not {dimensions} of {dtype}')
    if (count and not 0 <= found.broken.min() <= found.broken.max() < size) or len(set(found.broken.tolist())) < count:
        raise ValueError(f'the places of broken images are not different ones of 0..{size - 1}')
    if type(found.rejected) is not int or not 0 <= found.rejected <= size:
        raise ValueError(f'rejected is {found.rejected!r}')
    if type(found.seconds) is not float or not 0 <= found.seconds < math.inf:
        raise ValueError(f'seconds is {found.seconds!r}')
    if not isinstance(found.messages, list) or not all(isinstance(text, str) for text in found.messages):
        raise ValueError('messages is no list of texts')


def identity(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, str]:
    """SHA-256 of weights, images and labels, and the versions of what attacks them."""
    hashes = {'weights': hashlib.sha256(), 'images': hashlib.sha256()}
    hashes['weights'].update(repr(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # mean and std too
        hashes['weights'].update(name.encode())
        hashes['weights'].update(_bytes(tensor))
    for part in (*x.split(1000), y):
        hashes['images'].update(_bytes(part))
    versions = {package: metadata.version(package) for package in ('torch', 'pyautoattack')}
    return {key: value.hexdigest() for key, value in hashes.items()} | versions


def _bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's contents, whatever its layout and type."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
