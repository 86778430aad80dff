"""The run of a recipe: build, resume, the epoch loop, validation, logging and checkpoints.

The clock is the step: data order, augmentation, noise and learning rate all follow from (recipe, step), so a
checkpoint holds weights, optimizer, average and the step, and a resumed run continues as if it had never stopped. The
best checkpoint is chosen by PGD accuracy on images held out of the training set; the test set is never looked at.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3

from .activations import Activation
from .attacks import attacked, pgd
from .checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, read_weights, save_checkpoint
from .data import ImageData, TrainBatches, load_dataset, split_holdout
from .losses import cross_entropy
from .recipe import Recipe
from .results import atomic_file
from .step import Forward, TrainStep, averaged_weights
from .threat_model import ThreatModel

logger = logging.getLogger('timm_robust')


@dataclass
class Run:
    """Everything of a run, built from its recipe by `build`.

    Args:
        recipe: the settings.
        folder: where logs and checkpoints go.
        device: where it trains.
        model: the network.
        ema: its averaged copy, or None.
        forward: how the network is called.
        train_step: one training step.
        scheduler: sets the learning rate by step.
        batches: the training stream.
        held_out: validation images, or None.
        total_steps: steps of the whole schedule.
        step: steps taken.
        seconds: time spent training, over all sessions.
        best: highest validation metric so far.
        history: one row an epoch, as in summary.csv.
    """

    recipe: Recipe
    folder: Path
    device: torch.device
    model: nn.Module
    ema: ModelEmaV3 | None
    forward: Forward
    train_step: TrainStep
    scheduler: Scheduler | None
    batches: TrainBatches
    held_out: ImageData | None
    total_steps: int
    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)


def build(recipe: Recipe) -> Run:
    """Read the data, make the model and what trains it, and restore the checkpoint that the recipe resumes from.

    Raises:
        ValueError, FileNotFoundError: for data, model names, weights or checkpoints that are not there or do not fit.
    """
    device = torch.device(recipe.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    torch.manual_seed(recipe.seed)
    data = load_dataset(recipe.dataset, recipe.data_dir, 'train', recipe.dataset_download)
    rest, held_out = split_holdout(data, recipe.val_size, recipe.seed)
    batches = TrainBatches(rest.to(device), recipe.batch_size, recipe.seed, recipe.crop_padding, recipe.hflip)
    model = create_model(recipe, data.num_classes).to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    ema = None
    if recipe.model_ema:
        ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    optimizer = create_optimizer_v2(
        model,
        opt=recipe.opt,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=recipe.filter_bias_and_bn,
    )
    forward = Forward(model, recipe, device)
    epochs, per_epoch = recipe.epochs, batches.steps_per_epoch
    total = min(recipe.max_steps or epochs * per_epoch, epochs * per_epoch)
    run = Run(
        recipe=recipe,
        folder=output_folder(recipe),
        device=device,
        model=model,
        ema=ema,
        forward=forward,
        train_step=TrainStep(model, forward, optimizer, recipe, ema),
        scheduler=make_scheduler(optimizer, recipe, total),
        batches=batches,
        held_out=held_out.to(device) if len(held_out) else None,
        total_steps=total,
    )
    if recipe.resume:
        restore(run)
    return run


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network from timm's registry, with its initial weights.

    Raises:
        ValueError: for a name that is not registered, with the nearest ones.
    """
    if not timm.is_model(recipe.model):
        near = difflib.get_close_matches(recipe.model, timm.list_models(), n=3)
        raise ValueError(f'model {recipe.model!r} is not registered with timm; nearest: {", ".join(near) or "none"}')
    classes = recipe.num_classes or num_classes
    model = timm.create_model(recipe.model, recipe.pretrained, num_classes=classes, **recipe.model_kwargs)
    if recipe.initial_checkpoint:
        model.load_state_dict(read_weights(recipe.initial_checkpoint))
    return model


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> Scheduler | None:
    """A timm scheduler over the whole run, set by step; 'onecycle' rises over the warm-up, then falls, both linearly.

    A run that max_steps makes shorter than its epochs goes through the same course faster.
    """
    steps_per_epoch = total_steps / recipe.epochs
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total_steps - 1)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched={'onecycle': 'poly'}.get(recipe.sched, recipe.sched),
        num_epochs=total_steps - warmup,
        warmup_epochs=warmup,
        warmup_prefix=True,
        warmup_lr=recipe.min_lr,
        min_lr=recipe.min_lr,
        decay_milestones=[round(m * steps_per_epoch) - warmup + 1 for m in recipe.decay_milestones],  # timm adds 1 to t
        decay_rate=1.0 if recipe.sched == 'onecycle' else recipe.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def fit(run: Run) -> dict[str, Any]:
    """Train to the end of the schedule; returns the last line of the log: the run's result."""
    recipe = run.recipe
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(run.folder / 'args.yaml', full=True)
    per_epoch = run.batches.steps_per_epoch
    logger.info(
        '%s: %d images, %d steps of %d in %.4g epochs, %s, %s attack with batch norm in %s mode, %s',
        *(recipe.model, len(run.batches.data), run.total_steps, recipe.batch_size, run.total_steps / per_epoch),
        *(recipe.threat_model, recipe.attack, recipe.attack_bn, run.device),
    )
    while run.step < run.total_steps:
        row = train_epoch(run)
        epoch = row['epoch']
        if run.held_out is not None and ((epoch + 1) % recipe.val_interval == 0 or run.step >= run.total_steps):
            with averaged_weights(run.model, run.ema):
                row.update(validate(run.model, run.forward, run.held_out, recipe))
        row.update(activation_state(run.model))
        run.history.append(row)
        write_summary(run)
        metric = row.get(metric_name(recipe), -1.0)
        is_best = metric > run.best
        run.best = max(run.best, metric)
        save(run, epoch, metric, is_best)
        logger.info('%s', '  '.join(f'{key} {value:.4g}' for key, value in row.items()))
    return result(run)


def train_epoch(run: Run) -> dict[str, Any]:
    """Steps up to the end of the epoch (a resumed run may start inside one); returns its row for summary.csv."""
    recipe, per_epoch = run.recipe, run.batches.steps_per_epoch
    epoch = run.step // per_epoch
    end = min((epoch + 1) * per_epoch, run.total_steps)
    started, first, shown_at = time.perf_counter(), run.step, time.perf_counter()
    loss_sum = correct = torch.zeros((), device=run.device)
    while run.step < end:
        if run.scheduler is not None:
            run.scheduler.step_update(run.step)
        x, y = run.batches[run.step]
        out = run.train_step(x, y, run.step)
        loss_sum, correct = loss_sum + out.loss, correct + out.correct
        run.step += 1
        if run.step % recipe.log_interval == 0 or run.step == end:
            done, now = run.step - first, time.perf_counter()
            mean_loss = loss_sum.item() / done  # the only wait for the device
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f'the loss is {mean_loss} at step {run.step} (epoch {epoch}); what {run.folder} holds is intact. '
                    'Lower --lr, add --clip-grad 1.0, or resume with another --seed'
                )
            rate = done * recipe.batch_size / (now - started)
            left = (run.total_steps - run.step) * recipe.batch_size / rate
            logger.info(
                'epoch %d step %d/%d loss %.4f acc %.1f %% lr %.4g %.1f images/s left %s',
                *(epoch, run.step, run.total_steps, mean_loss, 100 * correct.item() / done / recipe.batch_size),
                *(learning_rate(run), rate, time.strftime('%H:%M:%S', time.gmtime(left))),
            )
            shown_at = now
    run.seconds += shown_at - started
    images = (run.step - first) * recipe.batch_size
    return {
        'epoch': epoch,
        'step': run.step,
        'images': run.step * recipe.batch_size,
        'train_loss': loss_sum.item() / max(run.step - first, 1),
        'train_acc': correct.item() / max(images, 1),
        'lr': learning_rate(run),
        'images_per_s': images / (shown_at - started),
        'seconds': run.seconds,
    }


def validate(model: nn.Module, forward: Forward, data: ImageData, recipe: Recipe) -> dict[str, float]:
    """Clean and PGD accuracy on held-out images, in the precision of training: {'val_clean_acc', 'val_pgd_acc'}."""
    threat_model: ThreatModel = recipe.threat_model
    generator = torch.Generator(data.images.device).manual_seed(recipe.seed)
    clean = robust = torch.zeros((), device=data.images.device)
    with attacked(model):
        for x, y in data.batches(recipe.val_batch_size):
            x_adv = pgd(
                lambda x: cross_entropy(forward(x), y),  # noqa: B023 - called within this turn of the loop
                x,
                threat_model,
                steps=recipe.eval_steps,
                step_size=recipe.resolved_eval_step_size,
                generator=generator,
            )
            with torch.no_grad():
                right = forward(x).argmax(1) == y
                clean = clean + right.sum()
                robust = robust + (right & (forward(x_adv).argmax(1) == y)).sum()
    return {'val_clean_acc': clean.item() / len(data), 'val_pgd_acc': robust.item() / len(data)}


def activation_state(model: nn.Module) -> dict[str, float]:
    """alpha, beta and max abs(f'') of the network's shared activation, where it has learnable parameters."""
    act = getattr(model, 'act', None)
    if not isinstance(act, Activation) or not act.initial:
        return {}
    return {**act.values(), 'max_curvature': act.max_curvature()}


def metric_name(recipe: Recipe) -> str:
    """What the best checkpoint is best in: PGD accuracy, or clean accuracy for clean training."""
    return 'val_clean_acc' if recipe.loss == 'clean' else 'val_pgd_acc'


def learning_rate(run: Run) -> float:
    """The present rate of the first parameter group."""
    return run.train_step.optimizer.param_groups[0]['lr']


def output_folder(recipe: Recipe) -> Path:
    """output/<experiment>; a run that resumes a checkpoint file goes on in that file's folder."""
    if recipe.resume and recipe.resume != 'auto':
        return Path(recipe.resume).parent
    return Path(recipe.output) / (recipe.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{recipe.model}')


def save(run: Run, epoch: int, metric: float, is_best: bool) -> None:
    """Write checkpoint-<epoch>.pth.tar, last.pth.tar and, if so, model_best.pth.tar; drop old ones."""
    state = {
        'version': 1,
        'arch': run.recipe.model,
        'model_kwargs': dict(run.recipe.model_kwargs),
        'num_classes': run.model.num_classes,
        'recipe': asdict(run.recipe),
        'epoch': epoch,
        'step': run.step,
        'seconds': run.seconds,
        'metric': metric,
        'best': run.best,
        'history': run.history,
        'state_dict': run.model.state_dict(),
        'optimizer': run.train_step.optimizer.state_dict(),
        'scaler': run.train_step.scaler.state_dict(),
    }
    if run.ema is not None:
        state['state_dict_ema'] = run.ema.module.state_dict()
    save_checkpoint(run.folder / f'checkpoint-{epoch}.pth.tar', state)
    save_checkpoint(run.folder / 'last.pth.tar', state)
    if is_best:
        save_checkpoint(run.folder / 'model_best.pth.tar', state)
    prune_checkpoints(run.folder, run.recipe.checkpoint_hist)


def restore(run: Run) -> None:
    """Load the checkpoint of `resume`: a file, or 'auto' for the newest in the experiment's folder, if there is one.

    Raises:
        ValueError: if the checkpoint is of another model or of another schedule's batch size.
    """
    recipe = run.recipe
    path = latest_checkpoint(run.folder) if recipe.resume == 'auto' else Path(str(recipe.resume))
    if path is None:
        logger.info('nothing to resume in %s: starting afresh', run.folder)
        return
    state = load_checkpoint(path)
    for key, ours in (('arch', recipe.model), ('num_classes', run.model.num_classes)):
        if state.get(key) != ours:
            raise ValueError(
                f'checkpoint {path} holds {key} {state.get(key)!r}, the recipe says {ours!r}; name the right one'
            )
    theirs = state['recipe']['batch_size']
    if theirs != recipe.batch_size:
        raise ValueError(
            f'checkpoint {path} was trained with --batch-size {theirs}; resume with the same, not {recipe.batch_size}'
        )
    run.model.load_state_dict(state['state_dict'])
    run.train_step.optimizer.load_state_dict(state['optimizer'])
    run.train_step.scaler.load_state_dict(state['scaler'])
    if run.ema is not None:
        run.ema.module.load_state_dict(state.get('state_dict_ema', state['state_dict']))
    run.step, run.seconds, run.best, run.history = state['step'], state['seconds'], state['best'], state['history']
    logger.info('resumed %s at step %d of %d', path, run.step, run.total_steps)


def write_summary(run: Run) -> None:
    """summary.csv anew from the history: whole after a resume, and never half a row."""
    columns = list(dict.fromkeys(key for row in run.history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(run.history)
    with atomic_file(run.folder / 'summary.csv') as file:
        file.write(text.getvalue().encode())


def result(run: Run) -> dict[str, Any]:
    """The run in one line: the best epoch's accuracies, steps, time and where the checkpoint is."""
    best = max(run.history, key=lambda row: row.get(metric_name(run.recipe), -1.0), default={})
    keys = ('epoch', 'val_clean_acc', 'val_pgd_acc', 'alpha', 'beta')
    line: dict[str, Any] = {
        'model': run.recipe.model,
        'threat_model': str(run.recipe.threat_model),
        'output': str(run.folder),
    }
    line.update({key: best[key] for key in keys if key in best})
    line.update(steps=run.step, images=run.step * run.recipe.batch_size, seconds=round(run.seconds, 1))
    return json.loads(json.dumps(line))
