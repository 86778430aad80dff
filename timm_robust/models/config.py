"""What a file may say about a model: a config.json, a checkpoint's or a recipe's arguments, of whoever wrote them.

Weights come through the package's own reader alone, so no file may name a place that timm would read them from.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._hub import load_model_config_from_path  # there is no public path
from torch import nn

_FACTORY = set(inspect.signature(build_model_with_cfg).parameters)
_LOADING = (
    {*inspect.signature(timm.create_model).parameters, *(field.name for field in dataclasses.fields(PretrainedCfg))}
    | _FACTORY
) - {'kwargs', 'num_classes', 'input_size'}
"""Arguments that timm keeps for itself and its loading of weights; all others reach the model's constructor, which
refuses what it does not take."""
SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id')
"""Keys of a pretrained_cfg with which users name weights of their own."""
_PLACES = (*SOURCES, 'hf_hub_filename', 'source', 'custom_load')
_STATISTICS = {'mean', 'std'}
FEATURES = ('features_only', 'out_indices', 'feature_cls')
"""Arguments that make a network of features, without a classifier."""
_NAMES = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')


def check_model_kwargs(kwargs: Any, where: object = 'model_kwargs') -> None:
    """Refuse what is no argument of a model's constructor; other statistics of the input are allowed.

    Args:
        kwargs: name -> value, from a file.
        where: they come from, for the message.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ValueError(f'{where}: the arguments of a model are NAME: VALUE pairs, not {str(kwargs)[:100]!r}')
    if features := [name for name in FEATURES if kwargs.get(name)]:
        raise ValueError(f'{where}: {features[0]} makes no classifier, which attacks need; leave it out')
    overlay = kwargs.get('pretrained_cfg_overlay')
    statistics = isinstance(overlay, Mapping) and set(overlay) <= _STATISTICS
    for name in kwargs:
        loading = name in _LOADING or name.startswith(('pretrained', 'checkpoint'))
        if loading and not (name == 'pretrained_cfg_overlay' and statistics):
            raise ValueError(
                f"{where}: {name!r} is no argument of a model's constructor, but of timm's loading of weights, which a "
                'file must not steer; allowed are width, depths, drop_rate, ..., and pretrained_cfg_overlay with mean '
                'and std; to start from weights name their file: --initial-checkpoint FILE'
            )


def make_model(name: str, kwargs: Mapping[str, Any], **settings: Any) -> nn.Module:
    """A registered model, with the caller's arguments of its constructor and further ones of timm.create_model.

    Raises:
        ValueError: if it does not take these arguments, with those that it takes.
    """
    try:
        return timm.create_model(name, **{**settings, **kwargs})
    except (OSError, ImportError):
        raise
    except Exception as error:
        if not kwargs:
            raise
        given = ' '.join(f'{key}={value}' for key, value in kwargs.items())
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        raise ValueError(f'cannot make {name} with {given} ({reason}){_takes(name)}') from error


def timm_settings(args: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Arguments of timm.create_model for the model of timm's train.py, out of the `args` in its checkpoint.

    Raises:
        ValueError: for what is no setting of timm's.
    """
    given, size = args.get('model_kwargs') or {}, args.get('input_size') or (None,)
    if not isinstance(given, Mapping) or not isinstance(size, (list, tuple)):
        raise ValueError(f'{where} hold model_kwargs {given!r} and input_size {size!r}; allowed: a dict, a list')
    settings = {'global_pool': args.get('gp'), **given}
    settings |= {'num_classes': args.get('num_classes'), 'in_chans': args.get('in_chans')}
    if settings['in_chans'] is None:
        settings['in_chans'] = size[0]
    check_model_kwargs(settings, where)
    return {key: value for key, value in settings.items() if value is not None}


def note_data(model: nn.Module, args: Mapping[str, Any], overlay: Mapping[str, Any], in_chans: int) -> None:
    """Keep in the model's pretrained_cfg what images timm's train.py showed it: mean, std, size and crop.

    Args:
        model: made of these args.
        args: of timm's train.py.
        overlay: mean and std that the caller gives instead.
        in_chans: channels of the images; statistics of three colours are averaged for others, as timm's loader does.

    Raises:
        ValueError: for values that are none.
    """
    keys = ('in_chans', 'input_size', 'img_size', 'mean', 'std', 'crop_pct', 'interpolation', 'crop_mode')
    try:
        found = resolve_data_config({key: args.get(key) for key in keys}, dict(model.pretrained_cfg or {}))  # type: ignore
        statistics = {key: tuple(overlay.get(key) or found[key]) for key in ('mean', 'std')}
        for key, values in statistics.items():
            if len(values) != in_chans:
                statistics[key] = (sum(values) / len(values),) * in_chans
        size = int(found['input_size'][-1])
    except (AssertionError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f'its args hold no mean, std and size of images: {type(error).__name__} {error}') from None
    note(model, **statistics, img_size=size, **{key: found[key] for key in ('crop_pct', 'interpolation', 'crop_mode')})


def note(model: nn.Module, **facts: Any) -> None:
    """Keep facts in the model's pretrained_cfg, where pixel_input and trained_classes look for them."""
    model.pretrained_cfg = {**dict(getattr(model, 'pretrained_cfg', None) or {}), **facts}  # type: ignore[assignment]


def _takes(name: str) -> str:
    """The arguments of a model's constructor, with their defaults, for a message."""
    try:
        with torch.device('meta'):
            found = inspect.signature(type(timm.create_model(name))).parameters.values()
    except Exception:  # one that cannot be made without arguments, or not without memory
        return ''
    plain = [item for item in found if isinstance(item.default, (int, float, str, tuple))]
    return '; it takes ' + ', '.join(f'{item.name}={item.default}' for item in plain) if plain else ''


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of timm.create_model in a folder's config.json, without a place of weights.

    Raises:
        ValueError: if it is damaged, names no model of the registry, or more than a constructor takes; other errors
            of timm's reader, which does not check what it reads, likewise mean damage.
    """
    cfg, arch, args = load_model_config_from_path(folder)
    check_model_kwargs(args, 'model_args')
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise ValueError(f'its architecture {arch!r} is no model in the timm registry')
    settings = {**args, 'pretrained_cfg': {key: value for key, value in cfg.items() if key not in _PLACES}}
    if args and 'pretrained_model_args' in _FACTORY:  # timm 1.0.31: the size at which position embeddings were trained
        settings['pretrained_model_args'] = dict(args)
    return arch, settings


def find_weights(folder: Path) -> Path:
    """The file of weights beside a config.json: model.safetensors, or what timm looks for after it.

    Raises:
        FileNotFoundError: if there is none.
    """
    for path in (*(folder / name for name in _NAMES), *sorted(folder.glob('[!.]*.safetensors'))):
        if path.is_file():
            return path
    raise FileNotFoundError(f'{folder} holds a config.json but no weights; put model.safetensors beside it')


def forget_weights(model: nn.Module) -> nn.Module:
    """The model, without the tensors that timm was handed in its pretrained_cfg and keeps there."""
    for module in model.modules():
        for name in ('pretrained_cfg', 'default_cfg'):
            cfg = getattr(module, name, None)
            if isinstance(cfg, dict):
                cfg.pop('state_dict', None)
    return model
