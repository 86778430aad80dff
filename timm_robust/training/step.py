"""One training step: attack, loss, backward, clip, update, average. How networks are called and compiled is here too.

Everything random in a step follows from (seed, step, process), so that a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.utils import dispatch_clip_grad

from ..activations import PSiLU, PSSiLU, compile_cpu_kernels
from ..attacks import FoldedNet, attacked, frozen_statistics
from ..precision import Precision
from .averaging import ModelEma
from .awp import perturbed_weights
from .batch_norm import batch_norms
from .losses import LOSSES, AdvLoss
from .recipe import Recipe
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


def compiled(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, compiled; on a CPU its PSSiLU and PSiLU alone, if it has any.

    Raises:
        RuntimeError: on a CPU without a C++ compiler.
    """
    if device.type == 'cpu' and any(isinstance(module, (PSSiLU, PSiLU)) for module in net.modules()):
        compile_cpu_kernels()
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


@dataclass
class TrainStep:
    """`step(x, y, number, progress)` trains the model on one batch.

    Args:
        recipe: the settings.
        model: the network, already on the device.
        forward: how it is called.
        attack_forward: how it is called in the attack.
        optimizer: any torch optimizer over the model's parameters.
        rank: of this process; each draws its own noise.
        ema: average of the weights to update, or None.
        update_forward: how the network is called in the update, where that differs (DistributedDataParallel).
        mixup: timm's mixing of images and labels, or None.

    Attributes:
        seed: of everything random; the recipe's, unless it is set to another.
    """

    recipe: Recipe
    model: nn.Module
    forward: Forward
    attack_forward: AttackForward
    optimizer: torch.optim.Optimizer
    rank: int = 0
    ema: ModelEma | None = None
    update_forward: Forward | None = None
    mixup: Mixup | None = None

    def __post_init__(self) -> None:
        """Make the loss and the attack, and find PSSiLU's parameters and the batch norms to freeze."""
        recipe = self.recipe
        self.seed, self.attack = recipe.seed, recipe.attack_schedule
        smoothing = 0.0 if self.mixup else recipe.smoothing  # which is in mixup's labels then
        self.loss = LOSSES[recipe.loss](recipe.beta, smoothing)
        self.frozen = batch_norms(self.model) if recipe.freeze_bn else []
        self.betas = [module.params()[1] for module in self.model.modules() if isinstance(module, PSSiLU)]

    def __call__(self, x: torch.Tensor, y: torch.Tensor, number: int, progress: float = 0.0) -> StepOutput:
        """Attack the batch, take one optimizer step, and update the average.

        Args:
            x: images [B, C, H, W] in [0, 1].
            y: labels [B].
            number: steps taken before this one in the whole run.
            progress: share of the run that is done, for the schedules of eps, attack steps and weight perturbation.
        """
        recipe = self.recipe
        self.draw_from(number)
        self.model.train()
        for norm in self.frozen:
            norm.eval()
        self.optimizer.zero_grad(set_to_none=True)
        target = y
        if self.mixup is not None:
            x, target = self.mixup(x, y)
        x_adv = self.perturb(x, target, progress)
        perturbed: AbstractContextManager[None] = nullcontext()
        if recipe.awp_gamma and progress >= recipe.awp_start:
            perturbed = perturbed_weights(
                self.model, lambda: self.objective(self.forward, x, x_adv, target)[0], recipe.awp_gamma
            )
        with relu_gradient(self.model, recipe.update_grad), perturbed:
            loss, out = self.objective(self.update_forward or self.forward, x, x_adv, target)
            with frozen_statistics(self.model) if recipe.grad_checkpointing else nullcontext():
                loss.backward()  # what it recomputes must not count twice in the statistics
        if recipe.clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), value=recipe.clip_grad, mode=recipe.clip_mode)
        if recipe.pssilu_beta_clip is not None and self.betas:
            nn.utils.clip_grad_norm_(self.betas, recipe.pssilu_beta_clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=number)
        shown = out.output if out.output_adv is None else out.output_adv
        assert shown is not None
        return StepOutput(loss.detach(), (shown.detach().argmax(1) == y).sum())

    def perturb(self, x: torch.Tensor, y: torch.Tensor, progress: float) -> torch.Tensor:
        """Adversarial images [B, C, H, W] for the update."""
        with self.attack_forward.ready(self.attack.bn, self.attack.grad) as forward:
            return self.loss.perturb(forward, self.attack.at(progress), x, y)

    def objective(
        self, forward: Forward, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, AdvLoss]:
        """The loss with PSSiLU's penalty lambda |beta|, and what it came from."""
        out = self.loss.descend(forward, x, x_adv, y)
        loss = out.loss
        if self.betas and self.recipe.pssilu_reg:
            loss = loss + self.recipe.pssilu_reg * torch.stack([beta.abs().sum() for beta in self.betas]).sum()
        return loss, out

    def draw_from(self, number: int) -> None:
        """Seed everything random with (seed, step, process)."""
        seed = (self.seed * 1_000_003 + number) * 1_009 + self.rank
        torch.manual_seed(seed)
        if self.mixup is not None:
            np.random.seed(seed % 2**32)  # timm's Mixup draws from numpy
