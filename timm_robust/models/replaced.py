"""Any activation of ours in any timm network: one shared by all places, as in the paper, or one a place.

`replace_activations(model, 'pssilu')` changes a model in place; `timm.create_model('act_swapped', model='resnet50',
act='pssilu')` builds one, and is the name under which such a network is saved and loaded again.
"""

from typing import Any, Dict, List, Optional, Tuple, Type

import timm
import torch
import torch.nn as nn
from timm.layers.activations import GELU, GELUTanh, HardMish, HardSwish, Mish, QuickGELU, Swish
from timm.models import generate_default_cfgs, load_pretrained, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet  # there is no public path

from ..activations import Activation, get_activation
from .config import FEATURES, SOURCES, check_model_kwargs
from .shared_act import whole_features

ARCHITECTURE, SHARED = 'act_swapped', 'shared_act'
_KINDS: Tuple[Type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Softplus, nn.Mish),
    *(nn.Hardswish, Swish, Mish, GELU, GELUTanh, QuickGELU, HardSwish, HardMish, Activation),
)
"""What counts as an activation between layers; gates (sigmoid, hard sigmoid, tanh) do not."""
_COMPOUND = ('StarReLU', 'SquaredReLU', 'GammaAct')
"""timm's modules that make an activation of one: with another inside they are neither."""
_KERNEL = 'kernel_func'  # of EfficientViT's linear attention: its values divide, so they must not be negative


class SharedAct(nn.Module):
    """A place that applies the network's one activation, which its root owns: no parameter stands twice.

    torch.compile, torch.export, torch.onnx.export and torch.jit.trace read it; the deprecated torch.jit.script cannot.
    """

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.owner = (act,)  # in a tuple, which nn.Module does not register

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activation of any shape."""
        return self.owner[0](x)

    def __prepare_scriptable__(self) -> None:  # torch.jit.script asks every module before it reads the network
        name = type(self.owner[0]).__name__
        raise RuntimeError(
            f'torch.jit.script cannot read a network whose places share one {name}; what works: torch.compile(model), '
            'torch.export.export(model, (x,)), torch.onnx.export(model, (x,), path), torch.jit.trace(model, x), or an '
            'activation in each place: replace_activations(model, act, shared=False)'
        )


def replace_activations(model: nn.Module, act: str, shared: bool = True) -> nn.Module:
    """Put an activation of `timm_robust.activations` in every place where a network has one, in place.

    Every ReLU, SiLU, GELU, ELU, Mish, ... module is replaced; gates stay, and the ReLU of EfficientViT's attention, and
    what a network calls as a function (a ReLU of xception, nasnet, pnasnet and of mobilevitv2's attention). The other
    weights are not touched, so pretrained ones may be loaded before, and the networks differ by the activation's own
    parameters alone.

    Args:
        model: any network built of modules.
        act: name of the activation.
        shared: one set of parameters for the whole network (`model.shared_act`), or one in each place.

    Returns:
        The same model.

    timm's save_for_hf stores what builds the network again; before 1.0.31 it has to be told:
    model_args=model._model_args.

    Raises:
        ValueError: if there is no such activation, if the network has no place for it (it may call functions), or if
            its activation is a compound of one: StarReLU, SquaredReLU, GammaAct of dm_nfnet.
    """
    if hasattr(model, 'act_fn'):
        raise ValueError(
            f'{type(model).__name__} takes its activation by name; create resnet18_{act}, wrn28_10_{act}, ...'
        )
    exchange(model, act, shared)
    _note(model, act, shared)
    return model


def exchange(model: nn.Module, act: str, shared: bool = True) -> nn.Module:
    """`replace_activations` for a network whose name says its activation already: timm builds it by that name."""
    make = get_activation(act)
    if isinstance(model, FeatureGetterNet):  # features_only around a whole network
        exchange(model.model, act, shared)
        return model
    compound = [type(module).__name__ for module in model.modules() if type(module).__name__ in _COMPOUND]
    if compound:
        raise ValueError(
            f'{type(model).__name__} has {compound[0]} in {len(compound)} places, which is more than the activation in '
            'it, so no other fits there; take another network'
        )
    places: List[Tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children leaves out what stands there twice
        if child is not None and isinstance(child, (*_KINDS, SharedAct)) and name not in (SHARED, _KERNEL)
    ]
    if not places:
        raise ValueError(
            f'{type(model).__name__} has no activation module to replace: it calls functions instead; '
            'build it with its own act_layer argument'
        )
    if shared and isinstance(model, (nn.Sequential, nn.ModuleDict, nn.ModuleList)):
        raise ValueError(
            f'{type(model).__name__} calls all its modules in turn, so it cannot own an activation for others; '
            'write shared=False, or replace before the network is cut into features'
        )
    tensor = next(model.parameters(), torch.empty(0))
    settings: Dict[str, Any] = {'device': tensor.device, 'dtype': tensor.dtype}
    owner = make(**settings) if shared else None
    for parent, name, child in places:
        new = make(**settings) if owner is None else SharedAct(owner)
        setattr(parent, name, new.train(child.training))
    model._modules.pop(SHARED, None)
    if owner is not None and owner.initial:  # first: timm's AGC spares the last two parameters, the classifier's
        others = dict(model._modules)
        model._modules.clear()
        model._modules.update({SHARED: owner.train(model.training), **others})
    return model


def _note(model: nn.Module, act: str, shared: bool) -> None:
    """Tell timm's save_for_hf how the network is built again."""
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    args = dict(getattr(model, '_model_args', {}))
    base = cfg.get('architecture')
    if base == ARCHITECTURE:  # its activation is exchanged once more
        base = args.get('model', base)
    model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': ARCHITECTURE}  # type: ignore[assignment]
    model._model_args = {**args, 'model': base, 'act': act, 'shared': shared}  # type: ignore[assignment]


default_cfgs = generate_default_cfgs({ARCHITECTURE: {'url': ''}})


@register_model
def act_swapped(
    pretrained: bool = False,
    model: str = 'resnet50',
    act: str = 'pssilu',
    shared: bool = True,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm network with another activation: create_model('act_swapped', model='resnet50', act='pssilu').

    pretrained=True takes timm's weights of the network; a folder or Hub repository of such a network has its own.

    Raises:
        ValueError: if `model` is no other name of timm's registry, or an argument is none of its constructor's: both
            may come from a file.
    """
    overlay = pretrained_cfg_overlay or {}
    own = pretrained_cfg is not None or any(overlay.get(key) for key in SOURCES)  # saved with the new activation
    kwargs.pop('cache_dir', None)
    kwargs.pop('pretrained_model_args', None)
    check_model_kwargs({key: value for key, value in kwargs.items() if key not in FEATURES}, ARCHITECTURE)
    if not isinstance(model, str) or not timm.is_model(model) or model.partition('.')[0] == ARCHITECTURE:
        raise ValueError(f"{ARCHITECTURE}: model {model!r} must be another name of timm's registry, such as 'resnet50'")
    if shared or own:
        kwargs = whole_features(kwargs)
    cfg: Dict[str, Any] = {}
    if pretrained_cfg is not None:
        cfg = resolve_pretrained_cfg(ARCHITECTURE, pretrained_cfg, pretrained_cfg_overlay).to_dict()
        if cfg.get('num_classes') is not None:  # timm before 1.0.31 leaves it to those that read the configuration
            kwargs.setdefault('num_classes', cfg['num_classes'])
    elif pretrained_cfg_overlay is not None:
        kwargs['pretrained_cfg_overlay'] = pretrained_cfg_overlay
    net = timm.create_model(model, pretrained=pretrained and not own, **kwargs)
    replace_activations(net, act, shared)
    if own:
        cfg = cfg or dict(net.pretrained_cfg)  # type: ignore[arg-type]
        net.pretrained_cfg = net.default_cfg = {**cfg, 'architecture': ARCHITECTURE}  # type: ignore[assignment]
        if pretrained:
            features = isinstance(net, FeatureGetterNet)  # around the network, without its classifier
            inner: Any = net.model if features else net
            settings = {'num_classes': 0 if features else inner.num_classes, 'in_chans': kwargs.get('in_chans', 3)}
            load_pretrained(inner, cfg, strict=not features, **settings)
    return net
