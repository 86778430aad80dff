"""What can go wrong in adversarial training, seen in the numbers of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

SPIKE = 3.0
"""A mean loss that exceeds that of the epoch before by this factor, and by 1, is a spike."""

COLLAPSE = 0.5
"""Training whose PGD accuracy falls below this share of its best, while it gets better at its own attack, overfits
catastrophically (Wong, Rice, Kolter 2020, https://arxiv.org/abs/2001.03994)."""


NOISE = 0.1
"""A smaller fall of PGD accuracy is none: near chance, few images rise and fall by as much."""


class Diverged(RuntimeError):
    """The run went wrong; the message says how."""


class Collapsed(Diverged):
    """PGD accuracy fell, at some time since the validation before."""


def check_loss(loss: float, history: Sequence[dict[str, Any]], step: int) -> None:
    """Refuse a mean loss that is not finite, or that jumped.

    Raises:
        Diverged: naming the step.
    """
    if not math.isfinite(loss):
        raise Diverged(f'the loss is {loss} at step {step}')
    before = history[-1]['train_loss'] if history else math.inf  # not the lowest: a growing eps makes the loss grow
    if loss > SPIKE * max(before, 0.0) and loss > before + 1:
        raise Diverged(f'the loss jumped to {loss:.4g} at step {step}, from {before:.4g} in the epoch before')


def check_epoch(row: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
    """Refuse an epoch after which PGD accuracy collapsed.

    Args:
        row: the epoch's numbers.
        history: those of the epochs before.

    Raises:
        Collapsed: with both accuracies.
    """
    same = [past for past in history if past.get('side') == row.get('side')]  # of progressive resizing
    earlier = [past for past in same if 'val_pgd_acc' in past and 'val_pgd_acc' in row]
    if not earlier:
        return
    best = max(past['val_pgd_acc'] for past in earlier)
    learns = row['train_acc'] >= earlier[-1]['train_acc']
    fell = row['val_pgd_acc'] < COLLAPSE * best and best - row['val_pgd_acc'] > NOISE
    if fell and learns:
        raise Collapsed(
            f'PGD accuracy collapsed from {best:.1%} to {row["val_pgd_acc"]:.1%} in epoch {row["epoch"]}, training '
            f'accuracy rose to {row["train_acc"]:.1%} (catastrophic overfitting); --attack n_fgsm or more --steps help'
        )


def check_weights(model: nn.Module) -> None:
    """Refuse weights and statistics that are not finite.

    Raises:
        Diverged: naming the first.
    """
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        name = list(state)[int((~finite).nonzero()[0, 0])]
        raise Diverged(f'{name} is not finite')
