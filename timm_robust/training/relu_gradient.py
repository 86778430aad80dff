"""SAT's gradient study: the forward pass stays ReLU, the backward pass takes a smooth function's derivative.

Xie et al. 2020, https://arxiv.org/abs/2006.14536: with the derivative of parametric softplus (alpha 10) in the attack,
in the update of the weights, or in both, a ReLU network trains to be more robust.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..activations import ReLU
from ..models import SharedAct

_ALPHA = 10.0


class _SmoothBackwardReLU(torch.autograd.Function):
    """max(x, 0) forward; s(10 x) as its derivative."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(_ALPHA * x)


def smooth_backward_relu(x: torch.Tensor) -> torch.Tensor:
    """ReLU whose derivative is that of parametric softplus, s(10 x). Any shape and dtype."""
    return _SmoothBackwardReLU.apply(x)


def _call(x: torch.Tensor, params: list[torch.Tensor]) -> torch.Tensor:
    """The same, as our own networks call their activation."""
    return smooth_backward_relu(x)


@contextmanager
def relu_gradient(net: nn.Module, kind: str) -> Iterator[None]:
    """Within, the ReLUs of a network pass back the exact derivative, or a smooth one.

    Args:
        net: a network of ours, or of timm with nn.ReLU modules.
        kind: 'exact' or 'smooth'.

    Raises:
        ValueError: if the network has no ReLU.
    """
    if kind == 'exact':
        yield
        return
    called = [module for module in net.modules() if getattr(module, 'act_fn', None) is ReLU.call]
    owned = [part for module in net.modules() if isinstance(module, SharedAct) for part in module.owner]
    modules = {module for module in (*net.modules(), *owned) if type(module) in (nn.ReLU, ReLU)}
    if not called and not modules:
        raise ValueError(
            f'{type(net).__name__} has no ReLU; the smooth gradient is for networks of ReLU, such as resnet50'
        )
    try:
        for module in called:
            module.act_fn = _call  # type: ignore[assignment]
        for module in modules:
            module.forward = smooth_backward_relu
        yield
    finally:
        for module in called:
            module.act_fn = ReLU.call  # type: ignore[assignment]
        for module in modules:
            del module.forward
