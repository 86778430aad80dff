"""The equal, faster network that AutoAttack searches on; the model gives the verdicts."""

from __future__ import annotations

import time

import torch
from torch import nn

from ..activations import Kernels, compiled_kernels, has_kernels, using
from ..attacks import FoldedNet
from ..precision import ieee_fp32
from .runner import device_of, dtype_of

_TOLERANCE = 1e-4  # of the logits' largest value
_LEAST_FORWARDS = 300  # that AutoAttack takes for an image
_WORTH_SECONDS = 15.0


class ChannelsLast(nn.Module):
    """A network that is called with channels-last images.

    Args:
        net: the network.
        kernels: of `pssilu.compiled_kernels`, by which its activation runs; None for eager mode.
    """

    def __init__(self, net: nn.Module, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.net, self.kernels = net, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, C, H, W]."""
        with using(self.kernels):
            return self.net(x.contiguous(memory_format=torch.channels_last))


def search_model(model: nn.Module, x: torch.Tensor, images: int = 0) -> nn.Module | None:
    """An equal network for the attacks: batch norm folded into the convolutions, channels-last; None if there is none.

    Args:
        model: images in [0, 1] -> logits, in fp32 and eval mode; left as it is.
        x: some images [B, C, H, W]; the two must agree on them.
        images: how many are to be attacked; where that takes minutes, its activation is compiled (seconds): it alone,
            because AutoAttack's batches shrink, and kernels are made once for all sizes.
    """
    if dtype_of(model) != torch.float32:
        return None
    x = x.to(device_of(model, x))
    folded = FoldedNet(model, x[:2])
    with torch.no_grad(), ieee_fp32():
        started = time.perf_counter()
        expected = model(x)
        seconds = _LEAST_FORWARDS * images / len(x) * (time.perf_counter() - started)
        search = ChannelsLast(folded.net, _kernels(model, x.device) if seconds > _WORTH_SECONDS else None)
        differ = (search(x) - expected).abs().max() > _TOLERANCE * expected.abs().max()
    return None if not folded.pairs or differ else search


def _kernels(model: nn.Module, device: torch.device) -> Kernels | None:
    """Compiled kernels for a network whose activation has them; None without a compiler."""
    if not has_kernels(model, device.type):
        return None
    try:
        return compiled_kernels(device.type)
    except RuntimeError:  # no compiler: eager mode does the same
        return None
