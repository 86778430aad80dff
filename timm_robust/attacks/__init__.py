"""Attacks by gradient, what they climb, and the frozen copies of a network that they run on faster."""

from .folding import FoldedNet
from .gradient import Attack, apgd, attacked, batch_norms, fgsm, frozen_statistics, input_gradient, n_fgsm, pgd
from .schedule import TRAINING_ATTACKS, AttackSchedule
from .surrogates import Model, climb_cross_entropy, cross_entropy, cross_entropy_of, kl_divergence, labels_of

__all__ = [
    'TRAINING_ATTACKS',
    'Attack',
    'AttackSchedule',
    'FoldedNet',
    'Model',
    'apgd',
    'attacked',
    'batch_norms',
    'climb_cross_entropy',
    'cross_entropy',
    'cross_entropy_of',
    'fgsm',
    'frozen_statistics',
    'input_gradient',
    'kl_divergence',
    'labels_of',
    'n_fgsm',
    'pgd',
]
