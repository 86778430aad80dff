"""Whether two networks compute the same with the same weights."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from torch import nn

_TRAINING = (nn.Identity, nn.Dropout, DropPath)  # nothing in eval mode


def _statistics(model: nn.Module, key: str, default: float) -> Any:
    """What a network's pretrained_cfg says of its input; one number where all channels have that."""
    values = (getattr(model, 'pretrained_cfg', None) or {}).get(key) or (default,)
    if not isinstance(values, (list, tuple)):
        return values
    return values[0] if all(value == values[0] for value in values) else tuple(values)


def other_function(source: nn.Module, model: nn.Module) -> list[str]:
    """What two networks of the same weights compute otherwise, in eval mode: a line each.

    Held against each other: mean and standard deviation of the input, the kinds of their layers, the padding of their
    convolutions.
    """
    found, layers = [], dict(model.named_modules())
    for key, default in (('mean', 0.0), ('std', 1.0)):
        theirs, ours = (_statistics(net, key, default) for net in (source, model))
        if theirs != ours:
            found.append(f'{key} {theirs} there, {ours} here')
    for name, layer in source.named_modules():
        own = layers.get(name)
        if own is None or list(layer.children()) or isinstance(layer, _TRAINING) or isinstance(own, _TRAINING):
            continue
        if type(layer) is not type(own):
            found.append(f'{name} is {type(layer).__name__} there, {type(own).__name__} here')
        elif isinstance(layer, nn.Conv2d) and layer.padding != own.padding:
            found.append(f'{name} pads {layer.padding} there, {own.padding} here')
    return found
