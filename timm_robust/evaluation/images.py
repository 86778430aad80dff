"""Adversarial images of a batch, for any classifier, in one call.

>>> import torch
>>> from timm_robust import ThreatModel, attack, load_model
>>> model = load_model('resnet18_pssilu', width=4)  # or a released name, the folder of a run, any torch module
>>> x, y = torch.rand(2, 3, 32, 32), torch.tensor([3, 5])
>>> x_adv = attack(model, x, y, ThreatModel('Linf', '8/255'))
>>> float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
True
"""

from __future__ import annotations

import torch
from torch import nn

from ..attacks import attacked, cross_entropy_of, pgd
from ..pixels import pixel_input
from ..threat_model import ThreatModel, check_images
from .autoattack import autoattack

METHODS = ('pgd', 'autoattack')


def attack(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel | None = None,
    *,
    method: str = 'pgd',
    steps: int = 10,
    step_size: float | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> torch.Tensor:
    """Adversarial images of a batch; the model is left as it was.

    Args:
        model: images -> logits, in whatever mode; a timm model's mean and std are applied inside the attacked function.
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat_model: norm and radius in pixels; Linf 8/255 if None.
        method: 'pgd' climbs the cross-entropy from a random start (Madry et al. 2018), and returns its last image,
            whether it fools the model or not; 'autoattack' is the standard AutoAttack (Croce and Hein 2020), and
            returns the image itself where nothing was found.
        steps: of PGD.
        step_size: of PGD, in pixels; 2.5 eps / steps if None.
        batch_size: images a batch.
        seed: of the attack.

    Returns:
        Images [N, C, H, W], inside the ball and the pixel range, on the device of x.

    Raises:
        ImportError: if pyautoattack is missing, for 'autoattack'.
        ValueError: for another method, and for tensors that are no images in [0, 1] with labels.
    """
    threat_model = threat_model or ThreatModel()
    if method not in METHODS:
        raise ValueError(f'method {method!r} is unknown; allowed: {", ".join(METHODS)}')
    check_images(x, y)
    threat_model.check_scale()
    network = pixel_input(model)
    if method == 'autoattack':
        return autoattack(network, x, y, threat_model, batch_size=batch_size, seed=seed).x_adv
    step = 2.5 * threat_model.eps / steps if step_size is None else step_size
    generator = torch.Generator(x.device).manual_seed(seed)
    parts = []
    with attacked(network):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            climb = cross_entropy_of(network, labels)
            parts.append(pgd(climb, images, threat_model, steps=steps, step_size=step, generator=generator))
    return torch.cat(parts)
