"""A course of the learning rate that timm's schedulers lack."""

from __future__ import annotations

import math

import torch
from timm.scheduler.scheduler import Scheduler

MOMENTUM_SWING = 0.05
"""Momentum goes so far to either side: torch's OneCycleLR cycles between 0.85 and 0.95."""


class CosineOneCycle(Scheduler):
    """One cycle as torch's OneCycleLR runs it: the rate rises and falls along half a cosine, momentum goes against it.

    The rate goes from peak / 25 over `warmup` steps to the peak, then to `min_lr` at the last step; the momentum of
    optimizers that have one from m + 0.05 to m - 0.05, and back to m + 0.05.

    Args:
        optimizer: its rates are the peaks, its momentum m.
        total: steps of the whole course.
        warmup: steps of the rise, the peak among them.
        min_lr: rate of the last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total: int, warmup: int, min_lr: float = 0.0) -> None:
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self.total, self.warmup, self.min_lr = total, warmup, min_lr
        self.momenta = [group.get('momentum') for group in optimizer.param_groups]

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set rate and momentum for the step that follows so many others."""
        super().step_update(num_updates, metric)
        for group, middle in zip(self.optimizer.param_groups, self.momenta, strict=True):
            if middle is not None:
                low, high = middle - MOMENTUM_SWING, middle + MOMENTUM_SWING
                group['momentum'] = self._along(num_updates, high, low, high)

    def _get_lr(self, t: int) -> list[float]:
        return [self._along(t, max(peak / 25, self.min_lr), peak, self.min_lr) for peak in self.base_values]

    def _along(self, t: int, first: float, middle: float, last: float) -> float:
        """Half a cosine from first to middle, which is reached at step warmup - 1, then another to last."""
        turn, end = max(self.warmup - 1, 0), self.total - 1
        if t < turn:
            return _half_cosine(first, middle, t / turn)
        return _half_cosine(middle, last, min((t - turn) / max(end - turn, 1), 1.0))


def _half_cosine(a: float, b: float, share: float) -> float:
    """From a at share 0 to b at share 1."""
    return b + (a - b) * (1 + math.cos(math.pi * share)) / 2
