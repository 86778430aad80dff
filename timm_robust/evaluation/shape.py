"""What an activation's shape does to robustness, measured on one network (Dai et al. 2021, arXiv:2110.05626v1).

Standard training leaves next to no robust accuracy at 8/255, so that paper measures radii, black-box success and local
Lipschitz constants as well; all of them are here, next to accuracies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..activations import Activation
from ..attacks import cross_entropy, input_gradient, labels_of, pgd
from ..threat_model import ThreatModel
from .runner import upstream

_STEPS = 10  # of PGD
_NEGATIVE = (-5.0, -2.0, -1.0, -0.5)


def minimal_radii(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    largest: float = 0.5,
    rounds: int = 12,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Smallest Linf radius at which PGD changes each image's label, by bisection: an upper bound of the true radius.

    The paper searches from 0.05 with four steps of PGD and halves its moves; a bracket that is halved `rounds` times
    finds the same number to largest / 2^rounds.

    Args:
        model: images in [0, 1] -> logits, in eval mode.
        x: images [B, C, H, W].
        y: labels [B].
        largest: radius of the first try, in pixels; what resists there gets this radius.
        rounds: halvings of the bracket, each with PGD-10.
        generator: source of the random starts.

    Returns:
        Radii [B] in pixels; 0 where the label is wrong from the start.
    """
    with torch.no_grad():
        right = labels_of(model(x)) == y
    high = largest * right
    low = torch.where(_broken(model, x, y, high, generator), 0, high)  # what resists the largest keeps it
    for _ in range(rounds):
        eps = (low + high) / 2
        broken = _broken(model, x, y, eps, generator)
        low, high = torch.where(broken, low, eps), torch.where(broken, eps, high)
    return high


def _broken(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Which images fall to PGD-10 from a random start within a Linf radius of their own, [B].

    Steps are projected on ball and pixels both. Clipping to the pixels inside of what is attacked would not do: where
    a start lies beyond them the gradient is 0, and the pixel stays at its bound.
    """
    radius = eps.view(-1, 1, 1, 1)
    low, high = (x - radius).clamp_min(0), (x + radius).clamp_max(1)
    x_adv = x + radius * torch.empty_like(x).uniform_(-1, 1, generator=generator)
    x_adv = x_adv.clamp(low, high)
    for _ in range(_STEPS):
        gradient = input_gradient(lambda z: cross_entropy(model(z), y), x_adv)
        x_adv = (x_adv + 2.5 / _STEPS * radius * gradient.sign()).clamp(low, high)
    with torch.no_grad():
        return labels_of(model(x_adv)) != y


def square_success(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float, queries: int = 1000) -> float:
    """Share of the rightly labelled images that Square (Andriushchenko et al. 2020) breaks with so many queries.

    Args:
        model: images in [0, 1] -> logits, in eval mode.
        x: images [B, C, H, W].
        y: labels [B].
        eps: Linf radius in pixels.
        queries: forward passes an image.

    Raises:
        ImportError: if pyautoattack is missing.
    """
    with torch.no_grad():
        right = labels_of(model(x)) == y
    if not right.any():
        return 0.0
    runner = upstream().AutoAttack(model, norm='Linf', eps=eps, seed=0, version='standard', device=x.device)
    runner.square.n_queries = queries
    runner.square.seed = 0
    found = runner.square.perturb(x[right], y[right])
    with torch.no_grad():
        return float((labels_of(model(found)) != y[right]).float().mean())


def local_lipschitz(model: nn.Module, x: torch.Tensor, eps: float, generator: torch.Generator | None = None) -> float:
    """Mean over images of |f(x') - f(x)|_1 / |x' - x|_inf, x' the end of PGD-10 on |f(x') - f(x)|_1 within eps of x.

    Args:
        model: images in [0, 1] -> logits f, in eval mode.
        x: images [B, C, H, W].
        eps: Linf radius in pixels.
        generator: source of the random start.
    """
    with torch.no_grad():
        output = model(x)
    x_far = pgd(
        lambda z: (model(z) - output).abs().sum(1),
        x,
        ThreatModel('Linf', eps),
        steps=_STEPS,
        step_size=2.5 * eps / _STEPS,
        generator=generator,
    )
    with torch.no_grad():
        change = (model(x_far) - output).abs().sum(1)
    distance = (x_far - x).abs().flatten(1).amax(1).clamp_min(1e-12)
    return float((change / distance).mean())


def set_shape(act: Activation, values: dict[str, float], learned: bool = False) -> None:
    """Give an activation's parameters these values, and let training change them or not.

    Raises:
        ValueError: for a parameter that it does not have.
    """
    for name, value in values.items():
        if name not in act.initial:
            raise ValueError(
                f'{type(act).__name__} has no parameter {name!r}; it has {", ".join(act.initial) or "none"}'
            )
        with torch.no_grad():
            getattr(act, name).fill_(value)
    for parameter in act.parameters():
        parameter.requires_grad_(learned)


def curve_facts(act: Activation) -> dict[str, Any]:
    """The curve's own numbers: max abs(f''), value at 0, minimum, and outputs at negative inputs."""
    shape = act.shape()
    points = torch.tensor(_NEGATIVE, device=next(act.parameters(), torch.zeros(1)).device)
    with torch.no_grad():
        outputs = act(points).tolist()
    facts = {'max_curvature': shape.max_curvature, 'value_at_zero': shape.value_at_zero, 'minimum': shape.minimum}
    return facts | {f'f({point:g})': value for point, value in zip(_NEGATIVE, outputs, strict=True)}
