"""A page to play with: a picture attacked on a robust and a standard network, side by side (`timm-robust app`)."""

from .command import default_models, launch, load_models, main
from .outcome import ATTACKS, Outcome, accuracy_curve, compare
from .page import Shown
from .pictures import read_picture

__all__ = [
    'ATTACKS',
    'Outcome',
    'Shown',
    'accuracy_curve',
    'compare',
    'default_models',
    'launch',
    'load_models',
    'main',
    'read_picture',
]
