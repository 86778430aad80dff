"""Model families, one file each; importing them registers their models with timm."""

from . import imagenet
from .cifar_resnet import CifarResNet
from .replaced import replace_activations
from .wide_resnet import WideResNet

__all__ = ['CifarResNet', 'WideResNet', 'imagenet', 'replace_activations']
