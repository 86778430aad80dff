"""Adversarial training: recipe -> build -> Run -> fit; a checkpoint holds what `state` says."""

from .builder import build
from .flags import parse_recipe
from .loop import Stopped, fit
from .planning import plan
from .recipe import RECIPES, Recipe
from .run import Run
from .watchdog import Diverged

__all__ = [
    'RECIPES',
    'Diverged',
    'Recipe',
    'Run',
    'Stopped',
    'build',
    'fit',
    'parse_recipe',
    'plan',
]
