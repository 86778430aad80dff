"""The one door to RobustBench: load, benchmark, convert, compare, submit."""

from .conversion import convert, fetch
from .measure import benchmark, corruptions, load_model
from .report import compare
from .submit import submission

__all__ = [
    'benchmark',
    'compare',
    'convert',
    'corruptions',
    'fetch',
    'load_model',
    'submission',
]
