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
_PLACES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
_STATISTICS = {'mean', 'std'}
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
