"""ImageNet networks of Smooth Adversarial Training: timm's own, with smooth activations.

Xie et al. 2020, https://arxiv.org/abs/2006.14536: ResNet-50 with each activation, deeper and wider ones with SiLU, and
EfficientNet up to L1 (width 3.9, depth 3.7, 600 pixels, dropout 0.5). timm's names are left alone: ours end in the
activation.
"""

import math
from functools import partial
from typing import Any, Dict, Tuple

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.activations import GELUTanh  # SAT's GELU is the tanh approximation
from timm.models import build_model_with_cfg
from timm.models.efficientnet import _gen_efficientnet  # the one private name: no public one takes the multipliers
from timm.models.resnet import Bottleneck, ResNet

from ..activations import ACTIVATIONS
from .pretrained import Network, register_family
from .replaced import exchange
from .shared_act import whole_features

_SIZES: Dict[str, Dict[str, Any]] = {
    'resnet50': {'layers': (3, 4, 6, 3)},
    'resnet101': {'layers': (3, 4, 23, 3)},
    'resnet152': {'layers': (3, 8, 36, 3)},
    'resnext50_32x4d': {'layers': (3, 4, 6, 3), 'cardinality': 32, 'base_width': 4},
    'resnext152_32x8d': {'layers': (3, 8, 36, 3), 'cardinality': 32, 'base_width': 8},
}
_RESNET50_ACTS = ('silu', 'gelu', 'elu', 'softplus', 'softplus10', 'smoothrelu', 'pssilu')
_EFFICIENTNETS: Dict[str, Tuple[float, float, int, float]] = {  # width, depth, pixels, dropout (Tan and Le 2019)
    'b0': (1.0, 1.0, 224, 0.2),
    'b1': (1.0, 1.1, 240, 0.2),
    'b2': (1.1, 1.2, 260, 0.3),
    'b3': (1.2, 1.4, 300, 0.3),
    'b4': (1.4, 1.8, 380, 0.4),
    'b5': (1.6, 2.2, 456, 0.4),
    'b6': (1.8, 2.6, 528, 0.5),
    'b7': (2.0, 3.1, 600, 0.5),
    'l1': (3.9, 3.7, 600, 0.5),
}
_RESNETS = [f'resnet50_{act}' for act in _RESNET50_ACTS] + [f'{size}_silu' for size in _SIZES if size != 'resnet50']


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'license': 'apache-2.0',
        **kwargs,
    }


def _shared_resnet(act: str, **kwargs: Any) -> nn.Module:
    return exchange(ResNet(**kwargs), act)


def _resnet(size: str, act: str, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A ResNet whose learnable activation is one for the network, but SmoothReLU's, which SAT has in each place."""
    settings: Dict[str, Any] = {'block': Bottleneck, **_SIZES[size]}
    learnable = bool(ACTIVATIONS[act].initial)
    if not learnable or act == 'smoothrelu':
        place = {key: kwargs[key] for key in ('device', 'dtype') if learnable and key in kwargs}
        settings['act_layer'] = GELUTanh if act == 'gelu' else partial(ACTIVATIONS[act], **place)
        return build_model_with_cfg(ResNet, name, pretrained, **{**settings, **kwargs})
    kwargs = whole_features(kwargs)
    if kwargs.get('features_only') and kwargs['feature_cls'] == 'fx':
        raise ValueError(
            f"feature_cls='fx' cannot see {name}'s one activation; allowed: 'getter', 'list', 'dict', 'hook'"
        )
    return build_model_with_cfg(partial(_shared_resnet, act), name, pretrained, **{**settings, **kwargs})


def _efficientnet(size: str, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    width, depth, _, dropout = _EFFICIENTNETS[size]
    return _gen_efficientnet(name, width, depth, pretrained=pretrained, **{'drop_rate': dropout, **kwargs})


def _networks() -> Dict[str, Network]:
    doc = '{} with {}, as in Smooth Adversarial Training (Xie et al. 2020).'
    found = {}
    for name in _RESNETS:
        size, _, act = name.rpartition('_')
        cfg = _cfg(first_conv='conv1', classifier='fc')
        found[name] = Network(cfg, partial(_resnet, size, act), doc.format(size, ACTIVATIONS[act].__name__))
    for size, (_, _, pixels, _) in _EFFICIENTNETS.items():
        name = f'efficientnet_{size}'
        side = math.ceil(pixels / 32)
        sizes = {'input_size': (3, pixels, pixels), 'pool_size': (side, side)}
        cfg = _cfg(**sizes, first_conv='conv_stem', classifier='classifier')
        found[f'{name}_silu'] = Network(cfg, partial(_efficientnet, size), doc.format(name, 'SiLU'))
    return found


register_family(__name__, _networks())
