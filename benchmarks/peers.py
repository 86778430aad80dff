"""What our training step is compared with: textbook networks, activations written out, and the usual loops around them.

The networks have the parameter names of ours, so that a test can give both the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(sys.prefix) / 'peers'
"""Where `make bench` installs torchattacks: in the environment itself it would overwrite parts of RobustBench."""
sys.path.append(str(FOLDER))
EPS, ALPHA = 8 / 255, 2 / 255


class PSSiLU(nn.Module):
    """The formula as the paper prints it; one for the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 1e-8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] to [...]."""
        return x * (torch.sigmoid(self.alpha.abs() * x) - self.beta.abs()) / (1 - self.beta.abs())


ACTIVATIONS = {'pssilu': PSSiLU, 'silu': nn.SiLU, 'relu': nn.ReLU}


class BasicBlock(nn.Module):
    """He et al. 2015: conv, norm, act, conv, norm, add, act."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))

    def forward(self, x: torch.Tensor, act: nn.Module) -> torch.Tensor:
        """[B, in_chs, H, W] to [B, out_chs, H / stride, W / stride]."""
        y = self.bn2(self.conv2(act(self.bn1(self.conv1(x)))))
        return act(y + self.downsample(x))


class PreActBlock(nn.Module):
    """Zagoruyko and Komodakis 2016: norm, act, conv, norm, act, conv, add."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if in_chs != out_chs else None

    def forward(self, x: torch.Tensor, act: nn.Module) -> torch.Tensor:
        """[B, in_chs, H, W] to [B, out_chs, H / stride, W / stride]."""
        y = act(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(act(self.bn2(self.conv1(y))))


class Peer(nn.Module):
    """resnet18_<act> or wrn28_10_<act> for 32x32 images, as one writes it without a library; width is the stem's."""

    def __init__(self, name: str, width: int | None = None) -> None:
        super().__init__()
        family, _, act = name.rpartition('_')
        self.act = ACTIVATIONS[act]()
        self.preact = family == 'wrn28_10'
        stem = 16 if self.preact else width or 64
        chs = [160, 320, 640] if self.preact else [stem * 2**i for i in range(4)]
        block, depth = (PreActBlock, 4) if self.preact else (BasicBlock, 2)
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.Identity() if self.preact else nn.BatchNorm2d(stem)
        stages, before = [], stem
        for i, out_chs in enumerate(chs):
            sizes = [(before, out_chs, 1 if i == 0 else 2)] + [(out_chs, out_chs, 1)] * (depth - 1)
            stages.append(nn.ModuleList(block(*size) for size in sizes))
            before = out_chs
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(before) if self.preact else nn.Identity()
        self.fc = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of images [B, 3, 32, 32]."""
        x = self.conv1(x)
        if not self.preact:
            x = self.act(self.bn1(x))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, self.act)
        if self.preact:
            x = self.act(self.norm(x))
        return self.fc(x.mean((2, 3)))


def pgd_at_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int
) -> torch.Tensor:
    """Torchattacks' PGD in eval mode, then a step on the cross-entropy; returns the loss.

    Raises:
        ImportError: without torchattacks, with what to type.
    """
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(
            f'the peer is torchattacks; type: pip install --no-deps --target {FOLDER} torchattacks'
        ) from error
    model.eval()
    alpha = ALPHA if steps > 1 else 1.25 * EPS
    x_adv = torchattacks.PGD(model, eps=EPS, alpha=alpha, steps=steps, random_start=True)(x, y)
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def trades_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int
) -> torch.Tensor:
    """TRADES with beta 6 as its paper states it (Zhang et al. 2019): the clean logits anew in each attack step."""
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        x_adv.requires_grad_()
        kl = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction='sum')
        grad = torch.autograd.grad(kl, x_adv)[0]
        x_adv = x_adv.detach() + ALPHA * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    clean = model(x)
    kl = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(clean, 1), reduction='batchmean')
    loss = F.cross_entropy(clean, y) + 6 * kl
    loss.backward()
    optimizer.step()
    return loss.detach()
