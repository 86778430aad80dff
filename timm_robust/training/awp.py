"""Adversarial weight perturbation: descend the loss at weights that were themselves attacked.

Wu, Xia, Wang 2020, https://arxiv.org/abs/2004.05884: each weight tensor w is moved by gamma ||w|| g / ||g||, g the
gradient of the training loss, and the update's gradient is taken there. One more forward and backward a step; it
fights robust overfitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from ..attacks import frozen_statistics


@dataclass(frozen=True)
class WeightPerturbation:
    """When a run perturbs its weights, and how far.

    Args:
        gamma: length of the move, relative to each weight's own length; 0: never.
        start: share of the run from which on.
    """

    gamma: float = 0.0
    start: float = 0.0

    def at(self, progress: float, model: nn.Module, loss_fn: Callable[[], torch.Tensor]) -> AbstractContextManager[Any]:
        """`perturbed_weights`, or nothing at this share of the run."""
        on = self.gamma > 0 and progress >= self.start
        return perturbed_weights(model, loss_fn, self.gamma) if on else nullcontext()


@contextmanager
def perturbed_weights(model: nn.Module, loss_fn: Callable[[], torch.Tensor], gamma: float) -> Iterator[None]:
    """Move the weights up the loss for the body, then put them back bit for bit.

    Args:
        model: the network; only weights with two axes or more are moved, as in the paper's code (no norms, biases,
            alpha, beta).
        loss_fn: the training loss, scalar; it is called once, and leaves the running statistics of batch
            norm alone. A weight whose gradient is not finite stays where it is.
        gamma: length of the move, relative to each weight's own length.
    """
    weights: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    with frozen_statistics(model):
        grads = list(torch.autograd.grad(loss_fn(), weights))
    if dist.is_available() and dist.is_initialized():  # every process must move its copy alike
        grads = [grad.contiguous() for grad in grads]
        for grad in grads:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    kept = [torch.empty_like(w) for w in weights]
    with torch.no_grad():  # over all tensors at once where that is one launch on a GPU
        torch._foreach_copy_(kept, weights)
        slopes = torch._foreach_norm([grad.contiguous() for grad in grads])  # the order of a sum decides its last bit
        moves = torch._foreach_mul(torch._foreach_norm(kept), gamma)
        torch._foreach_div_(moves, torch._foreach_add(slopes, 1e-12))
        grads = list(torch._foreach_mul(grads, moves))
        for grad, overflowed in zip(grads, torch.stack(slopes).isfinite().logical_not().unbind(), strict=True):
            grad.masked_fill_(overflowed, 0.0)
        torch._foreach_add_(weights, grads)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
