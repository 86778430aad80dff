"""Signs that a robust accuracy is not to be trusted: checks after Carlini et al. 2019 (arXiv:1902.06705).

Each check runs on a few images and answers with a sentence, or nothing. They find the usual ways in which a model looks
more robust than it is; passing them proves nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attacks import cross_entropy_of, input_gradient, pgd
from ..threat_model import ThreatModel
from .autoattack import predict

_ZERO_SHARE = 0.1
_SLACK = 2  # images by which noise may reverse an order


def find_problems(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 50,
) -> list[str]:
    """What speaks against trusting an evaluation of this model, one sentence each; empty if nothing was found.

    Args:
        model: images in [0, 1] -> logits, in eval mode, as it is attacked.
        x: some images [B, C, H, W], about 50.
        y: their labels [B].
        threat_model: of the evaluation.
        seed: of the attacks' starts.
        batch_size: images a batch.
    """
    right = predict(model, x, batch_size) == y
    found = _outputs(model, x, right, batch_size)
    if not right.any():
        return found
    return found + _gradients(model, x[right], y[right], threat_model, seed, batch_size)


@torch.no_grad()
def _outputs(model: nn.Module, x: torch.Tensor, right: torch.Tensor, batch_size: int) -> list[str]:
    """A forward pass that is random, depends on the other images of the batch, gives probabilities, or is at chance.

    At chance is less than half above it, and within two standard errors: of two classes 64 % of 50 images, not 75 %.
    """
    found: list[str] = []
    first, second = (torch.cat([model(part) for part in x.split(batch_size)]) for _ in range(2))
    size = first.abs().max().clamp_min(1e-12)
    random = bool((first - second).abs().max() > 1e-4 * size)
    if random:
        found.append(
            'the forward pass is random: two passes of the same images differ; its robustness takes an expectation '
            "over them (EOT), as in pyautoattack's version 'rand'"
        )
    alone = torch.cat([model(image) for image in x[:4].split(1)])
    if not random and (alone - first[:4]).abs().max() > 1e-2 * size:
        found.append('the logits of an image depend on the others of its batch: batch norm in train mode?')
    if first.min() >= 0 and (first.sum(1) - 1).abs().max() < 1e-3:
        found.append('the outputs are probabilities, not logits: losses on them saturate; remove the softmax')
    share, classes = right.float().mean().item(), first.shape[1]
    chance = 1 / classes
    if share < chance + min(chance / 2, 2 * (chance * (1 - chance) / len(x)) ** 0.5):
        found.append(
            f'clean accuracy is {share:.1%} on {len(x)} images, about chance for {classes} classes: untrained, '
            'shuffled labels, or other mean and std than in training?'
        )
    return found


def _gradients(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat_model: ThreatModel, seed: int, batch_size: int
) -> list[str]:
    """Gradients that mislead: zero, not finite, or attacks that do not get stronger with steps or radius.

    The arguments are those of `find_problems`; the model labels the images x right.
    """
    found, n = [], len(x)
    parts = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    zero = lost = 0
    for images, labels in parts:
        grad = input_gradient(cross_entropy_of(model, labels), images)
        zero += int((grad.flatten(1) == 0).all(1).sum())
        lost += int((~grad.flatten(1).isfinite()).any(1).sum())
    if zero > _ZERO_SHARE * n:
        found.append(f'{zero} of {n} images have a gradient of exactly zero: gradients are masked')
    if lost:
        found.append(f'{lost} of {n} images have a gradient that is not finite: no attack by gradient can follow it')

    def left(eps: float, steps: int) -> int:
        """Images that resist PGD."""
        ball = ThreatModel(threat_model.norm, eps, threat_model.bounds)
        generator = torch.Generator(x.device).manual_seed(seed)
        settings: dict[str, Any] = {'steps': steps, 'step_size': 2.5 * eps / steps, 'generator': generator}
        x_adv = torch.cat([pgd(cross_entropy_of(model, labels), images, ball, **settings) for images, labels in parts])
        return int((predict(model, x_adv, batch_size) == y).sum())

    eps, (low, high) = threat_model.eps, threat_model.bounds
    whole = (high - low) * (1.0 if threat_model.norm == 'Linf' else x[0].numel() ** 0.5)  # no bound but the pixels'
    if not 0 < eps < whole / 2:
        return found
    ten = left(eps, 10)
    if (forty := left(eps, 40)) > ten + _SLACK:
        found.append(f'PGD-40 leaves {forty} of {n} images, PGD-10 only {ten}: more steps are not stronger')
    if (wide := left(2 * eps, 10)) > ten + _SLACK:
        found.append(
            f'PGD at twice the radius leaves {wide} of {n} images, at eps {ten}: a larger ball is not stronger'
        )
    if (free := left(whole, 20)) > max(0.1 * n, _SLACK):
        found.append(f'PGD without a bound leaves {free} of {n} images: gradients are masked')
    return found
