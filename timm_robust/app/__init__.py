"""A page to play with: a picture attacked on a robust and a standard network, side by side (`timm-robust app`)."""

from .command import launch, main
from .outcome import ATTACKS, Outcome, accuracy_curve, compare
from .pictures import read_picture

__all__ = ['ATTACKS', 'Outcome', 'accuracy_curve', 'compare', 'launch', 'main', 'read_picture']
