"""What AutoAttack found, batch by batch, kept in a folder, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .results import atomic_file

_IDENTITY = 'identity.json'


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

    Raises:
        ValueError: saying what differs from the measurement that the folder belongs to.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        """Claim the folder, or check that it is this measurement's."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _IDENTITY
        if not path.exists():
            with atomic_file(path) as file:
                file.write(json.dumps(facts, indent=2).encode())
            return
        try:
            theirs = json.loads(path.read_text(encoding='utf-8'))
        except ValueError:
            raise ValueError(f'{path} is damaged; delete the folder {self.folder}, or name another one') from None
        differ = [f'{key} {theirs.get(key)}, now {value}' for key, value in facts.items() if theirs.get(key) != value]
        if differ:
            raise ValueError(
                f'{self.folder} belongs to another measurement: {"; ".join(differ)}; name another folder, or delete it'
            )

    def load(self, attack: str, number: int, images: torch.Tensor) -> Found | None:
        """What the attack found in this batch; None if it did not get there.

        Raises:
            ValueError: for a damaged file, by name.
        """
        path = self._path(attack, number)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                keys = ('images', 'broken', 'x_adv', 'labels')
                of, broken, x_adv, labels = (torch.from_numpy(arrays[key]) for key in keys)
                found = Found(broken, x_adv, labels, **json.loads(str(arrays['about'])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} is damaged ({error}); delete it, and this batch is run again') from None
        if not torch.equal(of, images.cpu()):
            raise ValueError(f'{path} is of other images than this batch; delete the folder {self.folder}')
        return found

    def save(self, attack: str, number: int, images: torch.Tensor, found: Found) -> None:
        """Keep what the attack found in this batch; images are its places in the data."""
        tensors = {'images': images, 'broken': found.broken, 'x_adv': found.x_adv, 'labels': found.labels}
        arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in tensors.items()}
        about = {key: getattr(found, key) for key in ('rejected', 'messages', 'seconds')}
        arrays['about'] = np.array(json.dumps(about))
        with atomic_file(self._path(attack, number)) as file:
            np.savez(file, **arrays)

    def _path(self, attack: str, number: int) -> Path:
        return self.folder / f'{attack}-{number:05d}.npz'


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
