"""What attackers climb, the losses of logits that training is made of, and what logits say."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .gradient import Attack, LossFn

Model = Callable[[torch.Tensor], torch.Tensor]


def climb_cross_entropy(model: Model, attack: Attack, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Adversarial images that climb the cross-entropy."""
    return attack(cross_entropy_of(model, y), x)


def cross_entropy_of(model: Model, y: torch.Tensor) -> LossFn:
    """What an attack on a model climbs: images -> the cross-entropy of each, [B]."""
    return lambda x: cross_entropy(model(x), y)


def cross_entropy(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image, [B], in fp32."""
    return F.cross_entropy(output.float(), y, reduction='none')


def labels_of(output: torch.Tensor) -> torch.Tensor:
    """The label of each image, [B], out of logits [B, classes]; -1, which is never right, where a logit is NaN."""
    return output.argmax(1).masked_fill(output.isnan().any(1), -1)


def kl_divergence(output_adv: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """KL(softmax(output) || softmax(output_adv)) of each image, [B], in fp32."""
    log_p, log_q = F.log_softmax(output.float(), 1), F.log_softmax(output_adv.float(), 1)
    return F.kl_div(log_q, log_p, reduction='none', log_target=True).sum(1)
