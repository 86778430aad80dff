"""Robustness measured: clean, PGD and AutoAttack accuracy of a model as one record."""

from .images import attack
from .measure import evaluate
from .runner import upstream
from .shape import curve_facts, local_lipschitz, minimal_radii, set_shape, square_success

__all__ = [
    'attack',
    'curve_facts',
    'evaluate',
    'local_lipschitz',
    'minimal_radii',
    'set_shape',
    'square_success',
    'upstream',
]
