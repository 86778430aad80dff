"""One training step: attack, loss, backward, clip, update, average. Precision, memory layout and compilation live here.

Everything random in a step follows from (seed, step, process), so that a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.utils import ModelEmaV3, dispatch_clip_grad

from .activations import PSiLU, PSSiLU
from .attacks import Attack, apgd, attacked, frozen_statistics, n_fgsm, pgd
from .awp import perturbed_weights
from .folding import FoldedNet
from .gradients import relu_gradient
from .losses import AdvLoss, make_loss
from .pixels import pixel_input
from .pssilu import compile_cpu_kernels
from .recipe import Recipe


class StepOutput(NamedTuple):
    """What a step leaves for the log, on the device: nothing here waits for it.

    Args:
        loss: the loss that was descended, scalar.
        correct: images of the batch that the model got right (adversarial ones if there were any), scalar.
    """

    loss: torch.Tensor
    correct: torch.Tensor


class Forward:
    """Pixels [B, C, H, W] in [0, 1] to logits, in the recipe's precision, layout and image size.

    Args:
        net: the network as it is called, compiled and wrapped or not; it normalises pixels itself.
        recipe: amp (bfloat16), channels_last.
        device: where the network lives.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self.net = net
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if recipe.amp else nullcontext

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes]."""
        with self.autocast():
            return self.net(x.contiguous(memory_format=self.memory_format))


def compiled(net: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """The network as the recipe wants it compiled; on a CPU its PSSiLU and PSiLU alone, if it has any.

    Raises:
        RuntimeError: on a CPU without a C++ compiler.
    """
    if not recipe.torchcompile:
        return net
    if device.type == 'cpu' and any(isinstance(module, (PSSiLU, PSiLU)) for module in net.modules()):
        compile_cpu_kernels()
        return net
    return torch.compile(net, dynamic=False)  # type: ignore[return-value]


class AttackForward(Forward):
    """The network as attacks call it: `with forward.ready('eval'): forward(x)`.

    With batch norm in eval mode that is a FoldedNet, which takes the present weights whenever an attack begins; where
    nothing can be folded, and for batch norm in train mode, it is the network itself.

    Args:
        model: the network.
        forward: how it is called outside of attacks.
        recipe: fold_bn, attack_bn, inner_size, torchcompile, and what Forward needs.
        example: images [B, C, H, W] that the network takes.
    """

    def __init__(self, model: nn.Module, forward: Forward, recipe: Recipe, example: torch.Tensor) -> None:
        super().__init__(forward.net, recipe, example.device)
        self.model = model
        self.folded: FoldedNet | None = None
        if recipe.fold_bn and recipe.attack_bn == 'eval':
            dtype = torch.bfloat16 if recipe.amp else None
            folded = FoldedNet(model, example, dtype, self.memory_format)
            if folded.pairs:
                self.folded = folded
                net = pixel_input(folded.net, recipe.inner_size)
                self.net = compiled(net, recipe, example.device)

    @contextmanager
    def ready(self, bn: str) -> Iterator[None]:
        """Attacks run in this; bn is the mode of batch norm, 'eval' or 'train'."""
        if self.folded is None:
            with attacked(self.model, bn):
                yield
        else:
            self.folded.refresh()
            yield


class TrainStep:
    """`step(x, y, number, progress)` trains the model on one batch.

    Args:
        model: the network, already on the device.
        forward: how it is called.
        attack_forward: how it is called in the attack.
        optimizer: any torch optimizer over the model's parameters.
        recipe: attack, loss and regularisation settings.
        ema: average of the weights to update, or None.
        update_forward: how it is called in the update, where that differs (DistributedDataParallel).
        rank: of this process; each draws its own noise.
        num_classes: outputs, for mixup.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        attack_forward: AttackForward,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        ema: ModelEmaV3 | None = None,
        update_forward: Forward | None = None,
        rank: int = 0,
        num_classes: int = 10,
    ) -> None:
        self.model, self.forward, self.optimizer, self.recipe, self.ema = model, forward, optimizer, recipe, ema
        self.attack_forward, self.update_forward, self.rank = attack_forward, update_forward or forward, rank
        self.seed = recipe.seed
        mixing = bool(recipe.mixup or recipe.cutmix)
        self.loss = make_loss(recipe.loss, beta=recipe.beta, smoothing=0.0 if mixing else recipe.smoothing)
        self.mixup = None
        if mixing:
            settings = {'mixup_alpha': recipe.mixup, 'cutmix_alpha': recipe.cutmix, 'num_classes': num_classes}
            self.mixup = Mixup(label_smoothing=recipe.smoothing, **settings)
        self.betas = [module.params()[1] for module in model.modules() if isinstance(module, PSSiLU)]

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
        self.optimizer.zero_grad(set_to_none=True)
        target = y
        if self.mixup is not None:
            x, target = self.mixup(x, y)
        x_adv = self.perturb(x, target, progress)
        perturbation: Any = nullcontext()
        if recipe.awp_gamma and progress >= recipe.awp_start:
            perturbation = perturbed_weights(
                self.model, lambda: self.objective(self.forward, x, x_adv, target)[0], recipe.awp_gamma
            )
        with relu_gradient(self.model, recipe.update_grad), perturbation:
            loss, out = self.objective(self.update_forward, x, x_adv, target)
            with frozen_statistics(self.model) if recipe.grad_checkpointing else nullcontext():
                loss.backward()  # what it recomputes must not count twice in the statistics
        self._clip()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=number)
        shown = out.output if out.output_adv is None else out.output_adv
        assert shown is not None
        return StepOutput(loss.detach(), (shown.detach().argmax(1) == y).sum())

    def perturb(self, x: torch.Tensor, y: torch.Tensor, progress: float) -> torch.Tensor:
        """Adversarial images [B, C, H, W] for the update."""
        attacked_net = self.attack_forward.folded or self.model
        with self.attack_forward.ready(self.recipe.attack_bn), relu_gradient(attacked_net, self.recipe.attack_grad):
            return self.loss.perturb(self.attack_forward, make_attack(self.recipe, progress), x, y)

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

    def _clip(self) -> None:
        """Bound the gradients as the recipe says: all, then PSSiLU's beta on its own (Dai et al. 2021: 0.01)."""
        recipe = self.recipe
        if recipe.clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), value=recipe.clip_grad, mode=recipe.clip_mode)
        if recipe.pssilu_beta_clip is not None and self.betas:
            nn.utils.clip_grad_norm_(self.betas, recipe.pssilu_beta_clip)


def make_attack(recipe: Recipe, progress: float = 0.0) -> Attack:
    """The recipe's training attack at this point of the run.

    eps grows linearly from 0 over the first `eps_warmup` of the run, the step size with it; from `late_start` on the
    attack takes `late_steps` steps.
    """
    late = recipe.late_steps is not None and progress >= recipe.late_start
    steps = recipe.late_steps if late and recipe.late_steps is not None else recipe.steps
    share = min(progress / recipe.eps_warmup, 1.0) if recipe.eps_warmup else 1.0
    threat_model = replace(recipe.threat_model, eps=share * recipe.threat_model.eps)
    step_size, start = share * recipe.step_size_at(steps), recipe.random_start
    if recipe.attack == 'apgd':
        return partial(apgd, threat_model=threat_model, steps=steps, random_start=start)
    if recipe.attack == 'n_fgsm':
        return partial(n_fgsm, threat_model=threat_model, step_size=step_size)
    count = 1 if recipe.attack == 'fgsm' else steps
    return partial(
        pgd,
        threat_model=threat_model,
        steps=count,
        step_size=step_size,
        random_start=start,
        start_noise=recipe.start_noise,
    )


def turning_points(recipe: Recipe) -> list[float]:
    """Shares of the run from which on the training step is another: 0, and where late steps, AWP or a stage begin."""
    points = {0.0, *(end for _, end in recipe.stages)}
    if recipe.late_steps is not None:
        points.add(recipe.late_start)
    if recipe.awp_gamma:
        points.add(recipe.awp_start)
    return sorted(point for point in points if point < 1)


@contextmanager
def averaged_weights(model: nn.Module, ema: ModelEmaV3 | None) -> Iterator[None]:
    """Lend the averaged weights, if any, to the model, so that what was compiled for it serves both.

    What the body does to the statistics of batch norm stays with the average.
    """
    if ema is None:
        yield
        return
    own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(ema.module.state_dict())
    try:
        yield
        ema.module.load_state_dict(model.state_dict())
    finally:
        model.load_state_dict(own)
