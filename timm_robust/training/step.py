"""One training step: attack, loss, backward, clip, update, average. How networks are called and compiled is here too.

Everything random in a step follows from (seed, step, process), so that a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad

from ..activations import PSSiLU, compile_kernels, has_kernels
from ..attacks import AttackSchedule, FoldedNet, attacked, batch_norms, frozen_statistics
from ..precision import Precision
from .averaging import ModelEma
from .awp import WeightPerturbation
from .losses import AdvLoss, Loss
from .relu_gradient import relu_gradient


class StepOutput(NamedTuple):
    """What a step leaves for the log, on the device: nothing here waits for it.

    Args:
        loss: the loss that was descended, scalar.
        correct: images of the batch that the model got right (adversarial ones if there were any), scalar.
    """

    loss: torch.Tensor
    correct: torch.Tensor


class Forward:
    """Pixels [B, C, H, W] in [0, 1] to logits, in a precision and layout.

    Args:
        net: the network as it is called, compiled and wrapped or not; it normalises and resizes pixels itself.
        precision: autocast and memory format.
        device: where the network lives.
    """

    def __init__(self, net: nn.Module, precision: Precision, device: torch.device) -> None:
        self.net, self.precision, self.device = net, precision, device

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes]."""
        with self.precision.autocast(self.device):
            return self.net(x.contiguous(memory_format=self.precision.memory_format))


def compiled(net: nn.Module, device: torch.device, sides: int = 1) -> nn.Module:
    """The network, compiled; on a CPU, or a GPU for images of several sides, its activation alone, if that has kernels.

    Raises:
        RuntimeError: without a compiler.
    """
    alone = device.type == 'cpu' or (device.type == 'cuda' and sides > 1)
    if alone and has_kernels(net, device.type):
        compile_kernels(device.type)
        return net
    return torch.compile(net, dynamic=False)  # type: ignore[return-value]


class AttackForward:
    """The network that attacks call: `with attack_forward.ready('eval') as forward: forward(x)`.

    With batch norm in eval mode that is a FoldedNet, if there is one; it takes the present weights whenever an attack
    begins, and is called in no other way. For batch norm in train mode it is the network itself.

    Args:
        model: the network.
        forward: how it is called outside of attacks.
        folded: its copy to attack, or None.
        folded_forward: how that is called.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        folded: FoldedNet | None = None,
        folded_forward: Forward | None = None,
    ) -> None:
        self.model, self.folded = model, folded
        self._forward, self._folded_forward = forward, folded_forward

    @contextmanager
    def ready(self, bn: str, grad: str = 'exact') -> Iterator[Forward]:
        """Attacks run in this, on what it gives.

        Args:
            bn: mode of batch norm, 'eval' or 'train'.
            grad: derivative of ReLU, 'exact' or 'smooth'.
        """
        if self.folded is None or self._folded_forward is None or bn != 'eval':
            with attacked(self.model, bn), relu_gradient(self.model, grad):
                yield self._forward
        else:
            self.folded.refresh()
            with relu_gradient(self.folded, grad):
                yield self._folded_forward


@dataclass(frozen=True)
class Clipping:
    """Bounds on the gradients.

    Args:
        value: of all; None: no bound.
        mode: what it bounds, as timm has it: 'norm', 'value' or 'agc'.
        beta: on the norm of PSSiLU's beta's gradient on its own (Dai et al. 2021: 0.01); None: no bound.
    """

    value: float | None = None
    mode: str = 'norm'
    beta: float | None = None

    def clip(self, model: nn.Module, betas: list[torch.Tensor]) -> None:
        """Clip the gradients of the betas, then those of the model.

        The betas come first: their penalty gives them a gradient near 10, which would rule the norm of all.
        """
        if self.beta is not None and betas:
            nn.utils.clip_grad_norm_(betas, self.beta)
        if self.value is not None:
            parameters = model_parameters(model, exclude_head=self.mode == 'agc')  # as timm's train.py has it
            dispatch_clip_grad(parameters, value=self.value, mode=self.mode)


@dataclass
class TrainStep:
    """`step(x, y, number, progress)` trains the model on one batch.

    Args:
        model: the network, already on the device.
        forward: how it is called.
        attack_forward: how it is called in the attack.
        optimizer: any torch optimizer over the model's parameters.
        loss: how images are attacked, and what is descended.
        attack: the attack, over the run.
        seed: of everything random.
        rank: of this process; each draws its own noise.
        ema: average of the weights to update, or None.
        update_forward: how the network is called in the update, where that differs (DistributedDataParallel).
        mixup: timm's mixing of images and labels, or None.
        weight_perturbation: when and how far the weights are perturbed.
        clipping: bounds on the gradients.
        pssilu_reg: lambda of the penalty lambda |beta| on PSSiLU's beta.
        update_grad: derivative of ReLU in the update, 'exact' or 'smooth'.
        recomputes: whether the network computes activations again in the backward pass.
        freeze_bn: whether batch norm keeps its statistics, and normalises by them in the update.
    """

    model: nn.Module
    forward: Forward
    attack_forward: AttackForward
    optimizer: torch.optim.Optimizer
    loss: Loss
    attack: AttackSchedule
    seed: int = 0
    rank: int = 0
    ema: ModelEma | None = None
    update_forward: Forward | None = None
    mixup: Mixup | None = None
    weight_perturbation: WeightPerturbation = field(default_factory=WeightPerturbation)
    clipping: Clipping = field(default_factory=Clipping)
    pssilu_reg: float = 0.0
    update_grad: str = 'exact'
    recomputes: bool = False
    freeze_bn: bool = False

    def __post_init__(self) -> None:
        """Find PSSiLU's parameters, and the batch norms to freeze."""
        self.frozen = batch_norms(self.model) if self.freeze_bn else []
        self.betas = [module.params()[1] for module in self.model.modules() if isinstance(module, PSSiLU)]

    def __call__(self, x: torch.Tensor, y: torch.Tensor, number: int, progress: float = 0.0) -> StepOutput:
        """Attack the batch, take one optimizer step, and update the average.

        Args:
            x: images [B, C, H, W] in [0, 1].
            y: labels [B].
            number: steps taken before this one in the whole run.
            progress: share of the run that is done, for the schedules of eps, attack steps and weight perturbation.
        """
        self.draw_from(number)
        self.model.train()
        for norm in self.frozen:
            norm.eval()
        self.optimizer.zero_grad(set_to_none=True)
        target = y
        if self.mixup is not None:
            x, target = self.mixup(x, y)
        x_adv = self.perturb(x, target, progress)
        perturbed = self.weight_perturbation.at(
            progress, self.model, lambda: self.objective(self.forward, x, x_adv, target)[0]
        )
        with relu_gradient(self.model, self.update_grad), perturbed:
            loss, logits = self.objective(self.update_forward or self.forward, x, x_adv, target)
            with frozen_statistics(self.model) if self.recomputes else nullcontext():
                # what it recomputes must not count twice in the statistics; AdaHessian differentiates once more
                loss.backward(create_graph=getattr(self.optimizer, 'is_second_order', False))
        self.clipping.clip(self.model, self.betas)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=number)
        label = target.argmax(1) if target.ndim > 1 else y  # of mixed images the larger part
        return StepOutput(loss.detach(), (logits.detach().argmax(1) == label).sum())

    def perturb(self, x: torch.Tensor, y: torch.Tensor, progress: float) -> torch.Tensor:
        """Adversarial images [B, C, H, W] for the update."""
        with self.attack_forward.ready(self.attack.bn, self.attack.grad) as forward:
            return self.loss.perturb(forward, self.attack.at(progress), x, y)

    def objective(self, forward: Forward, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> AdvLoss:
        """The loss, with PSSiLU's penalty lambda |beta|."""
        loss, logits = self.loss.descend(forward, x, x_adv, y)
        if self.betas and self.pssilu_reg:
            loss = loss + self.pssilu_reg * torch.stack([beta.abs().sum() for beta in self.betas]).sum()
        return AdvLoss(loss, logits)

    def draw_from(self, number: int) -> None:
        """Seed everything random with (seed, step, process)."""
        seed = ((self.seed * 1_000_003 + number) * 1_009 + self.rank) % 2**64
        torch.manual_seed(seed)
        if self.mixup is not None:
            np.random.seed(seed % 2**32)  # timm's Mixup draws from numpy
