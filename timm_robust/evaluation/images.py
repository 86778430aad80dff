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
from ..threat_model import ThreatModel, check_images, resolved_step_size
from .autoattack import autoattack
from .runner import Fp32Logits, check_counts, device_of

METHODS = ('pgd', 'autoattack')


def attack(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel | None = None,
    *,
    method: str = 'pgd',
    steps: int = 10,
    step_size: float | str | None = None,
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
        step_size: of PGD, in pixels, such as '2/255'; 2.5 eps / steps if None, and 2 eps at most.
        batch_size: images a batch.
        seed: of the attack.

    Returns:
        Images [N, C, H, W] of float32, inside the ball and the pixel range, on the device of x; the model may be on
        another, and of any floating type.

    Raises:
        ImportError: if pyautoattack is missing, for 'autoattack'.
        ValueError: for another method, for settings that no attack can have, and for tensors that are no images in
            [0, 1] with labels of the model's classes.
    """
    threat_model = threat_model or ThreatModel()
    if method not in METHODS:
        raise ValueError(f'method {method!r} is unknown; allowed: {", ".join(METHODS)}')
    check_counts(steps=steps, batch_size=batch_size)
    step = resolved_step_size(step_size, threat_model.eps, steps, 'step_size')
    check_images(x, y)
    threat_model.check_scale()
    network = pixel_input(model)
    if method == 'autoattack':
        return autoattack(network, x, y, threat_model, batch_size=batch_size, seed=seed).x_adv
    logits, device, x, parts = Fp32Logits(network), device_of(network, x), x.detach().float(), list[torch.Tensor]()
    generator = torch.Generator(device).manual_seed(seed)
    with attacked(network):
        with torch.no_grad():
            check_images(x, y, logits(x[:1].to(device)).shape[1])
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            climb = cross_entropy_of(logits, labels.to(device).long())
            found = pgd(climb, images.to(device), threat_model, steps=steps, step_size=step, generator=generator)
            parts.append(found.to(x.device))
    return torch.cat(parts)
