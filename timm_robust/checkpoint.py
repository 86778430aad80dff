"""Checkpoints: written whole or not at all, read without running code, and turned into models.

A training checkpoint is a dict of plain values: 'arch', 'model_kwargs' and 'num_classes' say which model it is,
'state_dict' and 'state_dict_ema' hold weights, 'step' counts. Files end in .pth.tar, as timm's do.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import difflib
import logging
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import timm.models
import torch
from torch import nn

from .download import fetch_folder
from .files import link_file, new_folder, read_yaml, sync_folder
from .model_config import (
    check_model_kwargs,
    find_weights,
    forget_weights,
    make_model,
    note_data,
    read_config,
    timm_settings,
)

BEST, LAST = 'model_best.pth.tar', 'last.pth.tar'
HYPER_PARAMETERS = 'train_hparams.yaml'
_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.safetensors')
_HUB, _LOCAL = ('hf-hub:', 'hf_hub:'), 'local-dir:'  # as timm.create_model spells them
_NUMBERED = re.compile(r'checkpoint-(\d+)\.pth\.tar')
_SCALARS = (int, float, bool, complex, str, bytes, bytearray, type(None), torch.dtype, torch.device)
_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COUNTERS = (torch.int64, torch.int32, torch.bool)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)
_SEQUENCES = (list, tuple, set, torch.Size)
_SAFE: Any = getattr(torch.serialization, 'safe_globals', lambda _: contextlib.nullcontext())  # torch 2.5
_logger = logging.getLogger(__name__)


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
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        for name in also:
            link_file(path, path.with_name(name))
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        free = ''
        with contextlib.suppress(OSError):
            free = f', {shutil.disk_usage(path.parent).free:,} are free'
        raise OSError(f'cannot write {path}: {error}; it needs about {size:,} bytes{free}') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        with _SAFE([argparse.Namespace]):  # timm's train.py keeps its args in one: names and plain values
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
        names = ', '.join(file.name for file in _checkpoints(folder)) or 'no checkpoint'
        raise FileNotFoundError(f'checkpoint {path} {what}; {folder} holds {names}')
    with open(path, 'rb') as file:
        head = file.read(512)
    if head.lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml')):
        raise ValueError(f'{path} is a web page, not a checkpoint; use the link that downloads the file itself')
    if head.startswith(b'version https://git-lfs'):
        raise ValueError(f'{path} is a Git LFS pointer, not the checkpoint; type: git lfs pull')
    if head[:1] == b'\x80' and head[1:2] >= b'\x03':  # torch.save writes protocol 2
        raise ValueError(_refusal(path, 'a bare pickle'))


def _checkpoints(folder: Path) -> list[Path]:
    """The files of a folder that are named as checkpoints."""
    return sorted(file for file in folder.glob('[!.]*') if file.name.endswith(_SUFFIXES) and file.is_file())


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


def read_weights(path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The weights in a .safetensors file, a training checkpoint, or a plain state dict, on the CPU.

    The prefixes of wrappers, 'module.' (DataParallel) and '_orig_mod.' (torch.compile), are taken off.

    Args:
        path: the file.
        use_ema: prefer the averaged weights, where the checkpoint has them.

    Raises:
        FileNotFoundError: as load_checkpoint.
        ValueError: as load_checkpoint, and for a weight that is not finite or of another kind of number, naming it.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        return _weights_of(load_checkpoint(path), path, use_ema)
    _check_file(path)
    try:
        weights = safetensors.torch.load_file(path)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(_damage(path, str(error))) from error
    return _weights_of(weights, path, use_ema)


def _weights_of(state: dict[str, Any], path: Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The weights in what was read from a file."""
    found = [state[key] for key in ('state_dict_ema', 'state_dict')[not use_ema :] if state.get(key) is not None]
    raw = found[0] if found else state
    if not raw or not isinstance(raw, dict) or not all(isinstance(value, torch.Tensor) for value in raw.values()):
        raise ValueError(f"{path} holds no weights: neither 'state_dict' nor tensors, but {', '.join(map(str, state))}")
    weights = {}
    for name, value in raw.items():
        if value.dtype not in (*_WEIGHTS, *_COUNTERS):
            allowed = ', '.join(str(dtype).removeprefix('torch.') for dtype in (*_WEIGHTS, *_COUNTERS))
            raise ValueError(f'{path}: {name} is {str(value.dtype).removeprefix("torch.")}; allowed: {allowed}')
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise ValueError(f'{path}: {count} of {value.numel()} values of {name} are not finite; training diverged')
        weights[re.sub(r'^((module|_orig_mod)\.)+', '', name)] = value
    return weights


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
            found += [path] * (read_step(path) > step)
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


def prune_checkpoints(folder: str | Path, keep: int) -> list[Path]:
    """Delete all checkpoint-<number>.pth.tar but those with the `keep` largest numbers.

    Returns:
        The files deleted; last.pth.tar, model_best.pth.tar and every other name stay.
    """
    if keep < 0:
        raise ValueError(f'keep {keep} must be >= 0')
    matches = [match for file in Path(folder).iterdir() if (match := _NUMBERED.fullmatch(file.name))]
    matches.sort(key=lambda match: int(match[1]), reverse=True)
    removed = [Path(folder) / match[0] for match in matches[keep:]]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def load_model(
    spec: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    device: torch.device | str = 'cpu',
    **model_kwargs: Any,
) -> nn.Module:
    """The model that a name or a path stands for, in eval mode.

    Args:
        spec: one of
            a timm name: 'resnet18' (random weights), 'resnet18.a1_in1k' (pretrained), 'hf-hub:owner/name';
            a training checkpoint, ours or of timm's train.py, with the averaged weights if it has any;
            a .safetensors file beside its config.json;
            a folder with a config.json ('local-dir:' may stand before it), or a training folder (its
            model_best.pth.tar).
            A name of the registry wins over a folder of that name; write './name' for the folder. Weights of files,
            folders and 'hf-hub:' are read here, not by timm: no code in them runs.
        checkpoint: file of weights for a timm name, of timm's train.py or its clean_checkpoint.py.
        num_classes: for a new head on a timm name or a config.json; None: as many as the weights have.
        device: where the model goes.
        model_kwargs: further arguments of timm.create_model; pretrained=True or False overrides the tag.

    Raises:
        FileNotFoundError: if a path is missing, with what its folder holds.
        ValueError: for an unknown name, with the nearest ones, for weights that do not fit, and for a file that names
            other arguments than those of a model's constructor.
    """
    path, name = Path(spec), str(spec)
    if num_classes is not None:
        model_kwargs['num_classes'] = num_classes
    if checkpoint is not None:
        if not timm.is_model(name):
            raise ValueError(f'a checkpoint goes with the name of its model; {_unknown(name)}')
        model = _from_file(Path(checkpoint), model_kwargs, name)
    elif name.startswith(_HUB):
        model = _from_config(fetch_folder(name.partition(':')[2]), {'pretrained': True, **model_kwargs})
    elif name.startswith(_LOCAL):
        model = _from_config(Path(name.removeprefix(_LOCAL)), {'pretrained': True, **model_kwargs})
    elif path.is_file() or name.endswith(_SUFFIXES):
        model = _from_file(path, model_kwargs)
    elif isinstance(spec, str) and timm.is_model(name):
        model = _from_registry(name, model_kwargs)
    elif path.is_dir() and (path / 'config.json').is_file():
        model = _from_config(path, {'pretrained': True, **model_kwargs})
    elif path.is_dir():
        model = _from_file(path / BEST, model_kwargs)
    else:
        raise ValueError(_unknown(name))
    return model.to(device).eval()


def _unknown(name: str) -> str:
    """The message for a name that is nothing."""
    near = difflib.get_close_matches(name.partition('.')[0], timm.list_models(), 3)
    hint = f'; near it are {", ".join(near)}' if near else ''
    return f'{name!r} is no file, no folder and no model in the timm registry{hint}. `import timm_robust` adds ours'


def _from_registry(name: str, model_kwargs: dict[str, Any]) -> nn.Module:
    """A model by its timm name; a tag asks for the weights."""
    arch, tag = timm.models.split_model_name_tag(name)
    tags = [key.partition('.')[2] for key in timm.models.get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        raise ValueError(f'{arch} has no weights {tag!r}; it has {", ".join(tags) or "none"}')
    return make_model(name, model_kwargs, pretrained=bool(tag))


def _from_file(path: Path, model_kwargs: dict[str, Any], arch: str | None = None) -> nn.Module:
    """A model from its checkpoint, which may say its arch, or from .safetensors beside a config.json."""
    model_kwargs = {**model_kwargs, 'pretrained': False}
    if path.suffix == '.safetensors' and arch is None:
        weights = read_weights(path)
        model = _from_config(path.parent, model_kwargs)
    else:
        state: dict[str, Any] = read_weights(path) if path.suffix == '.safetensors' else load_checkpoint(path)
        weights = _weights_of(state, path)
        name, call = (
            arch or state.get('arch'),
            f"load_model(NAME, checkpoint='{path}'), in the shell: NAME --checkpoint",
        )
        if not isinstance(name, str):
            raise ValueError(f"{path} does not say which model it is: it has no 'arch' entry; write {call} {path}")
        if not timm.is_model(name):
            raise ValueError(f'{path}: {_unknown(name)}; to name its model, write {call} {path}')
        saved = state.get('model_kwargs') or {}
        check_model_kwargs(saved, f'model_kwargs of {path}')
        args = state.get('args') or {}
        saved = {**timm_settings(args, f'args of {path}'), **saved}
        if state.get('num_classes') is not None:
            saved['num_classes'] = state['num_classes']
        try:
            model = timm.create_model(name, **{**saved, **model_kwargs})
        except (ValueError, RuntimeError, AssertionError, AttributeError, TypeError, KeyError, IndexError) as error:
            given = model_kwargs if arch else f'the model_kwargs of {path}'
            raise ValueError(f'cannot make {name} with {given}: {_reason(error)}') from error
        if arch or args:
            chans = {**saved, **model_kwargs}.get('in_chans', 3)
            note_data(model, args, model_kwargs.get('pretrained_cfg_overlay') or {}, chans)
        _note_size(model, (state.get('recipe') or {}).get('img_size'))
        _note_classes(model, state.get('classes'))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f'the weights in {path} do not fit the model: {" ".join(str(error).split())[:500]}') from None
    _check_kinds(model, weights, path)
    return model


def _from_config(folder: Path, model_kwargs: dict[str, Any]) -> nn.Module:
    """A model from the config.json that timm stages for the Hub; its weights, if wanted, through read_weights."""
    config, weights = folder / 'config.json', {}
    if not config.is_file():
        raise FileNotFoundError(f'{config} is missing; it says which model the weights are for')
    if model_kwargs.get('pretrained'):
        file = find_weights(folder)
        weights = read_weights(file)
    try:
        arch, saved = read_config(folder)
        if weights:
            saved['pretrained_cfg']['state_dict'] = weights
        model = forget_weights(timm.create_model(arch, **{**saved, **model_kwargs}))
    except (ValueError, KeyError, RuntimeError, AssertionError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f'cannot make a model from {config}: {_reason(error)}') from error  # timm does not check it
    if weights:
        _check_kinds(model, weights, file)
    if (folder / HYPER_PARAMETERS).is_file():
        _note_size(model, read_hyper_parameters(folder).get('img_size'))
    return model


def _reason(error: Exception) -> str:
    """What another library's error says, on one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:500]


def _check_kinds(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse counts where the model has weights: load_state_dict would convert them without a word."""
    for name, own in model.state_dict().items():
        if name in weights and weights[name].is_floating_point() != own.is_floating_point():
            raise ValueError(f'{path}: {name} is {weights[name].dtype}, the model has {own.dtype} there')


def read_hyper_parameters(folder: Path) -> dict[str, Any]:
    """The settings of a staged model's training.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / HYPER_PARAMETERS
    settings, _ = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f'{path} holds no settings; stage the model again')
    return settings


def trained_classes(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes that a model was trained on, in the order of its outputs; None if they are not known."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return class_list(names, getattr(model, 'num_classes', None))


def class_list(names: Any, num_classes: Any) -> tuple[str, ...] | None:
    """Names of classes out of a file; None unless there is one text for each output."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) if names and len(names) == num_classes else None


def _note_classes(model: nn.Module, names: Any) -> None:
    """Keep the names of the classes where timm keeps them, and `trained_classes` looks for them."""
    if class_list(names, getattr(model, 'num_classes', None)):
        model.pretrained_cfg = {**dict(model.pretrained_cfg or {}), 'label_names': tuple(names)}  # type: ignore


def _note_size(model: nn.Module, img_size: Any) -> None:
    """Keep the size that a run resized its images to where pixel_input looks for it."""
    if isinstance(img_size, int):
        model.pretrained_cfg = {**dict(model.pretrained_cfg or {}), 'img_size': img_size}  # type: ignore
