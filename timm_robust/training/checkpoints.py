"""The files of a run: written whole or not at all, found again, set aside and pruned."""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_file, link_file, new_folder, sync_folder
from ..models import BEST, LAST, load_checkpoint

_logger = logging.getLogger(__name__)
_NUMBERED = re.compile(r'checkpoint-(\d+)\.pth\.tar')
_SCALARS = (int, float, bool, complex, str, bytes, bytearray, type(None), torch.dtype, torch.device)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)
_SEQUENCES = (list, tuple, set, torch.Size)


def save_checkpoint(path: str | Path, state: dict[str, Any], also: Sequence[str] = ()) -> None:
    """Write a checkpoint atomically: `path` holds the old one or the new one, whole, even if power fails meanwhile.

    Args:
        path: the file; its folder is made if missing.
        state: tensors and plain values in dicts and lists, so that load_checkpoint can read it without running code.
        also: further names in that folder for the same file, given in this order after `path`; see link_file.

    Raises:
        TypeError: naming the entry that is no plain value.
        OSError: if the disk refuses (full, read-only), with the bytes needed. No temporary file is left behind.
    """
    path, size = Path(path), _count_bytes(state, 'state')
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, size) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a failed write
            raise OSError(str(error)) from error
    for name in also:
        link_file(path, path.with_name(name))
    if also:
        sync_folder(path.parent)


def snapshot(value: Any) -> Any:
    """A copy of a state on the CPU, for a thread to write: training changes the tensors meanwhile."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with the attributes that a state_dict has
        for key, item in value.items():
            copied[key] = snapshot(item)
        return copied
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def _count_bytes(value: Any, where: str) -> int:
    """Bytes of the tensors inside; refuses what torch.load would refuse to read back."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if type(value) in _SCALARS:
        return 0
    if type(value) in _MAPPINGS:
        return sum(_count_bytes(key, where) + _count_bytes(item, f'{where}[{key!r}]') for key, item in value.items())
    if type(value) in _SEQUENCES:
        return sum(_count_bytes(item, f'{where}[{index}]') for index, item in enumerate(value))
    raise TypeError(
        f'{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors, numbers, text, '
        'dicts and lists only: write dataclasses.asdict(x), str(x) or torch.as_tensor(x)'
    )


def latest_checkpoint(folder: str | Path, before: float = math.inf) -> Path | None:
    """The valid checkpoint with the largest 'step' among last.pth.tar and checkpoint-*.pth.tar; None if there is none.

    Damaged files are skipped with a warning in the log.

    Args:
        folder: of a run.
        before: only those of earlier steps count.
    """
    steps: list[tuple[int, bool, Path]] = []
    for path in Path(folder).glob('*.pth.tar'):
        if path.name == LAST or path.name.startswith('checkpoint-'):
            try:
                step = read_step(path)
                if step < before:
                    steps.append((step, path.name == LAST, path))
            except Exception as error:
                _logger.warning('Skipping %s: %s', path, str(error).partition('\n')[0])
    for _, _, path in sorted(steps, reverse=True):
        try:
            load_checkpoint(path)
            return path
        except (ValueError, OSError) as error:
            _logger.warning('Skipping %s', error)
    return None


def read_step(path: str | Path) -> int:
    """The step that a checkpoint was written at; its tensors are not read."""
    return int(torch.load(path, map_location='cpu', weights_only=True, mmap=True)['step'])


def later_checkpoints(folder: str | Path, step: int) -> list[Path]:
    """The checkpoints in a folder that were written after this step, model_best.pth.tar among them."""
    found = []
    for path in sorted(Path(folder).glob('*.pth.tar')):
        with contextlib.suppress(Exception):  # damaged: it stays
            if read_step(path) > step:
                found.append(path)
    return found


def set_aside(folder: Path, step: int, last: Path | None, best: Path | None) -> Path | None:
    """Move what a run wrote after this step into a folder inside its own, so that none of it is taken up again.

    Killed at any moment, the newest checkpoint is that of one course or of the other.

    Args:
        folder: of the run.
        step: that the run went back to.
        last: the checkpoint of that step, which last.pth.tar names from now on.
        best: that of the best epoch until then, which model_best.pth.tar names from now on.

    Returns:
        Where they are now; None if there were none.
    """
    later = later_checkpoints(folder, step)
    if not later:
        return None
    aside = new_folder(folder / f'abandoned-after-step-{step}')
    successors = {LAST: last, BEST: best}
    for path in sorted(later, key=lambda path: (path.name == BEST, path.name == LAST)):
        successor = successors.get(path.name)
        if successor is None:
            os.replace(path, aside / path.name)
        else:
            link_file(path, aside / path.name)
            link_file(successor, path)
    return aside


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all checkpoint-<number>.pth.tar but those with the `keep` largest numbers; every other name stays."""
    matches = [match for file in Path(folder).iterdir() if (match := _NUMBERED.fullmatch(file.name))]
    matches.sort(key=lambda match: int(match[1]), reverse=True)
    for match in matches[keep:]:
        (Path(folder) / match[0]).unlink(missing_ok=True)
