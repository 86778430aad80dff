"""What a run tells that its numbers do not: few images, robustness that does not come."""

from __future__ import annotations

import math
from typing import Any

import torch

from .run import Run, metric_name, shown_share

FEW = 100
"""Images of the smallest class below which `few_images` speaks.

With 50 a class ordinary and random weights ended at chance or below under attack, with 200 random ones did not
(train/studies/README.md).
"""
ROBUST_START = '--initial-checkpoint with robust weights'


def images_per_class(data: Any) -> torch.Tensor | None:
    """How many images each class has, [classes]; None where only a pass over the data could tell."""
    if getattr(data, 'iterable', False):
        return None
    try:
        return torch.bincount(data.labels.cpu(), minlength=data.num_classes)
    except ValueError:  # its reader cannot tell the labels alone
        return None


def few_images(run: Run) -> list[str]:
    """Whether a class has too few images to learn robustness from; a line of text each."""
    counts = images_per_class(run.batches.data)
    if counts is None or counts.min() >= FEW:
        return []
    data, least = run.batches.data, int(counts.argmin())
    mend = '' if run.recipe.initial_checkpoint else f', start from {ROBUST_START},'
    return [
        f'class {data.classes[least]!r} has {int(counts[least])} training images: robustness takes more of them than '
        f'ordinary accuracy; add images{mend} or expect less than on the training images'
    ]


def chance(labels: torch.Tensor, num_classes: int) -> float:
    """The accuracy that knows nothing of the images could have on these labels, with two standard errors on top.

    That of the most frequent class, p, or of guessing: p + 2 sqrt(p (1 - p) / n).
    """
    p = max(torch.bincount(labels.cpu(), minlength=num_classes).max().item() / len(labels), 1 / num_classes)
    return p + 2 * math.sqrt(p * (1 - p) / len(labels))


def near_chance(run: Run) -> str | None:
    """A line for a run whose PGD accuracy stayed near chance through its first third; said once, when that is over."""
    rows = [row for row in run.history if 'val_pgd_acc' in row]
    late = [row for row in rows if shown_share(run, row) >= 1 / 3]
    if metric_name(run.recipe) != 'val_pgd_acc' or len(late) != 1 or late[0] is not run.history[-1]:
        return None
    best = max(row['val_pgd_acc'] for row in rows)
    if images_per_class(run.held_out) is None:
        return None
    labels = run.held_out.labels.repeat(run.world.size)  # every process has as many, give or take one
    if best > chance(labels, run.held_out.num_classes):
        return None
    recipe, mends = run.recipe, [f'a smaller --eps than {run.recipe.eps}']
    if recipe.eps_warmup < 0.5:
        mends.append('--eps-warmup 0.5')
    if not recipe.initial_checkpoint:
        mends.append(ROBUST_START)
    return (
        f'PGD accuracy on held-out images stayed near chance ({best:.1%}) through a third of the run: the attack is '
        f'stronger than what the network has learned to see; begin anew with {" or ".join(mends)}'
    )
