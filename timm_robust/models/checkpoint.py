"""Checkpoints and weights, read without running code.

A training checkpoint is a dict of plain values: 'arch', 'model_kwargs' and 'num_classes' say which model it is,
'state_dict' and 'state_dict_ema' hold weights, 'step' counts. Files end in .pth.tar, as timm's do.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

BEST, LAST = 'model_best.pth.tar', 'last.pth.tar'
SUFFIXES = ('.pth.tar', '.pth', '.pt', '.safetensors')
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; pickled code is refused and never runs.

    Raises:
        FileNotFoundError: if there is no such file; it lists the checkpoints in the folder.
        ValueError: if it is damaged (naming the newest other checkpoint), holds code, is a web page, or is no dict.
    """
    path = Path(path)
    _check_file(path)
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare the check sums
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise zipfile.BadZipFile(f'{broken} does not match its check sum')
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py keeps plain values in one
            state = torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a truncated file may end in RuntimeError, OSError or EOFError
        code = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise ValueError(_refusal(path, code[1])) from None
        raise ValueError(_damage(path, str(error).partition('\n')[0] or 'it ends too early')) from error
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds a {type(state).__name__}, not a dict; a checkpoint is a dict of plain values')
    if isinstance(state.get('args'), argparse.Namespace):
        state['args'] = vars(state['args'])
    return state


def _check_file(path: Path) -> None:
    """Refuse what is missing, and the files that a wrong download leaves."""
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'does not exist'
        folder = path if path.is_dir() else path.parent
        names = sorted(file.name for file in folder.glob('[!.]*') if file.name.endswith(SUFFIXES) and file.is_file())
        raise FileNotFoundError(f'checkpoint {path} {what}; {folder} holds {", ".join(names) or "no checkpoint"}')
    with open(path, 'rb') as file:
        head = file.read(512)
    if head.lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml')):
        raise ValueError(f'{path} is a web page, not a checkpoint; use the link that downloads the file itself')
    if head.startswith(b'version https://git-lfs'):
        raise ValueError(f'{path} is a Git LFS pointer, not the checkpoint; type: git lfs pull')
    safetensors_header = head[8:9] == b'{'  # after eight bytes of length, which may begin as a pickle does
    if head[:1] == b'\x80' and head[1:2] >= b'\x03' and not safetensors_header:  # torch.save writes protocol 2
        raise ValueError(_refusal(path, 'a bare pickle'))


def _refusal(path: Path, what: str) -> str:
    """The message for a pickle with code."""
    return f'{path} is not a plain state: it holds Python objects ({what}) and could run code; ask for its state_dict'


def _damage(path: Path, reason: str) -> str:
    """The message for a damaged file, with the newest other checkpoint beside it."""
    files = [file for file in path.parent.glob('[!.]*.pth.tar') if file.is_file()]
    others = [file for file in files if not file.samefile(path)]  # a second name of the file is damaged too
    newest = max(others, key=lambda file: file.stat().st_mtime, default=None)
    mend = f'the newest other checkpoint there is {newest}' if newest else 'its folder holds no other checkpoint'
    return f'{path} is damaged or no checkpoint: {reason}; {mend}'


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a .safetensors file, a training checkpoint (averaged, if it has those), or a plain state dict.

    They are on the CPU. The prefixes of wrappers, 'module.' (DataParallel) and '_orig_mod.' (torch.compile), are taken
    off.

    Raises:
        FileNotFoundError: as load_checkpoint.
        ValueError: as load_checkpoint, and for a weight that is not finite or of another kind of number, naming it.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        return weights_of(load_checkpoint(path), path)
    _check_file(path)
    try:
        weights = safetensors.torch.load_file(path)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(_damage(path, str(error))) from error
    return weights_of(weights, path)


def weights_of(state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The weights in what was read from a file, the averaged ones if there are any."""
    found = [state[name] for name in ('state_dict_ema', 'state_dict') if state.get(name) is not None]
    raw = found[0] if found else state
    if not raw or not isinstance(raw, dict) or not all(isinstance(value, torch.Tensor) for value in raw.values()):
        raise ValueError(f"{path} holds no weights: neither 'state_dict' nor tensors, but {', '.join(map(str, state))}")
    weights = {}
    for name, value in raw.items():
        if value.layout is not torch.strided:
            raise ValueError(f'{path}: {name} is a sparse tensor; save it as {name}.to_dense()')
        if value.dtype not in _DTYPES:
            allowed = ', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)
            raise ValueError(f'{path}: {name} is {str(value.dtype).removeprefix("torch.")}; allowed: {allowed}')
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise ValueError(f'{path}: {count} of {value.numel()} values of {name} are not finite; training diverged')
        weights[re.sub(r'^((module|_orig_mod)\.)+', '', name)] = value
    return weights
