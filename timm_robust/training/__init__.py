"""Adversarial training: recipe -> build -> Run -> fit; a checkpoint holds what `state` says."""

from .advice import few_images
from .batches import HELD_OUT, HELD_OUT_NAMES, VALIDATION, held_out_images
from .builder import build
from .flags import parse_recipe
from .loop import Stopped, fit
from .losses import LOSSES
from .planning import plan
from .recipe import Recipe
from .run import Run
from .watchdog import Diverged

__all__ = [
    'HELD_OUT',
    'HELD_OUT_NAMES',
    'LOSSES',
    'VALIDATION',
    'Diverged',
    'Recipe',
    'Run',
    'Stopped',
    'build',
    'few_images',
    'fit',
    'held_out_images',
    'parse_recipe',
    'plan',
]
