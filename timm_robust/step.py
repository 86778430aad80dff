"""One training step: attack, loss, backward, clip, update, average. Precision, memory layout and compilation live here.

Everything random in a step follows from (seed, step), so that a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.utils import ModelEmaV3, dispatch_clip_grad

from .activations import PSSiLU
from .attacks import Attack, LossFn, attacked, pgd
from .losses import make_loss
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
    """Pixels [B, C, H, W] in [0, 1] to logits, in the recipe's precision and layout, compiled if it says so.

    Args:
        model: the network; its weights may be changed in place, and are followed.
        recipe: amp, amp_dtype, channels_last, torchcompile.
        device: where the network lives.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.net = torch.compile(model, dynamic=False) if recipe.torchcompile else model
        dtype = getattr(torch, recipe.amp_dtype)
        self.autocast = partial(torch.autocast, device.type, dtype=dtype) if recipe.amp else nullcontext

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes]."""
        with self.autocast():
            return self.net(x.contiguous(memory_format=self.memory_format))


class TrainStep:
    """`step(x, y, number)` trains the model on one batch.

    Args:
        model: the network, already on the device.
        forward: how it is called.
        optimizer: any torch optimizer over the model's parameters.
        recipe: attack, loss and regularisation settings.
        ema: average of the weights to update, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        self.model, self.forward, self.optimizer, self.recipe, self.ema = model, forward, optimizer, recipe, ema
        self.loss = make_loss(recipe.loss, beta=recipe.beta, smoothing=recipe.smoothing)
        self.attack = make_attack(model, recipe)
        act = getattr(model, 'act', None)
        self.shared_act = act if isinstance(act, PSSiLU) else None
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp and recipe.amp_dtype == 'float16')

    def __call__(self, x: torch.Tensor, y: torch.Tensor, number: int) -> StepOutput:
        """Attack the batch, take one optimizer step, and update the average.

        Args:
            x: images [B, C, H, W] in [0, 1].
            y: labels [B].
            number: steps taken before this one in the whole run.
        """
        recipe = self.recipe
        torch.manual_seed(recipe.seed * 1_000_003 + number)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, output, output_adv = self.loss(self.forward, self.attack, x, y)
        if self.shared_act is not None and recipe.pssilu_reg:
            loss = loss + recipe.pssilu_reg * self.shared_act.beta.abs().sum()
        self.scaler.scale(loss).backward()
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=number)
        shown = output if output_adv is None else output_adv
        assert shown is not None
        return StepOutput(loss.detach(), (shown.detach().argmax(1) == y).sum())

    def _clip(self) -> None:
        """Bound the gradients as the recipe says: all, then PSSiLU's beta on its own (Dai et al. 2021: 0.01)."""
        recipe = self.recipe
        if recipe.clip_grad is None and recipe.pssilu_beta_clip is None:
            return
        self.scaler.unscale_(self.optimizer)
        if recipe.clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), value=recipe.clip_grad, mode=recipe.clip_mode)
        if recipe.pssilu_beta_clip is not None and self.shared_act is not None:
            nn.utils.clip_grad_norm_([self.shared_act.beta], recipe.pssilu_beta_clip)


def make_attack(model: nn.Module, recipe: Recipe) -> Attack:
    """The recipe's training attack on this model; it freezes the parameters and sets batch norm's mode."""
    steps = 1 if recipe.attack == 'fgsm' else recipe.steps
    threat_model, step_size = recipe.threat_model, recipe.resolved_step_size

    def attack(loss_fn: LossFn, x: torch.Tensor) -> torch.Tensor:
        with attacked(model, recipe.attack_bn):
            return pgd(
                loss_fn,
                x,
                threat_model,
                steps=steps,
                step_size=step_size,
                random_start=recipe.random_start,
            )

    return attack


@contextmanager
def averaged_weights(model: nn.Module, ema: ModelEmaV3 | None) -> Iterator[None]:
    """Lend the averaged weights, if any, to the model, so that what was compiled for it serves both."""
    if ema is None:
        yield
        return
    own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(ema.module.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(own)
