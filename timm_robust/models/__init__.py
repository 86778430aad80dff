"""Model families, one file each; importing them registers their models with timm. And models by any name, loaded."""

from . import cifar_resnet, imagenet, wide_resnet
from .checkpoint import BEST, LAST, load_checkpoint, read_weights
from .cifar_resnet import CifarResNet
from .config import check_model_kwargs, input_channels, make_model
from .load import HYPER_PARAMETERS, class_list, load_model, read_hyper_parameters, trained_classes
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
    'imagenet',
    'input_channels',
    'load_checkpoint',
    'load_model',
    'make_model',
    'read_hyper_parameters',
    'read_weights',
    'replace_activations',
    'trained_classes',
    'wide_resnet',
]
