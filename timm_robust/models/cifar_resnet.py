"""ResNet-18 for 32x32 images: 3x3 stem of stride 1, no max-pool, post-activation, one activation for the whole network.

He et al. 2015, https://arxiv.org/abs/1512.03385; with parametric activations Dai et al. 2021, https://arxiv.org/abs/2110.05626.
Models: `resnet18_<act>` for every activation of `timm_robust.activations`.
"""

import re
from functools import partial
from typing import Any, Dict, List, Tuple, Type

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg

from ..activations import ACTIVATIONS, Activation
from .pretrained import Network, register_family
from .shared_act import SharedActNet, family_cfg, renamed, shared_act_key, whole_features


class BasicBlock(nn.Module):
    """conv, norm, act, conv, norm, add, act."""

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, act: Type[Activation], device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.act_fn = act.call
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            conv = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_chs, **dd))

    def forward(self, x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """[B, in_chs, H, W] to [B, out_chs, H / stride, W / stride]."""
        y = self.act_fn(self.bn1(self.conv1(x)), params)
        y = self.bn2(self.conv2(y))
        return self.act_fn(y + self.downsample(x), params)


class CifarResNet(SharedActNet):
    """Post-activation ResNet of basic blocks.

    `width` is the number of channels of the first stage, doubled in each of the next; all else as in SharedActNet.
    """

    def __init__(
        self,
        act_layer: str = 'relu',
        width: int = 64,
        depths: Tuple[int, ...] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            act_layer,
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            stem_chs=width,
            stage_chs=tuple(width * 2**i for i in range(len(depths))),
            strides=(1, *[2] * (len(depths) - 1)),
            depths=tuple(depths),
            block=BasicBlock,
            preact=False,
            device=device,
            dtype=dtype,
        )


def own_key(key: str) -> str:
    """The name here of a weight of another CIFAR ResNet (layer1.0.shortcut.0, linear, copies of the activation)."""
    if shared := shared_act_key(key):
        return shared
    key = re.sub(r'^layer(\d+)\.', lambda m: f'stages.{int(m[1]) - 1}.', key)
    return re.sub(r'^linear\.', 'fc.', re.sub(r'\.shortcut\.', '.downsample.', key))


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take the weights of other CIFAR ResNets to our names."""
    return renamed(state_dict, own_key)


def _make(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        CifarResNet, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **whole_features(kwargs)
    )


register_family(
    __name__,
    {
        f'resnet18_{name}': Network(
            family_cfg((4, 4)),
            partial(_make, act_layer=name),
            f'ResNet-18 for 32x32 images with one {act.__name__} for the whole network.',
        )
        for name, act in ACTIVATIONS.items()
    },
)
