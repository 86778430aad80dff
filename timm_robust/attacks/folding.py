"""A network as attacks see it: its weights are fixed meanwhile, so batch norm folds into the convolutions before it.

An attack calls one set of weights many times, for the gradient with respect to the images alone. `FoldedNet` is a copy
of the network for that: in eval mode, without parameter gradients, its convolutions and linear layers already in the
attack's precision, and every batch norm that directly follows a convolution multiplied into it:
w' = w s, b' = (b - mean) s + shift with s = scale / sqrt(var + eps). Equal to the network up to rounding.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from ..precision import ieee_fp32

_CONVS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
_TOLERANCE = 1e-4  # of the logits' largest value; rounding in fp32 is 1e-6


class FoldedNet(nn.Module):
    """A copy of a network to be attacked; `refresh()` takes the network's present weights.

    Args:
        model: the network; it is left as it is.
        example: images [B, C, H, W] that it takes, to find out which batch norm follows which convolution.
        dtype: type of the weights of convolutions and linear layers; None keeps them. Call it under autocast then.
        memory_format: layout of the weights.

    Attributes:
        net: the copy.
        pairs: convolution -> the batch norm folded into it; those whose folding would change the logits are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        example: torch.Tensor,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        """Copy and fold; the network runs a few times on the example."""
        super().__init__()
        self._source = [model]  # in a list, so that its parameters are not ours
        self.net = _frozen_copy(model)
        self.pairs = _pairs(self.net, example)
        if self.pairs and not _folds(model, self.pairs, example):  # some convolution's output goes elsewhere too
            self.pairs = {conv: norm for conv, norm in self.pairs.items() if _folds(model, {conv: norm}, example)}
        _fold(self.net, self.pairs)
        if dtype is not None:
            for module in self.net.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(dtype)
        self.net.to(memory_format=memory_format)
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, C, H, W]."""
        return self.net(x)

    def refresh(self) -> None:
        """Take the network's present weights and statistics."""
        _take_weights(self.net, self._source[0], self.pairs)


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def _pairs(net: nn.Module, example: torch.Tensor) -> dict[str, str]:
    """Convolution -> the batch norm that its output goes to, found by running the network; both are called once."""
    names = {module: name for name, module in net.named_modules()}
    made: dict[int, tuple[str, torch.Tensor]] = {}  # the tensors are kept, so that no id comes twice
    pairs: dict[str, str] = {}
    calls: Counter[str] = Counter()

    def after_conv(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        calls[names[module]] += 1
        made[id(output)] = names[module], output

    def before_norm(module: nn.Module, args: Any) -> None:
        calls[names[module]] += 1
        if id(args[0]) in made:
            pairs[made[id(args[0])][0]] = names[module]

    hooks = []
    for module in names:
        if type(module) in _CONVS and 'weight' in module._parameters:  # not one that a hook computes anew
            hooks.append(module.register_forward_hook(after_conv))
        elif type(module) in _NORMS and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}


@torch.no_grad()
def _folds(model: nn.Module, pairs: dict[str, str], example: torch.Tensor) -> bool:
    """Whether folding keeps the logits, tried with statistics and scales far from the identity."""
    probe = _frozen_copy(model)
    generator = torch.Generator().manual_seed(0)
    for name in pairs.values():
        norm: Any = probe.get_submodule(name)
        for tensor, low, high in (
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 2.0),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
        ):
            if tensor is not None:
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    folded = copy.deepcopy(probe)
    _fold(folded, pairs)
    _take_weights(folded, probe, pairs)
    with ieee_fp32():
        expected = probe(example)
        return bool((folded(example) - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _fold(net: nn.Module, pairs: dict[str, str]) -> None:
    """Give each convolution a bias, and take its batch norm away; the weights are not touched."""
    for conv_name, norm_name in pairs.items():
        conv: Any = net.get_submodule(conv_name)
        norm: Any = net.get_submodule(norm_name)
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        rest: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):  # under their names, by which they find their weights
            rest = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))
        net.set_submodule(norm_name, rest)


@torch.no_grad()
def _take_weights(folded: nn.Module, model: nn.Module, pairs: dict[str, str]) -> None:
    """Copy the model's weights into its folded copy: all channels' scales and biases at once, a launch a convolution.

    On a GPU each operation is a launch, and there is one refresh an attack.
    """
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    targets = {**dict(folded.named_parameters()), **dict(folded.named_buffers())}
    if pairs:
        scales, biases = _scales_and_biases(model, pairs, weights)
        weights.update({f'{conv}.bias': bias for conv, bias in zip(pairs, biases, strict=True)})
        for conv, scale in zip(pairs, scales, strict=True):
            name = f'{conv}.weight'
            torch.mul(weights[name], scale.view(-1, 1, 1, 1), out=targets.pop(name))
    alike = defaultdict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]](lambda: ([], []))
    for name, target in targets.items():
        into, out_of = alike[target.dtype, weights[name].dtype]
        into.append(target)
        out_of.append(weights[name])
    for into, out_of in alike.values():  # lists of one type each are one launch
        torch._foreach_copy_(into, out_of)


def _scales_and_biases(
    model: nn.Module, pairs: dict[str, str], weights: dict[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """What each folded convolution's weights are multiplied by, and its bias, [out_channels] each."""
    norms: list[Any] = [model.get_submodule(name) for name in pairs.values()]
    sizes = [len(norm.running_mean) for norm in norms]
    mean = torch.cat([norm.running_mean for norm in norms])

    def joined(parts: list[torch.Tensor | None], default: torch.Tensor) -> torch.Tensor:
        """The layers' vectors as one; default where a layer has none."""
        own = zip(parts, default.split(sizes), strict=True)
        return torch.cat([rest if part is None else part for part, rest in own])

    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    variance = torch.cat(torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms]))
    scale = variance.rsqrt() * joined([norm.weight for norm in norms], one)
    before = joined([weights.get(f'{conv}.bias') for conv in pairs], zero)
    bias = (before - mean) * scale + joined([norm.bias for norm in norms], zero)
    return scale.split(sizes), bias.split(sizes)
