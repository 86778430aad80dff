"""Gradient attacks, composed of the literature's parts: initialise, take a step, project, and a loss to climb.

An attack here knows neither model nor labels: it climbs `loss_fn: x -> [B]`, so that Madry's, TRADES' and an
evaluator's attacks differ by the surrogate they hand in and by nothing else:

    surrogate = lambda x: F.cross_entropy(model(x), y, reduction='none')
    with attacked(model):
        x_adv = pgd(surrogate, x, ThreatModel('Linf', '8/255'), steps=10, step_size=2 / 255)

- FGSM with random start: Wong, Rice, Kolter 2020, https://arxiv.org/abs/2001.03994
- PGD: Madry et al. 2018, https://arxiv.org/abs/1706.06083
- Noise-FGSM: de Jorge et al. 2022, https://arxiv.org/abs/2202.01181
- Auto-PGD: Croce and Hein 2020, https://arxiv.org/abs/2003.01690
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from ..threat_model import ThreatModel

LossFn = Callable[[torch.Tensor], torch.Tensor]
"""Images [B, C, H, W] -> what the attacker climbs, one value an image, [B]."""

Attack = Callable[[LossFn, torch.Tensor], torch.Tensor]
"""(loss_fn, x) -> x_adv."""


def input_gradient(loss_fn: LossFn, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed loss with respect to x, [B, C, H, W]; leaves every `.grad` alone."""
    return _gradient_and_loss(loss_fn, x)[0]


def pgd(
    loss_fn: LossFn,
    x: torch.Tensor,
    threat_model: ThreatModel,
    *,
    steps: int,
    step_size: float,
    random_start: bool = True,
    start_noise: float | None = None,
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
        start_noise: the random start is x plus Gaussian noise of this standard deviation, projected, instead of a
            point of the ball; TRADES' code takes 0.001.
        generator: source of the random start.

    Returns:
        Adversarial images, detached, inside the threat model.
    """
    x = x.detach()
    x_adv = x
    if random_start and start_noise is not None:
        noise = torch.empty_like(x).normal_(generator=generator)
        x_adv = threat_model.project(x + start_noise * noise, x)
    elif random_start:
        x_adv = threat_model.random_start(x, generator)
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


def n_fgsm(
    loss_fn: LossFn,
    x: torch.Tensor,
    threat_model: ThreatModel,
    *,
    noise: float = 2.0,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Noise-FGSM: a step of eps from x plus noise of radius `noise` eps, not projected onto the ball.

    de Jorge et al. 2022, https://arxiv.org/abs/2202.01181: the noise beyond eps is what keeps single-step training
    from collapsing. For training only: the result leaves the ball by up to `noise` eps, and stays within the bounds.
    """
    radius, (low, high) = noise * threat_model.eps, threat_model.bounds
    wide = replace(threat_model, eps=min(radius, high - low) if threat_model.norm == 'Linf' else radius)
    start = wide.random_start(x.detach(), generator)
    step_size = threat_model.eps if step_size is None else step_size
    return threat_model.step(start, input_gradient(loss_fn, start), step_size).clamp(*threat_model.bounds)


def apgd(
    loss_fn: LossFn,
    x: torch.Tensor,
    threat_model: ThreatModel,
    *,
    steps: int,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Auto-PGD: momentum 0.75, and a step size from 2 eps down that is halved for the images that stop improving.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1, as the authors' code runs it: point for point
    their APGD-CE where `loss_fn` is the cross-entropy. It has no step size to choose, and returns the best point that
    it saw.

    Args:
        loss_fn: what to climb, one value an image.
        x: images [B, C, H, W] in [0, 1].
        threat_model: the allowed perturbations.
        steps: number of gradients taken after the first.
        random_start: start at a random point of the ball.
        generator: source of the random start.
    """
    x = x.detach()
    x_adv = threat_model.random_start(x, generator) if random_start else x
    size = x.new_full((len(x), *[1] * (x.ndim - 1)), 2 * threat_model.eps)
    grad, loss = _gradient_and_loss(loss_fn, x_adv)
    best, best_loss, best_grad = x_adv, loss, grad
    previous, last_best, last_halved = x_adv, loss, torch.ones_like(loss, dtype=torch.bool)
    loss = torch.zeros_like(loss)  # the authors' code compares the first step with 0, not with the start
    rises, checkpoints, start = torch.zeros_like(loss), _checkpoints(steps), 0
    for k in range(steps):
        z = threat_model.project(threat_model.step(x_adv, grad, size), x)
        momentum = 1.0 if k == 0 else 0.75
        new = threat_model.project(x_adv + momentum * (z - x_adv) + (1 - momentum) * (x_adv - previous), x)
        previous, x_adv, old_loss = x_adv, new, loss
        grad, loss = _gradient_and_loss(loss_fn, x_adv)
        rises, better = rises + (loss > old_loss), loss > best_loss
        best, best_grad = _where(better, x_adv, best), _where(better, grad, best_grad)
        best_loss = torch.where(better, loss, best_loss)
        if k + 1 in checkpoints:
            halve = (rises <= 0.75 * (k + 1 - start)) | (~last_halved & (last_best >= best_loss))
            size = _where(halve, size / 2, size)
            # `loss` stays that of the point left behind: so the authors' code counts the next rise
            x_adv, grad = _where(halve, best, x_adv), _where(halve, best_grad, grad)
            last_best, last_halved, rises, start = best_loss, halve, torch.zeros_like(rises), k + 1
    return best


def _checkpoints(steps: int) -> set[int]:
    """When Auto-PGD looks back: after 22 % of the steps, then at distances that shrink by 3 % down to 6 %.

    Each share is rounded down to whole steps, but to 1 at least, as in the authors' code. The paper rounds the sum up
    instead: after 3, 5, 6, 8, 9 and 10 of 10 steps, not after 2, 3, 4, ..., 10.
    """
    distance, shrink, least = (max(steps * percent // 100, 1) for percent in (22, 3, 6))
    points, now = set(), distance
    while now <= steps:
        points.add(now)
        distance = max(distance - shrink, least)
        now += distance
    return points


def _gradient_and_loss(loss_fn: LossFn, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the summed loss [B, C, H, W], and the loss of each image [B]."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(x)
        (grad,) = torch.autograd.grad(loss.sum(), x)
    return grad, loss.detach()


def _where(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.where with a mask [B] over images."""
    return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)


@contextmanager
def attacked(model: nn.Module, bn: str = 'eval') -> Iterator[None]:
    """Make a model ready to be attacked, and leave it as it was: parameters frozen, batch norm's mode explicit.

    Args:
        model: any network.
        bn: 'eval' attacks the network as it is deployed. 'train' normalises with the batch's own statistics, and
            leaves the running ones alone.

    Raises:
        ValueError: for another mode.
    """
    if bn not in ('eval', 'train'):
        raise ValueError(f'attack_bn {bn!r} is unknown; allowed: eval, train')
    training = [module for module in model.modules() if module.training]
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.train(bn == 'train')
    for p in frozen:
        p.requires_grad_(False)
    try:
        with frozen_statistics(model):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
        model.eval()
        for module in training:
            module.training = True


def batch_norms(model: nn.Module) -> list[Any]:
    """The batch norms of a network that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kind) and module.track_running_stats]


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm in its present mode, its running statistics untouched."""
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    counts: list[Any] = [norm.num_batches_tracked for norm in norms if norm.training]
    kept = torch.stack(counts) if counts else None  # the buffers stay where they are, as compiled code expects
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if kept is not None:
            torch._foreach_copy_(counts, list(kept))
