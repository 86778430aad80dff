"""Wide ResNets for 32x32 images: pre-activation, no dropout, one activation for the whole network.

Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146, in the form that TRADES made the field's standard
(Zhang et al. 2019, https://arxiv.org/abs/1901.08573); with parametric activations Dai et al. 2021, https://arxiv.org/abs/2110.05626.
Models: `wrn28_10_<act>`, `wrn34_10_<act>`, `wrn70_16_<act>` for every activation of `timm_robust.activations`.
"""

import re
from functools import partial
from typing import Any, Dict, List, Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import build_model_with_cfg

from ..activations import ACTIVATIONS, Activation
from .pretrained import Network, register_family
from .shared_act import SharedActNet, family_cfg, renamed, shared_act_key, whole_features

SIZES = {'wrn28_10': (28, 10), 'wrn34_10': (34, 10), 'wrn70_16': (70, 16)}
"""Depth and widening factor."""


class PreActBlock(nn.Module):
    """norm, act, conv, norm, act, conv, add; a shortcut that changes shape convolves the activated input.

    same_padding: a strided convolution is padded at the right and the bottom only, as TensorFlow's 'SAME' pads 32
    pixels.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        act: Type[Activation],
        same_padding: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.act_fn = act.call
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.pads = same_padding and stride == 2
        padding = 0 if self.pads else 1
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=padding, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.projects = in_chs != out_chs
        self.shortcut: nn.Module = nn.Identity()
        if self.projects:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd)

    def forward(self, x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """[B, in_chs, H, W] to [B, out_chs, H / stride, W / stride]."""
        y = self.act_fn(self.bn1(x), params)
        shortcut = self.shortcut(y) if self.projects else x
        if self.pads:
            y = F.pad(y, (0, 1, 0, 1))
        y = self.act_fn(self.bn2(self.conv1(y)), params)
        return shortcut + self.conv2(y)


class WideResNet(SharedActNet):
    """WRN-depth-widen_factor: three stages of (depth - 4) / 6 pre-activation blocks.

    Their channels are 16, 32 and 64 times `widen_factor`. With `same_padding`, strided convolutions are padded at the
    right and the bottom only, as in DeepMind's networks (Gowal et al. 2020, https://arxiv.org/abs/2010.03593). All else
    is as in SharedActNet.

    Raises:
        ValueError: for a depth that is not 6 n + 4.
    """

    def __init__(
        self,
        act_layer: str = 'relu',
        depth: int = 28,
        widen_factor: int = 10,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        same_padding: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f'depth {depth} of a wide ResNet must be 6 n + 4: 10, 16, 22, 28, 34, 40, ...')
        super().__init__(
            act_layer,
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            stem_chs=16,
            stage_chs=(16 * widen_factor, 32 * widen_factor, 64 * widen_factor),
            strides=(1, 2, 2),
            depths=((depth - 4) // 6,) * 3,
            block=partial(PreActBlock, same_padding=same_padding),
            preact=True,
            device=device,
            dtype=dtype,
        )


def own_key(key: str) -> Optional[str]:
    """The name here of a weight of another wide ResNet: TRADES' (and RobustBench's PSSiLU network), or DeepMind's.

    None for what never runs: TRADES registers block1 a second time, as sub_block1. Our own names stay.
    """
    if shared := shared_act_key(key):
        return shared
    if key.startswith('sub_block1.'):
        return None
    if match := re.match(r'block(\d)\.layer\.(.*)', key):  # TRADES
        return f'stages.{int(match[1]) - 1}.{match[2].replace("convShortcut.", "shortcut.")}'
    if match := re.match(r'layer\.(\d)\.block\.(\d+)\.(\w+)\.(.*)', key):  # DeepMind
        return f'stages.{match[1]}.{match[2]}.{_DEEPMIND_BLOCK.get(match[3], match[3])}.{match[4]}'
    room, dot, rest = key.partition('.')
    return {'bn1': 'norm', 'batchnorm': 'norm', 'init_conv': 'conv1', 'logits': 'fc'}.get(room, room) + dot + rest


_DEEPMIND_BLOCK = {'batchnorm_0': 'bn1', 'conv_0': 'conv1', 'batchnorm_1': 'bn2', 'conv_1': 'conv2'}


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take the weights of other wide ResNets, RobustBench's PSSiLU network among them, to our names."""
    return renamed(state_dict, own_key)


def _make(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        WideResNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': (0, 1, 2, 3)},
        **whole_features(kwargs),
    )


register_family(
    __name__,
    {
        f'{size}_{name}': Network(
            family_cfg((8, 8)),
            partial(_make, act_layer=name, depth=depth, widen_factor=widen_factor),
            f'WRN-{depth}-{widen_factor} for 32x32 images with one {act.__name__} for the whole network.',
        )
        for size, (depth, widen_factor) in SIZES.items()
        for name, act in ACTIVATIONS.items()
    },
)
