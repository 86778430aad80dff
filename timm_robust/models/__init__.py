"""Model families, one file each; importing them registers their models with timm."""

from .cifar_resnet import CifarResNet
from .wide_resnet import WideResNet

__all__ = ['CifarResNet', 'WideResNet']
