"""Adversarially robust models for timm.

Importing this package registers its models with timm: `timm.create_model('resnet18_pssilu')`,
`timm.create_model('wrn28_10_pssilu')`. Train with `python train/adv_train.py`, measure with `python -m
timm_robust.evaluate`.
"""

from . import models
from .activations import ACTIVATIONS, Activation, get_activation
from .activations.pssilu import psilu, pssilu
from .attacks import attacked, fgsm, pgd
from .models import replace_activations
from .provenance import __version__
from .results import RobustnessResult
from .threat_model import ThreatModel

__all__ = [
    'ACTIVATIONS',
    'Activation',
    'RobustnessResult',
    'ThreatModel',
    '__version__',
    'attacked',
    'fgsm',
    'get_activation',
    'models',
    'pgd',
    'psilu',
    'pssilu',
    'replace_activations',
]
