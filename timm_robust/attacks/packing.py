"""Convolutions whose weights stay in the layout that a CPU's kernels read, for networks whose weights do not change.

In eager mode PyTorch hands oneDNN the weights as they lie, and oneDNN copies them into its own layout at every call.
An attack calls one set of weights thousands of times, often with a handful of images, and then the copies of a
ResNet-18's last stage cost more than its arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.grad import conv2d_input

_WORTH_PACKING = 1 << 17
"""Weights from which it pays: below, the copy costs less than the call of a function of ours."""


class PackedConv2d(nn.Module):
    """A convolution of fixed weights, differentiable with respect to its input alone; equal to the given one.

    The gradient of a convolution of stride 1 is a convolution too, with the kernel turned by 180 degrees and its
    channels exchanged; those weights are kept as well. Under autocast, and for types other than float32, it is the
    convolution given.

    Args:
        conv: on a CPU, float32, zero padding, of one group; its weights must not change any more.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        weight = conv.weight.detach()
        self.forward_args = _arguments(weight, conv.bias, conv.padding, conv)
        self.backward_args: tuple[Any, ...] | None = None
        sizes: Any = zip(conv.dilation, conv.kernel_size, conv.padding, strict=True)
        padding = tuple(dilation * (kernel - 1) - before for dilation, kernel, before in sizes)
        if conv.stride == (1, 1) and min(padding) >= 0:
            turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            self.backward_args = _arguments(turned, None, padding, conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps [B, K, H', W'] of feature maps [B, C, H, W]."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled('cpu'):
            return self.conv(x)
        return _Convolution.apply(x, self)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: PackedConv2d) -> torch.Tensor:
        ctx.packed, ctx.shape = packed, x.shape
        return _convolve(x, packed.forward_args)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.packed.backward_args is not None:
            return _convolve(grad, ctx.packed.backward_args), None
        conv = ctx.packed.conv
        settings = conv.stride, conv.padding, conv.dilation, conv.groups
        return conv2d_input(ctx.shape, conv.weight, grad, *settings), None


def _arguments(weight: torch.Tensor, bias: torch.Tensor | None, padding: Any, conv: nn.Conv2d) -> tuple[Any, ...]:
    """What torch.ops.mkldnn._convolution_pointwise takes after the input; the weights packed."""
    settings = padding, conv.stride, conv.dilation, 1
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *settings), bias, *settings


def _convolve(x: torch.Tensor, arguments: tuple[Any, ...]) -> torch.Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, *arguments, 'none', [], '')


def pack_convolutions(net: nn.Module, least: int = _WORTH_PACKING) -> int:
    """Exchange a network's convolutions for packed ones, where that is possible and pays.

    Args:
        net: in fp32, its weights final; changed in place.
        least: smallest number of weights of a convolution to exchange.

    Returns:
        How many were exchanged; 0 where PyTorch has no oneDNN or not the two operators that Inductor, too, calls.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    count = 0
    for name, conv in list(net.named_modules()):
        if name and type(conv) is nn.Conv2d and conv.weight.numel() >= least and _packable(conv):
            try:
                net.set_submodule(name, PackedConv2d(conv))
            except (AttributeError, RuntimeError):  # another version of PyTorch
                break
            count += 1
    return count


def _packable(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
    return plain and conv.weight.device.type == 'cpu' and conv.weight.dtype == torch.float32
