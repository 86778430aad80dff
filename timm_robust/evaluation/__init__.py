"""Robustness measured: clean, PGD and AutoAttack accuracy of a model as one record."""

from .measure import evaluate
from .runner import upstream

__all__ = [
    'evaluate',
    'upstream',
]
