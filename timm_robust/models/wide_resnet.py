"""Wide ResNets for 32x32 images: pre-activation, no dropout, one activation for the whole network.

Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146, in the form that TRADES made the field's standard
(Zhang et al. 2019, https://arxiv.org/abs/1901.08573); with parametric activations Dai et al. 2021, https://arxiv.org/abs/2110.05626.
Models: `wrn28_10_<act>`, `wrn34_10_<act>`, `wrn70_16_<act>` for every activation of `timm_robust.activations`.
"""

import re
from typing import Any, Dict, List, Type

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..activations import ACTIVATIONS, Activation
from ._shared_act import SharedActNet, collapse_shared_act, family_cfg, name_entrypoint
from ._weights import tagged, with_weights

__all__ = ['WideResNet']

SIZES = {'wrn28_10': (28, 10), 'wrn34_10': (34, 10), 'wrn70_16': (70, 16)}
"""Depth and widening factor."""


class PreActBlock(nn.Module):
    """norm, act, conv, norm, act, conv, add; a shortcut that changes shape convolves the activated input."""

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, act: Type[Activation], device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.act_fn = act.call
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
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
        y = self.act_fn(self.bn2(self.conv1(y)), params)
        return shortcut + self.conv2(y)


class WideResNet(SharedActNet):
    """WRN-depth-widen_factor: three stages of (depth - 4) / 6 pre-activation blocks.

    Args:
        act_layer: name of the activation.
        depth: 6 n + 4.
        widen_factor: channels are 16, 32 and 64 times this.
        num_classes: outputs; 0 for features.
        in_chans: input channels.
        global_pool: timm's pool type.
        drop_rate: dropout before the classifier.
        device: where parameters live.
        dtype: and as what.

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
            block=PreActBlock,
            preact=True,
            device=device,
            dtype=dtype,
        )


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take the keys of TRADES-style wide ResNets, RobustBench's PSSiLU network among them, to ours."""
    state_dict = collapse_shared_act(state_dict)
    if not any(key.startswith('block1.') for key in state_dict):
        return state_dict
    out = {}
    for key, value in state_dict.items():
        if key.startswith('sub_block1.'):  # TRADES registers block1 twice and never runs this copy
            continue
        key = re.sub(r'^block(\d)\.layer\.', lambda m: f'stages.{int(m[1]) - 1}.', key)
        key = re.sub(r'^bn1\.', 'norm.', key)
        out[re.sub(r'\.convShortcut\.', '.shortcut.', key)] = value
    return out


default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for size in SIZES
        for act in ACTIVATIONS
        for name, cfg in tagged(f'{size}_{act}', family_cfg((8, 8))).items()
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        WideResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'},
        **with_weights(variant, pretrained, kwargs),
    )


def _register(size: str, act: str) -> None:
    name, (depth, widen_factor) = f'{size}_{act}', SIZES[size]

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        args = {'act_layer': act, 'depth': depth, 'widen_factor': widen_factor}
        return _create(name, pretrained, **dict(args, **kwargs))

    doc = f'WRN-{depth}-{widen_factor} for 32x32 images with one {ACTIVATIONS[act].__name__} for the whole network.'
    globals()[name] = register_model(name_entrypoint(entrypoint, name, __name__, doc))


for _size in SIZES:
    for _act in ACTIVATIONS:
        _register(_size, _act)
