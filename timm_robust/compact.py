"""A training state in little space, to carry a run from machine to machine: matrices in bf16, in files of limited size.

Weights, their average and the momentum of a WRN-28-10 come to 219 MB in 17 files instead of 438 MB in one. Lost is the
lower half of each matrix's mantissa: values move by at most 1 part in 256. Vectors (batch norm, biases, alpha, beta),
counters, history and the clock are kept as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from .checkpoint import load_checkpoint, save_checkpoint
from .results import atomic_folder

PART_BYTES = 15_000_000
_PLAIN = 'state.pth.tar'
_MARK = '__tensor__'


def save_compact(folder: str | Path, state: dict[str, Any], part_bytes: int = PART_BYTES) -> list[Path]:
    """Write a checkpoint's state as a folder of small files: the old folder, or the whole new one.

    Args:
        folder: takes the place of one of that name.
        state: as save_checkpoint takes it.
        part_bytes: largest size of a file of tensors; a tensor that is larger gets a file of its own.

    Returns:
        The files.
    """
    tensors: list[torch.Tensor] = []
    plain = _take(state, tensors)
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for index, tensor in enumerate(tensors):
        if parts[-1] and size + tensor.nbytes > part_bytes:
            parts.append({})
            size = 0
        parts[-1][str(index)] = tensor
        size += tensor.nbytes
    with atomic_folder(folder) as new:
        save_checkpoint(new / _PLAIN, {'parts': len(parts), 'step': state.get('step'), 'state': plain})
        for number, part in enumerate(parts):
            try:
                safetensors.torch.save_file(part, new / _part(number), {'step': str(state.get('step'))})
            except Exception as error:  # safetensors has its own kind for a full disk
                raise OSError(f'cannot write {folder}: {error}') from error
    return sorted(Path(folder).iterdir())


def load_compact(folder: str | Path) -> dict[str, Any]:
    """The state that save_compact wrote, matrices back in their own type.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: if a file is damaged, or from another moment of the run.
    """
    folder = Path(folder)
    record = load_checkpoint(folder / _PLAIN)
    tensors: dict[str, torch.Tensor] = {}
    for number in range(record['parts']):
        path = folder / _part(number)
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing; the state is {record["parts"]} such files and {_PLAIN}')
        try:
            with safetensors.safe_open(path, 'pt') as file:
                step = (file.metadata() or {}).get('step')
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f'{path} is damaged: {error}; copy it again') from error
        if step != str(record['step']):
            raise ValueError(f'{path} is of step {step}, the state of step {record["step"]}; copy the folder again')
    return dict(_give(record['state'], tensors))


def _part(number: int) -> str:
    return f'part-{number:05d}.safetensors'


def _take(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value with each tensor replaced by a mark of its place in the list."""
    if isinstance(value, torch.Tensor):
        half = value.is_floating_point() and value.ndim > 1
        tensors.append((value.to(torch.bfloat16) if half else value.clone()).cpu().contiguous())
        return (_MARK, len(tensors) - 1, value.dtype)
    if isinstance(value, dict):
        return {key: _take(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, tensors) for item in value)
    return value


def _give(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The opposite of _take."""
    if isinstance(value, tuple) and value[:1] == (_MARK,):
        return tensors[str(value[1])].to(value[2])
    if isinstance(value, dict):
        return {key: _give(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_give(item, tensors) for item in value)
    return value
