"""The networks that AutoAttack searches on: an equal, faster one, and a coarser one; the model gives the verdicts."""

from __future__ import annotations

import torch
from torch import nn

from .autoattack_runner import device_of, dtype_of
from .folding import FoldedNet

_TOLERANCE = 1e-4  # of the logits' largest value


class ChannelsLast(nn.Module):
    """A network that is called with channels-last images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, C, H, W]."""
        return self.net(x.contiguous(memory_format=torch.channels_last))


class Bf16(nn.Module):
    """A network whose convolutions and matrix products run in bfloat16, to screen images with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, C, H, W]."""
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x)


def search_model(model: nn.Module, x: torch.Tensor) -> nn.Module | None:
    """An equal network for the attacks: batch norm folded into the convolutions, channels-last; None if there is none.

    Args:
        model: images in [0, 1] -> logits, in fp32; left as it is.
        x: some images [B, C, H, W]; the two must agree on them.
    """
    if dtype_of(model) != torch.float32:
        return None
    x = x.to(device_of(model, x))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        folded = FoldedNet(model, x[:2])
        search = ChannelsLast(folded.net)
        with torch.no_grad():
            expected = model(x)
            differ = (search(x) - expected).abs().max() > _TOLERANCE * expected.abs().max()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return None if not folded.pairs or differ else search
