"""Losses of adversarial training. Each is two functions: how the images are attacked, and what is descended on them.

- `pgd_at`: Madry et al. 2018, https://arxiv.org/abs/1706.06083
- `trades`: Zhang et al. 2019, https://arxiv.org/abs/1901.08573
- `mart`: Wang et al. 2020, https://openreview.net/forum?id=rklOg6EFwS
- `clean`: ordinary training, the control.

`model` maps pixels in [0, 1] to logits [B, K]; `attack(surrogate, x)` gives adversarial images; the mode
that the model is attacked in is set by the attack or by who calls it. Labels are class numbers [B], or class
probabilities [B, K] (mixup). Losses are computed in fp32 whatever the precision of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..attacks import Attack, Model, climb_cross_entropy, kl_divergence


class AdvLoss(NamedTuple):
    """A training loss.

    Args:
        loss: scalar to descend.
        logits: on the adversarial images [B, K], which the log's accuracy is of; of clean training on the clean ones.
    """

    loss: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """A loss of adversarial training.

    Args:
        perturb: (model, attack, x, y) -> x_adv: attack the images, on this loss's surrogate.
        descend: (model, x, x_adv, y) -> AdvLoss: what the weights descend, the adversarial images being fixed.
    """

    perturb: Callable[[Model, Attack, torch.Tensor, torch.Tensor], torch.Tensor]
    descend: Callable[[Model, torch.Tensor, torch.Tensor, torch.Tensor], AdvLoss]


def pgd_at(smoothing: float = 0.0) -> Loss:
    """Cross-entropy on adversarial images, which climb the same cross-entropy: min_w max_d CE(f_w(x + d), y)."""

    def descend(model: Model, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> AdvLoss:
        output_adv = model(x_adv)
        return AdvLoss(F.cross_entropy(output_adv.float(), y, label_smoothing=smoothing), output_adv)

    return Loss(climb_cross_entropy, descend)


def trades(beta: float = 6.0, smoothing: float = 0.0) -> Loss:
    """CE(f(x), y) + beta KL(f(x) || f(x_adv)), where x_adv climbs the KL divergence; beta = 0 is clean training.

    The attacker's target f(x) is computed once an attack, in the mode that the attack runs in.
    """

    def perturb(model: Model, attack: Attack, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        target: list[torch.Tensor] = []

        def climb(x_adv: torch.Tensor) -> torch.Tensor:
            if not target:  # inside the attack, so that the model is in the attack's mode
                with torch.no_grad():
                    target.append(model(x))
            return kl_divergence(model(x_adv), target[0])

        return attack(climb, x)

    def descend(model: Model, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> AdvLoss:
        output, output_adv = model(x), model(x_adv)
        natural = F.cross_entropy(output.float(), y, label_smoothing=smoothing)
        return AdvLoss(natural + beta * kl_divergence(output_adv, output).mean(), output_adv)

    return Loss(perturb, descend)


def mart(beta: float = 5.0, smoothing: float = 0.0) -> Loss:
    """BCE(f(x_adv), y) + beta KL(f(x) || f(x_adv)) (1 - p_y(x)): more weight on images that are wrong clean.

    BCE = -log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv)); x_adv climbs the cross-entropy. Needs class numbers as
    labels.
    """

    def descend(model: Model, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> AdvLoss:
        if y.ndim != 1:
            raise ValueError('MART needs one class an image; use it without mixup and cutmix')
        output, output_adv = model(x), model(x_adv)
        wrong = output_adv.float().softmax(1).scatter(1, y[:, None], 0.0).amax(1)
        margin = -torch.log1p(-wrong.clamp(max=1 - 1e-6)).mean()
        boosted = F.cross_entropy(output_adv.float(), y, label_smoothing=smoothing) + margin
        p_true = output.float().softmax(1).gather(1, y[:, None])[:, 0]
        return AdvLoss(boosted + beta * (kl_divergence(output_adv, output) * (1 - p_true)).mean(), output_adv)

    return Loss(climb_cross_entropy, descend)


def clean(smoothing: float = 0.0) -> Loss:
    """Cross-entropy on clean images; the attack is not run."""

    def descend(model: Model, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> AdvLoss:
        output = model(x)
        return AdvLoss(F.cross_entropy(output.float(), y, label_smoothing=smoothing), output)

    return Loss(lambda model, attack, x, y: x, descend)


@dataclass(frozen=True)
class LossKind:
    """A loss that recipes name.

    Args:
        make: (beta, label smoothing) -> the loss.
        paper: who and when, and where; None for ordinary training.
        takes: which of beta and mixup.
    """

    make: Callable[[float, float], Loss]
    paper: tuple[str, str] | None
    takes: tuple[str, ...]


LOSSES = {
    'pgd_at': LossKind(lambda beta, smoothing: pgd_at(smoothing), ('Madry et al. 2018', '1706.06083'), ('mixup',)),
    'trades': LossKind(trades, ('Zhang et al. 2019', '1901.08573'), ('beta', 'mixup')),
    'mart': LossKind(mart, ('Wang et al. 2020', 'https://openreview.net/forum?id=rklOg6EFwS'), ('beta',)),
    'clean': LossKind(lambda beta, smoothing: clean(smoothing), None, ('mixup',)),
}
"""Every loss by its name in recipes."""
