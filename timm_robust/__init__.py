"""Adversarially robust models for timm.

Importing this package registers its models with timm. From a shell: `timm-robust --help`. From Python, for any
classifier of images in [0, 1]:

>>> import timm_robust
>>> from timm_robust.data import load_dataset
>>> from timm_robust.evaluation import evaluate
>>> model = timm_robust.load_model('resnet18_pssilu', width=4)  # or 'resnet18_pssilu.fgsm_cifar10_linf', a run, a file
>>> data = load_dataset('digits', split='test').first(4)
>>> x_adv = timm_robust.attack(model, data.pixels(), data.labels)  # or method='autoattack'
>>> result, flags = evaluate(model, data, timm_robust.ThreatModel('Linf', '8/255'), attack='pgd')
>>> result.attack, result.n, flags['robust'].shape
('pgd', 4, torch.Size([4]))
"""

from . import models
from .activations import ACTIVATIONS, Activation, get_activation
from .activations.pssilu import psilu, pssilu
from .attacks import attacked, fgsm, pgd
from .evaluation import attack
from .models import load_model, replace_activations
from .provenance import __version__
from .results import RobustnessResult
from .threat_model import ThreatModel

__all__ = [
    'ACTIVATIONS',
    'Activation',
    'RobustnessResult',
    'ThreatModel',
    '__version__',
    'attack',
    'attacked',
    'fgsm',
    'get_activation',
    'load_model',
    'models',
    'pgd',
    'psilu',
    'pssilu',
    'replace_activations',
]
