"""Adversarial training: recipe -> build -> Run -> fit; a checkpoint holds what `state` says."""

from .builder import build
from .loop import Stopped, fit
from .recipe import Recipe
from .run import Run
from .watchdog import Diverged

__all__ = [
    'Diverged',
    'Recipe',
    'Run',
    'Stopped',
    'build',
    'fit',
]
