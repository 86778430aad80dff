"""Model families, one file each, which register themselves with timm on import; and models by any name, loaded."""

import importlib
import pkgutil

from . import cifar_resnet, wide_resnet
from .checkpoint import BEST, LAST, load_checkpoint, read_weights
from .cifar_resnet import CifarResNet
from .comparison import other_function
from .config import check_model_kwargs, make_model, note
from .load import HYPER_PARAMETERS, class_list, load_model, read_hyper_parameters, trained_classes, trained_for
from .replaced import SharedAct, replace_activations
from .wide_resnet import WideResNet

__all__ = [
    'BEST',
    'HYPER_PARAMETERS',
    'LAST',
    'CifarResNet',
    'SharedAct',
    'WideResNet',
    'check_model_kwargs',
    'cifar_resnet',
    'class_list',
    'load_checkpoint',
    'load_model',
    'make_model',
    'note',
    'other_function',
    'read_hyper_parameters',
    'read_weights',
    'replace_activations',
    'trained_classes',
    'trained_for',
    'wide_resnet',
]

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_found.name}')
