"""Losses of adversarial training: (model, attack, x, y) -> `AdvLoss`. Each says which surrogate the attacker climbs.

- `pgd_at`: Madry et al. 2018, https://arxiv.org/abs/1706.06083
- `trades`: Zhang et al. 2019, https://arxiv.org/abs/1901.08573
- `clean`: ordinary training, the control.

`model` maps pixels in [0, 1] to logits [B, K]; `attack(loss_fn, x)` gives adversarial images and is called with the
model as the caller has set it up to be attacked. Losses are computed in fp32 whatever the precision of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attacks import Attack

Model = Callable[[torch.Tensor], torch.Tensor]


class AdvLoss(NamedTuple):
    """A training loss and what it was computed from.

    Args:
        loss: scalar to descend.
        output: logits on the clean images [B, K], or None where the loss does not need them.
        output_adv: logits on the adversarial images [B, K], or None.
    """

    loss: torch.Tensor
    output: torch.Tensor | None
    output_adv: torch.Tensor | None


Loss = Callable[[Model, Attack, torch.Tensor, torch.Tensor], AdvLoss]


def pgd_at(model: Model, attack: Attack, x: torch.Tensor, y: torch.Tensor, smoothing: float = 0.0) -> AdvLoss:
    """Cross-entropy on adversarial images, which climb the same cross-entropy: min_w max_d CE(f_w(x + d), y)."""
    x_adv = attack(lambda x: cross_entropy(model(x), y), x)
    output_adv = model(x_adv)
    return AdvLoss(F.cross_entropy(output_adv.float(), y, label_smoothing=smoothing), None, output_adv)


def trades(
    model: Model, attack: Attack, x: torch.Tensor, y: torch.Tensor, beta: float = 6.0, smoothing: float = 0.0
) -> AdvLoss:
    """CE(f(x), y) + beta KL(f(x) || f(x_adv)), where x_adv climbs the KL divergence; beta = 0 is clean training.

    The attacker's target f(x) is computed once an attack, in the mode that the attack runs in.
    """
    target: list[torch.Tensor] = []

    def climb(x_adv: torch.Tensor) -> torch.Tensor:
        if not target:  # inside the attack, so that the model is in the attack's mode
            with torch.no_grad():
                target.append(model(x))
        return kl_divergence(model(x_adv), target[0])

    x_adv = attack(climb, x)
    output, output_adv = model(x), model(x_adv)
    natural = F.cross_entropy(output.float(), y, label_smoothing=smoothing)
    return AdvLoss(natural + beta * kl_divergence(output_adv, output).mean(), output, output_adv)


def clean(model: Model, attack: Attack, x: torch.Tensor, y: torch.Tensor, smoothing: float = 0.0) -> AdvLoss:
    """Cross-entropy on clean images; the attack is not run."""
    output = model(x)
    return AdvLoss(F.cross_entropy(output.float(), y, label_smoothing=smoothing), output, None)


def make_loss(name: str, beta: float = 6.0, smoothing: float = 0.0) -> Loss:
    """The loss of a recipe.

    Raises:
        ValueError: for a name that is not there.
    """
    losses: dict[str, Loss] = {
        'pgd_at': partial(pgd_at, smoothing=smoothing),
        'trades': partial(trades, beta=beta, smoothing=smoothing),
        'clean': partial(clean, smoothing=smoothing),
    }
    if name not in losses:
        raise ValueError(f'loss {name!r} is unknown; allowed: {", ".join(losses)}')
    return losses[name]


def cross_entropy(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image, [B], in fp32."""
    return F.cross_entropy(output.float(), y, reduction='none')


def kl_divergence(output_adv: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """KL(softmax(output) || softmax(output_adv)) of each image, [B], in fp32."""
    log_p, log_q = F.log_softmax(output.float(), 1), F.log_softmax(output_adv.float(), 1)
    return F.kl_div(log_q, log_p, reduction='none', log_target=True).sum(1)
