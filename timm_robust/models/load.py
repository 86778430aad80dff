"""One way from whatever names a model (registry, file, folder, Hub) to the model, in eval mode.

>>> model = load_model('resnet18_pssilu', width=4, num_classes=3)
>>> model.training, model.num_classes
(False, 3)
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from torch import nn

from ..files import read_yaml
from ..threat_model import LEADERBOARD_EPS, ThreatModel
from ..weights import RELEASES, fetch_folder
from .checkpoint import BEST, SUFFIXES, load_checkpoint, read_weights, weights_of
from .config import (
    check_model_kwargs,
    find_weights,
    forget_weights,
    make_model,
    note,
    note_data,
    read_config,
    timm_settings,
)

HYPER_PARAMETERS = 'train_hparams.yaml'
_HUB, _LOCAL = ('hf-hub:', 'hf_hub:'), 'local-dir:'  # as timm.create_model spells them
_REFUSALS = (ValueError, LookupError, RuntimeError, AssertionError, AttributeError, TypeError, ArithmeticError)
"""What timm raises for arguments that cannot be."""


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
        checkpoint: file of weights for a timm name, of timm's train.py or its clean_checkpoint.py; a config.json of
            that name beside a .safetensors file says how the network was made.
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
        model = _from_config(fetch_folder(name.partition(':')[2]), model_kwargs)
    elif name.startswith(_LOCAL):
        model = _from_config(Path(name.removeprefix(_LOCAL)), model_kwargs)
    elif path.is_file() or name.endswith(SUFFIXES):
        model = _from_file(path, model_kwargs)
    elif isinstance(spec, str) and timm.is_model(name):
        model = _from_registry(name, model_kwargs)
    elif path.is_dir() and (path / 'config.json').is_file():
        model = _from_config(path, model_kwargs)
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
    model = make_model(name, model_kwargs, pretrained=bool(tag))
    if release := RELEASES.get(name):
        _note_training(model, {'norm': release.norm, 'eps': LEADERBOARD_EPS[release.norm]})
    return model


def _from_file(path: Path, model_kwargs: dict[str, Any], arch: str | None = None) -> nn.Module:
    """A model from its checkpoint, which may say its arch, or from .safetensors beside a config.json."""
    model_kwargs = {**model_kwargs, 'pretrained': False}
    if path.suffix == '.safetensors':
        state, weights = {}, read_weights(path)
    else:
        state = load_checkpoint(path)
        weights = weights_of(state, path)
    if path.suffix == '.safetensors' and (arch is None or _tells_of(path.parent, arch)):
        model = _from_config(path.parent, model_kwargs)
    else:
        model = _from_state(state, path, arch, model_kwargs)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f'the weights in {path} do not fit the model: {" ".join(str(error).split())[:500]}') from None
    _check_kinds(model, weights, path)
    return model


def _tells_of(folder: Path, arch: str) -> bool:
    """Whether a folder's config.json is of this network: it knows its statistics, padding and classes."""
    with contextlib.suppress(Exception):  # none there, or a damaged one
        return read_config(folder)[0] == arch.partition('.')[0]
    return False


def _from_state(state: dict[str, Any], path: Path, arch: str | None, model_kwargs: dict[str, Any]) -> nn.Module:
    """The model that a checkpoint tells of, with random weights; `arch` stands above what it says."""
    name = arch or state.get('arch')
    call = f"load_model(NAME, checkpoint='{path}'), in the shell: NAME --checkpoint"
    if not isinstance(name, str):
        raise ValueError(f"{path} does not say which model it is: it has no 'arch' entry; write {call} {path}")
    if not timm.is_model(name):
        raise ValueError(f'{path}: {_unknown(name)}; to name its model, write {call} {path}')
    saved = state.get('model_kwargs') or {}
    check_model_kwargs(saved, f'model_kwargs of {path}')
    args = state.get('args')
    args = args if isinstance(args, Mapping) else {}
    saved = {**timm_settings(args, f'args of {path}'), **saved}
    if state.get('num_classes') is not None:
        saved['num_classes'] = state['num_classes']
    settings = {**saved, **model_kwargs}
    try:
        model = timm.create_model(name, **settings)
    except _REFUSALS as error:
        given = model_kwargs if arch else f'the model_kwargs of {path}'
        raise ValueError(f'cannot make {name} with {given}: {_reason(error)}') from error
    if args or (arch and 'recipe' not in state):  # a run of ours says itself what images it saw
        note_data(model, args, model_kwargs.get('pretrained_cfg_overlay') or {}, settings.get('in_chans', 3))
    fixed = (getattr(model, 'pretrained_cfg', None) or {}).get('fixed_input_size')
    if (size := _size(state.get('input_size'))) and not fixed:  # timm would build another network of that size
        note(model, input_size=size)
    _note_training(model, state.get('recipe'))
    if names := class_list(state.get('classes'), getattr(model, 'num_classes', None)):
        note(model, label_names=names)
    return model


def _from_config(folder: Path, model_kwargs: dict[str, Any]) -> nn.Module:
    """A model from the config.json that timm stages for the Hub; its weights, if wanted, through read_weights."""
    config, weights = folder / 'config.json', {}
    if not config.is_file():
        raise FileNotFoundError(f'{config} is missing; it says which model the weights are for')
    model_kwargs = {'pretrained': True, **model_kwargs}
    if model_kwargs['pretrained']:
        file = find_weights(folder)
        weights = read_weights(file)
    try:
        arch, saved = read_config(folder)
        if weights:
            saved['pretrained_cfg']['state_dict'] = weights
        model = forget_weights(timm.create_model(arch, **{**saved, **model_kwargs}))
    except _REFUSALS as error:
        raise ValueError(f'cannot make a model from {config}: {_reason(error)}') from error  # timm does not check it
    if weights:
        _check_kinds(model, weights, file)
    if (folder / HYPER_PARAMETERS).is_file():
        _note_training(model, read_hyper_parameters(folder))
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


def trained_for(model: nn.Module) -> ThreatModel | None:
    """The threat model that a model which load_model made was trained for; None if it is not known.

    Of a release the norm is known, by its name, and the radius is taken for the leaderboard's.
    """
    return getattr(model, '_trained_for', None)


def _size(value: Any) -> tuple[int, ...] | None:
    """Channels, height and width of images, out of a file; None for what cannot be."""
    numbers = isinstance(value, (list, tuple)) and all(type(number) is int and 0 < number <= 4096 for number in value)
    return tuple(value) if numbers and len(value) == 3 else None


def _note_training(model: nn.Module, settings: Any) -> None:
    """Keep the size that a run resized its images to, and the threat model that it trained for."""
    if not isinstance(settings, Mapping):
        return
    if isinstance(settings.get('img_size'), int):
        note(model, img_size=settings['img_size'])
    with contextlib.suppress(KeyError, TypeError, ValueError):  # a stranger's file may say anything
        model._trained_for = ThreatModel(settings['norm'], settings['eps'])  # type: ignore[assignment]
        # pretrained_cfg is no place for it: timm refuses to load a config.json with other keys
