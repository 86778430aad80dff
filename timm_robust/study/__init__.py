"""Studies: a claim tested by networks that differ in one thing, over seeds, on the same images.

A study is a YAML file: settings of the recipe that all its arms share, sweeps that list the arms, seeds, and claims
that set one arm against another. Every point, an arm under a seed, is trained, measured and kept in a folder of its
own, so that a study that was stopped goes on where it was.
"""

from .command import main
from .findings import LEAST_SEEDS, percent

__all__ = ['LEAST_SEEDS', 'main', 'percent']
