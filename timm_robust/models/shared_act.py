"""Base of the CIFAR networks: one activation for the whole network, owned by the root.

Storing one activation module in every block, as the paper's code does, puts a copy of alpha and beta under every
block's name in the state dict: safetensors refuses such a dict, and timm's ModelEmaV3 averages alpha once per name.
Here the root registers the activation once, `params = self.act.params()` goes down with x, and blocks apply the
activation's plain function to both.
"""

import re
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import create_classifier
from timm.models import FeatureDictNet, FeatureListNet, checkpoint
from timm.models._features import FeatureGetterNet, feature_take_indices  # there is no public path

from ..activations import Activation, ReLU, get_activation


class Stage(nn.Sequential):
    """Blocks that take (x, params)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """Run the blocks; with grad_checkpointing each one's intermediates are recomputed in backward."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, params)
            else:
                x = block(x, params)
        return x


class SharedActNet(nn.Module):
    """Stem, stages, optional final norm and activation, pooling, classifier, and the methods that timm expects.

    Args:
        act_layer: name of an activation of `timm_robust.activations`.
        num_classes: outputs; 0 for features.
        in_chans: input channels.
        global_pool: timm's pool type; '' for none (only without a classifier).
        drop_rate: dropout before the classifier.
        stem_chs: channels of the stem.
        stage_chs: channels of each stage's output.
        strides: stride of each stage.
        depths: blocks in each stage.
        block: class of the blocks: block(in_chs, out_chs, stride, act, device, dtype).
        preact: pre-activation networks keep the stem a plain convolution and end in norm and activation.
        device: where parameters live.
        dtype: of the parameters.
    """

    def __init__(
        self,
        act_layer: str,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        stem_chs: int,
        stage_chs: Tuple[int, ...],
        strides: Tuple[int, ...],
        depths: Tuple[int, ...],
        block: Callable[..., nn.Module],
        preact: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        act = get_activation(act_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = stage_chs[-1]
        # registered before the classifier: timm's AGC leaves the last two parameters alone, which must be fc's
        self.act: Activation = act(**dd)
        self.act_fn = act.call
        self.stem_act = not preact
        self.final_act = preact

        self.conv1 = nn.Conv2d(in_chans, stem_chs, 3, stride=1, padding=1, bias=False, **dd)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(stem_chs, **dd)
        self.feature_info: List[Dict[str, Any]] = [
            {'num_chs': stem_chs, 'reduction': 1, 'module': 'conv1' if preact else 'bn1'}
        ]
        stages, in_chs, reduction = [], stem_chs, 1
        for i, (chs, stride, depth) in enumerate(zip(stage_chs, strides, depths, strict=True)):
            blocks = [block(in_chs if j == 0 else chs, chs, stride if j == 0 else 1, act, **dd) for j in range(depth)]
            stages.append(Stage(*blocks))
            in_chs, reduction = chs, reduction * stride
            self.feature_info.append({'num_chs': chs, 'reduction': reduction, 'module': f'stages.{i}'})
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(in_chs, **dd) if preact else nn.Identity()
        self.global_pool, self.fc = create_classifier(in_chs, num_classes, pool_type=global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Convolutions N(0, 2 / (k k c_out)), as in the paper's ResNet and wide ResNet; the rest as torch makes it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions for layer-wise groups."""
        blocks = r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None), (r'^norm|^act', (99999,))]
        return {'stem': r'^conv1|^bn1', 'blocks': blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's intermediates in backward."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier; global_pool None keeps the pooling."""
        weight = self.conv1.weight
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        head = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=weight.device, dtype=weight.dtype
        )
        self.global_pool, self.fc = (module.train(self.training) for module in head)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features of the stem (0) and of each stage (1, 2, ...), beside the final ones.

        Args:
            x: images [B, C, H, W].
            indices: the last n if a number, all if None, else these.
            norm: apply the final norm and activation to the last stage's.
            stop_early: do not run what lies behind the last one wanted.
            output_fmt: NCHW.
            intermediates_only: leave the final features out.

        Returns:
            (final features, [intermediate, ...]), or the list alone.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates: List[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        params = self.act.params()
        x = self.forward_stem(x, params)
        if 0 in take_indices:
            intermediates.append(x)
        last = len(self.stages)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice
            stages = self.stages
        else:
            stages = self.stages[:max_index]
        feat_idx = 0
        for feat_idx, stage in enumerate(stages, start=1):
            x = stage(x, params)
            if feat_idx in take_indices:
                intermediates.append(self.forward_norm(x, params) if norm and feat_idx == last else x)
        if intermediates_only:
            return intermediates
        if feat_idx == last:
            x = self.forward_norm(x, params)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drop what lies behind the last of these features."""
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        prune_end = max_index < len(self.stages)
        if prune_norm or prune_end:
            self.norm = nn.Identity()
            self.final_act = False
        self.stages = self.stages[:max_index]
        if max_index == 0 and not self.stem_act:
            self.act, self.act_fn = ReLU(), ReLU.call  # nothing applies it any more
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """First convolution, with norm and activation in post-activation networks."""
        x = self.bn1(self.conv1(x))
        if self.stem_act:
            x = self.act_fn(x, params)
        return x

    def forward_norm(self, x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """Final norm and activation of pre-activation networks."""
        x = self.norm(x)
        if self.final_act:
            x = self.act_fn(x, params)
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, num_features, h, w]."""
        params = self.act.params()
        x = self.forward_stem(x, params)
        for stage in self.stages:
            x = stage(x, params)
        return self.forward_norm(x, params)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class FeatureGetterDict(FeatureGetterNet):
    """timm's getter around a whole network, with the keys of its FeatureDictNet: '0', '1', ..."""

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Number of a feature, as text -> the feature [B, C, h, w]."""
        names = [str(index) for index in self.feature_info.out_indices]
        return OrderedDict(zip(names, super().forward(x), strict=True))


def whole_features(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """A network's arguments, where features_only with feature_cls 'list' or 'dict' leaves the network whole.

    timm's own two call the parts of a network in turn, which a shared activation's parameters do not reach.
    """
    if not kwargs.get('features_only'):
        return kwargs
    kind = kwargs.get('feature_cls', 'getter')
    kind = kind.lower() if isinstance(kind, str) else kind
    whole = {'list': 'getter', FeatureListNet: 'getter', 'dict': FeatureGetterDict, FeatureDictNet: FeatureGetterDict}
    return {**kwargs, 'feature_cls': whole.get(kind, kind)}


def shared_act_key(key: str) -> Optional[str]:
    """'act.alpha' or 'act.beta' for a copy of it under any block's name, '...activation.alpha'; None for other keys."""
    match = re.fullmatch(r'(?:.*\.)?activation\.(alpha|beta)', key)
    return f'act.{match[1]}' if match else None


def renamed(state_dict: Dict[str, torch.Tensor], own_key: Callable[[str], Optional[str]]) -> Dict[str, torch.Tensor]:
    """The weights of another network under our names, by `own_key`, without `module.` prefixes; None leaves one out.

    Raises:
        ValueError: if copies of alpha or beta differ: such a network does not share its activation.
    """
    out: Dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        name = own_key(re.sub(r'^(module\.)+', '', key))
        if name is None:
            continue
        if name.startswith('act.'):
            value = value.reshape(1)
            if not torch.equal(out.get(name, value), value):
                raise ValueError(
                    f'copies of {name[4:]} differ in the checkpoint: the activation is not shared; retrain it'
                )
        out[name] = value
    return out


def family_cfg(pool_size: Tuple[int, int]) -> Dict[str, Any]:
    """pretrained_cfg of a CIFAR network: 32x32 pixels in [0, 1], not normalised, so that eps is in pixels."""
    return {
        'url': '',
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': pool_size,
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.0, 0.0, 0.0),
        'std': (1.0, 1.0, 1.0),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
    }
