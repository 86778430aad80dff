"""Robustness measured: clean, PGD and AutoAttack accuracy of a model as one record."""

from .images import attack
from .measure import evaluate
from .runner import upstream
from .shape import curve_facts, local_lipschitz, minimal_radii, set_shape, square_success
from .split import DEFAULT_N, default_batch_size, evenly, fit_channels, read_split

__all__ = [
    'DEFAULT_N',
    'attack',
    'curve_facts',
    'default_batch_size',
    'evaluate',
    'evenly',
    'fit_channels',
    'local_lipschitz',
    'minimal_radii',
    'read_split',
    'set_shape',
    'square_success',
    'upstream',
]
