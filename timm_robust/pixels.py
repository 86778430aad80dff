"""Images as pixels in [0, 1], and any timm model as one that takes them: eps is in pixels whatever its mean and std."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images of 0..255 as float32 in [0, 1], with the same bits on every device.

    A GPU would multiply by the inverse of a divisor that is a number: up to one bit off.
    """
    return images.float().div_(torch.full((), 255.0, device=images.device))


def resized(x: torch.Tensor, side: int | None) -> torch.Tensor:
    """Images [B, C, H, W] brought to `side` x `side` pixels, bilinearly and with antialiasing; None: as they are."""
    if side is None or x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode='bilinear', antialias=True).clamp_(0, 1)


def input_channels(model: nn.Module) -> int | None:
    """Channels of the images that a model takes, 1 or 3: those of its first convolution; None if it has others or none.

    A first convolution may see pixels that were moved into channels, as TResNet's 48.
    """
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first if first in (1, 3) else None


class PixelInput(nn.Module):
    """A model that takes pixels: model((x - mean) / std), so that eps is in pixels.

    Args:
        model: a network that takes normalised images.
        mean: mean of each channel, on the [0, 1] scale.
        std: standard deviation of each channel.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Hold the statistics beside the model, on its device."""
        super().__init__()
        device = next((p.device for p in model.parameters()), None)
        self.model = model
        self.register_buffer('mean', torch.tensor(mean, device=device).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std, device=device).view(-1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, C, H, W] in [0, 1]."""
        if len(self.mean) not in (1, x.shape[1]):
            raise ValueError(
                f'it normalises {len(self.mean)} channels; create it with the statistics of these images, for example '
                "pretrained_cfg_overlay={'mean': (0.5,), 'std': (0.5,)}"
            )
        return self.model(((x.float() - self.mean) / self.std).to(x.dtype))


class Resized(nn.Module):
    """A model that takes images of any size: they are resized, bilinearly, inside the gradient.

    Args:
        model: a network that takes square images of one size.
        img_size: that size.
    """

    def __init__(self, model: nn.Module, img_size: int) -> None:
        super().__init__()
        self.model, self.img_size = model, img_size

    def extra_repr(self) -> str:
        """The size, which is part of what the model is."""
        return f'img_size={self.img_size}'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, C, H, W]."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            x = F.interpolate(x, (self.img_size, self.img_size), mode='bilinear', antialias=False)
        return self.model(x)


def pixel_input(model: nn.Module, img_size: int | None = None) -> nn.Module:
    """The model as one that takes pixels, of any size if img_size is given; itself where there is nothing to do.

    A pretrained_cfg with mean 0 and std 1, or without such entries, needs no normalisation. Statistics of three colours
    are averaged for a network of grey images, as timm's loader does. img_size None is what
    pretrained_cfg holds under 'img_size', where load_model puts the size that a run resized its images to.

    Raises:
        ValueError: for a mean that is not finite, or a std that is not finite and positive.
    """
    img_size = img_size or (getattr(model, 'pretrained_cfg', None) or {}).get('img_size')
    model = _normalised(model)
    return Resized(model, img_size) if img_size else model


def _normalised(model: nn.Module) -> nn.Module:
    config = getattr(model, 'pretrained_cfg', None) or {}
    mean = (0.0,) if config.get('mean') is None else config['mean']
    std = (1.0,) if config.get('std') is None else config['std']
    _check_statistics('mean', mean, -math.inf, 'finite numbers')
    _check_statistics('std', std, 0, 'finite numbers > 0')
    if set(mean) == {0.0} and set(std) == {1.0}:
        return model
    if input_channels(model) == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return PixelInput(model, mean, std)


def _check_statistics(name: str, values: Sequence[float], above: float, allowed: str) -> None:
    """Refuse what no channel has: it would make every logit NaN, which no attack can lower."""
    numbers = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
    if not numbers or not values or not all(above < value < math.inf for value in values):
        raise ValueError(f"pretrained_cfg's {name} {values!r} cannot be; allowed: {allowed}, one a channel")
