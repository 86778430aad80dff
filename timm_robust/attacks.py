"""Gradient attacks, composed of the literature's parts: initialise, take a step, project, and a loss to climb.

An attack here knows neither model nor labels: it climbs `loss_fn: x -> [B]`, so that Madry's, TRADES' and an
evaluator's attacks differ by the surrogate they hand in and by nothing else:

    surrogate = lambda x: F.cross_entropy(model(x), y, reduction='none')
    with attacked(model):
        x_adv = pgd(surrogate, x, ThreatModel('Linf', '8/255'), steps=10, step_size=2 / 255)

- FGSM with random start: Wong, Rice, Kolter 2020, https://arxiv.org/abs/2001.03994
- PGD: Madry et al. 2018, https://arxiv.org/abs/1706.06083
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn

from .threat_model import ThreatModel

LossFn = Callable[[torch.Tensor], torch.Tensor]
"""Images [B, C, H, W] -> what the attacker climbs, one value an image, [B]."""

Attack = Callable[[LossFn, torch.Tensor], torch.Tensor]
"""(loss_fn, x) -> x_adv."""

BN_MODES = ('eval', 'train')


def input_gradient(loss_fn: LossFn, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed loss with respect to x, [B, C, H, W]; leaves every `.grad` alone."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(loss_fn(x).sum(), x)
    return grad


def pgd(
    loss_fn: LossFn,
    x: torch.Tensor,
    threat_model: ThreatModel,
    *,
    steps: int,
    step_size: float,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Projected gradient ascent: x <- project(step(x, grad)), from a random point of the ball or from x itself.

    Args:
        loss_fn: what to climb, one value an image.
        x: images [B, C, H, W] in [0, 1].
        threat_model: the allowed perturbations.
        steps: number of gradients taken; 0 returns the start.
        step_size: length of a step in the threat model's norm, in pixels.
        random_start: start at a random point of the ball. A loss that is least at x, such as TRADES' KL divergence,
            needs it.
        generator: source of the random start.

    Returns:
        Adversarial images, detached, inside the threat model.
    """
    x = x.detach()
    x_adv = threat_model.random_start(x, generator) if random_start else x
    for _ in range(steps):
        grad = input_gradient(loss_fn, x_adv)
        x_adv = threat_model.project(threat_model.step(x_adv, grad, step_size), x)
    return x_adv


def fgsm(
    loss_fn: LossFn,
    x: torch.Tensor,
    threat_model: ThreatModel,
    *,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One step of PGD, of 1.25 eps unless said otherwise (Wong et al. 2020); exact where the loss is linear in x."""
    if step_size is None:
        step_size = 1.25 * threat_model.eps if random_start else threat_model.eps
    return pgd(loss_fn, x, threat_model, steps=1, step_size=step_size, random_start=random_start, generator=generator)


@contextmanager
def attacked(model: nn.Module, bn: str = 'eval') -> Iterator[None]:
    """Make a model ready to be attacked, and leave it as it was: parameters frozen, batch norm's mode explicit.

    Args:
        model: any network.
        bn: 'eval' attacks the network as it is deployed. 'train' normalises with the batch's own statistics, and
            leaves the
            running ones alone.

    Raises:
        ValueError: for another mode.
    """
    if bn not in BN_MODES:
        raise ValueError(f'attack_bn {bn!r} is unknown; allowed: {", ".join(BN_MODES)}')
    training = [module for module in model.modules() if module.training]
    frozen = [p for p in model.parameters() if p.requires_grad]
    momenta = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.train(bn == 'train')
    for p in frozen:
        p.requires_grad_(False)
    if bn == 'train':
        for module, _ in momenta:
            module.momentum = 0.0
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
        if bn == 'train':
            for module, momentum in momenta:
                module.momentum = momentum
        model.eval()
        for trained in training:
            trained.training = True
