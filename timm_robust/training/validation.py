"""What a run does at the end of an epoch to know how good it is: clean and PGD accuracy on held-out images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn as nn
from timm.utils import distribute_bn

from ..attacks import batch_norms, cross_entropy_of, labels_of, pgd
from ..pixels import pixel_input, resized
from .run import Run, training_batch
from .step import Forward


class StopAsked(Exception):
    """A signal came in a validation, or where statistics are re-estimated; it is made anew when the run goes on."""


def validate(run: Run, data: Any) -> dict[str, float]:
    """Clean and PGD accuracy on held-out images, in the precision of training: {'val_clean_acc', 'val_pgd_acc'}.

    The batches are of the training's size; the last one is filled up where another shape would be compiled anew.
    The attacks begin at the same points in every epoch of a run, also after it was resumed with another seed.

    Raises:
        StopAsked: if the run was asked to stop meanwhile; not with several processes, which do not hear it at once.
    """
    recipe, device = run.recipe, next(run.model.parameters()).device
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    settings: dict[str, Any] = {
        'steps': recipe.eval_steps,
        'step_size': recipe.resolved_eval_step_size,
        'generator': torch.Generator(device).manual_seed(run.split_seed),
    }
    fixed = recipe.torchcompile or device.type == 'cuda'
    with run.attack_forward.ready('eval') as forward:
        for x, y in data.batches(recipe.batch_size):
            if run.stop and run.world.size == 1:
                raise StopAsked
            x, n = resized(x, run.side), len(y)
            if fixed:
                x, y = _filled(x, recipe.batch_size), _filled(y, recipe.batch_size)
            x_adv = pgd(cross_entropy_of(forward, y), x, recipe.threat_model, **settings)
            with torch.no_grad():
                right = labels_of(forward(x)) == y
                robust = right & (labels_of(forward(x_adv)) == y)
            counts += torch.stack([right[:n].sum(), robust[:n].sum(), torch.full((), n, device=device)])
    clean, pgd_right, n = run.world.sum(counts).tolist()
    return {'val_clean_acc': clean / n, 'val_pgd_acc': pgd_right / n}


def _filled(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Rows [n, ...] and zeros behind them, [size, ...]."""
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def reestimation_batches(run: Run, batches: int) -> int:
    """How many training batches `reestimate_batch_norm` takes of those wanted: at most a quarter of an epoch."""
    return min(batches, max(run.batches.steps_per_epoch // 4, 1))


def reestimate_batch_norm(run: Run, batches: int) -> None:
    """Running statistics anew: the plain mean over so many batches of what training feeds the network, but unmixed.

    For averaged weights, whose averaged statistics belong to no weights that ever were, and for images of another side
    than before. The adversarial images are made first, with the statistics as they are. Frozen ones stay.

    Raises:
        StopAsked: as `validate`; the statistics are then as they were.
    """
    model, step, recipe = run.model, run.train_step, run.recipe
    norms = batch_norms(model)
    if not norms or not batches or recipe.freeze_bn:
        return
    inputs = []
    done = run.clock.progress(run.step)
    for number in range(reestimation_batches(run, batches)):
        if run.stop and run.world.size == 1:
            raise StopAsked
        step.draw_from(run.step + number)
        x, y = training_batch(run, run.step + number)
        inputs.append((x, step.perturb(x, y, done), y))
    # not run.forward: other momenta would be compiled anew, and stay a burden
    forward = Forward(pixel_input(model, recipe.inner_size), run.forward.precision, run.world.device)
    momenta = [norm.momentum for norm in norms]
    calls = Counter[nn.Module]()

    def take_plain_mean(norm: Any, args: Any) -> None:
        """What momentum None does, which would read each norm's counter from the device."""
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]

    hooks = [norm.register_forward_pre_hook(take_plain_mean) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x, x_adv, y in inputs:
            step.loss.descend(forward, x, x_adv, y)
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        hook.remove()
        norm.momentum = momentum
    if run.world.size > 1:
        distribute_bn(model, run.world.size, reduce=True)
