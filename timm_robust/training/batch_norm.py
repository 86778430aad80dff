"""Batch norm in training: where a network has it, and with which momentum."""

from __future__ import annotations

from typing import Any

from torch import nn


def batch_norms(model: nn.Module) -> list[Any]:
    """The batch norms of a network that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kind) and module.track_running_stats]


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Give every batch norm of the model this momentum, the weight of the newest batch.

    Raises:
        ValueError: if it has none.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError(f'bn_momentum {momentum}: the model has no batch norm; leave it out (--bn-momentum none)')
    for norm in norms:
        norm.momentum = momentum
