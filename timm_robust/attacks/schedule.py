"""The attacks of training by name, and how eps and steps follow the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..threat_model import ThreatModel
from .gradient import Attack, apgd, n_fgsm, pgd


@dataclass(frozen=True)
class TrainingAttack:
    """An attack that recipes name.

    Args:
        attack: called with what it takes.
        takes: which of steps, step_size, random_start and start_noise.
        relative_step: steps -> the step size in units of eps, where the recipe gives none.
        paper: of training with it, who and when, and its number on arXiv; None where that is the loss's.
    """

    attack: Callable[..., torch.Tensor]
    takes: tuple[str, ...]
    relative_step: Callable[[int], float]
    paper: tuple[str, str] | None = None


TRAINING_ATTACKS = {
    'pgd': TrainingAttack(pgd, ('steps', 'step_size', 'random_start', 'start_noise'), lambda steps: 2.5 / steps),
    'fgsm': TrainingAttack(
        partial(pgd, steps=1),
        ('step_size', 'random_start', 'start_noise'),
        lambda steps: 1.25,
        ('Wong, Rice, Kolter 2020', '2001.03994'),
    ),
    'n_fgsm': TrainingAttack(n_fgsm, ('step_size',), lambda steps: 1.0, ('de Jorge et al. 2022', '2202.01181')),
    'apgd': TrainingAttack(apgd, ('steps', 'random_start'), lambda steps: 2.0),
}


@dataclass(frozen=True)
class AttackSchedule:
    """The training attack over a run: eps and its step size grow linearly from 0, later it may take other steps.

    Args:
        threat_model: at full eps.
        attack: a name of TRAINING_ATTACKS.
        steps: number of gradients.
        step_size: at full eps, in pixels; None: the attack's own for its steps.
        random_start: start at a random point of the ball.
        start_noise: see `pgd`.
        eps_warmup: share of the run over which eps grows.
        late_steps: steps from late_start on; None: as before.
        late_start: share of the run.
        bn: mode of batch norm, 'eval' or 'train'.
        grad: derivative of ReLU, 'exact' or 'smooth'.
    """

    threat_model: ThreatModel
    attack: str
    steps: int
    step_size: float | None = None
    random_start: bool = True
    start_noise: float | None = None
    eps_warmup: float = 0.0
    late_steps: int | None = None
    late_start: float = 1.0
    bn: str = 'eval'
    grad: str = 'exact'

    def at(self, progress: float) -> Attack:
        """The attack at this share of the run."""
        kind = TRAINING_ATTACKS[self.attack]
        steps = self.steps
        if self.late_steps is not None and progress >= self.late_start:
            steps = self.late_steps
        share = min(progress / self.eps_warmup, 1.0) if self.eps_warmup else 1.0
        eps = self.threat_model.eps
        size = eps * kind.relative_step(steps) if self.step_size is None else self.step_size
        settings: dict[str, Any] = {'steps': steps, 'step_size': share * size}
        settings |= {'random_start': self.random_start, 'start_noise': self.start_noise}
        threat_model = replace(self.threat_model, eps=share * eps)
        return partial(kind.attack, threat_model=threat_model, **{name: settings[name] for name in kind.takes})
