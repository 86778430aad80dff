"""A run: everything that a recipe stands for, built and ready to train; saved as a checkpoint and restored from one.

The clock is the step: data order, augmentation, noise, attack and learning rate all follow from (recipe, step), so a
checkpoint holds weights, optimizer, average, the step and the sums of an unfinished epoch, and a resumed run continues
as if it had never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, strftime
from typing import IO, Any

import torch
import torch.nn as nn
from timm.scheduler.scheduler import Scheduler

from ..distributed import World
from ..files import lock_folder
from ..pixels import resized
from .averaging import ModelEma
from .batches import VALIDATION
from .clock import Clock
from .recipe import Recipe
from .step import AttackForward, Forward, TrainStep
from .writer import Writer

_MEASURED = {'norm', 'eps', 'eval_steps', 'eval_step_size', 'img_size', VALIDATION}
"""Settings without which a validation is no measure of another."""

TICKS = 100_000
"""Resolution of a schedule that follows the clock on the wall."""


@dataclass
class Sums:
    """What the present epoch has added up, on the device."""

    first_step: int
    loss: torch.Tensor
    correct: torch.Tensor


@dataclass
class Run:
    """Everything of a run.

    Args:
        recipe: the settings.
        folder: where logs and checkpoints go.
        world: this process among the others.
        model: the network.
        ema: its averaged copy, or None.
        forward: how the network is called.
        attack_forward: how attacks call it.
        train_step: one training step.
        scheduler: sets the learning rate, by step or by tick; None for a constant rate.
        batches: the training stream.
        held_out: validation images, or None.
        total_steps: steps of the whole schedule; with a budget those of the epochs, which the clock overrides.
        clock: how far the run is.
        split_seed: of the held-out images and of the attacks on them: the seed that the run began with.
        step: steps taken.
        sums: of the unfinished epoch, or None.
        best: highest validation metric so far.
        history: one row an epoch, as in summary.csv.
        rollbacks: how often the run went back to an earlier state.
        stop: set by a signal handler; the run saves and ends after the step.
        side: of the training images at the last step, in progressive resizing; None before it, and without.
        writer: writes checkpoints while training goes on.
        saved_rows: rows of history in the newest checkpoint.
        saved_at: when that was, by time.perf_counter.
        origins: for each start or resumption its step, processes, hardware, versions and commit.
        images: what for -> fingerprint of the images.
        held_out_names: files that were drawn out of the training folder to validate on.
        changes: for each resumption under other settings or on other images its step, epoch and rows of history, and
            what changed.
        returns: steps that rollbacks of this session went back to.
        lock: what holds the folder, in the first process.
        point: the checkpoint that the run went on from and its step, until it saves; later ones are set aside then.
        best_before: the checkpoint of the best epoch until then, if model_best.pth.tar is of a later one.
    """

    recipe: Recipe
    folder: Path
    world: World
    model: nn.Module
    ema: ModelEma | None
    forward: Forward
    attack_forward: AttackForward
    train_step: TrainStep
    scheduler: Scheduler | None
    batches: Any
    held_out: Any
    total_steps: int
    clock: Clock
    split_seed: int
    step: int = 0
    sums: Sums | None = None
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: int = 0
    stop: bool = False
    side: int | None = None
    writer: Writer = field(default_factory=Writer)
    saved_rows: int = 0
    saved_at: float = field(default_factory=perf_counter)
    origins: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    held_out_names: list[str] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    returns: set[int] = field(default_factory=set)
    lock: IO[str] | None = None
    point: tuple[Path, int] | None = None
    best_before: Path | None = None


def take_lock(folder: Path, world: World) -> IO[str] | None:
    """Hold the folder of a run for its first process.

    Raises:
        OSError: in every process, if another run holds it, or the disk refuses.
    """
    lock, fault = None, None
    if not world.rank:
        try:
            lock = lock_folder(folder)
        except OSError as error:
            fault = error
    fault = world.broadcast_object(fault)
    if fault is not None:
        raise fault
    return lock


def architecture(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """What builds the recipe's network: a name of timm's registry, and arguments."""
    if recipe.act is None:
        return recipe.model, dict(recipe.model_kwargs)
    return 'act_swapped', {'model': recipe.model, 'act': recipe.act, 'shared': recipe.act_shared, **recipe.model_kwargs}


def unnamed(recipe: Recipe) -> bool:
    """Whether the run's folder gets its name from the time and is new."""
    return recipe.experiment is None and recipe.resume in (None, 'auto')


def output_folder(recipe: Recipe) -> Path:
    """output/<experiment>; a run that resumes a checkpoint file goes on in that file's folder."""
    if recipe.resume and recipe.resume != 'auto':
        return Path(recipe.resume).parent
    return Path(recipe.output) / (recipe.experiment or f'{strftime("%Y%m%d-%H%M%S")}-{recipe.model}')


def training_batch(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch number `step`, (x [B, C, H, W] in [0, 1], y [B]), with images of the present stage's side."""
    x, y = run.batches[step]
    return resized(x, run.side), y


def metric_name(recipe: Recipe) -> str:
    """What the best checkpoint is best in: PGD accuracy, or clean accuracy for clean training."""
    return 'val_clean_acc' if recipe.loss == 'clean' else 'val_pgd_acc'


def shown_share(run: Run, row: dict[str, Any]) -> float:
    """The share of the run that was done at an epoch's end, from its row."""
    return row['seconds'] / run.clock.budget if run.clock.budget else row['step'] / run.total_steps


def losses_since(history: list[dict[str, Any]], changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The epochs after the last one with a change of settings in it (--allow-changes): losses before are of others."""
    last = next((each['epoch'] for each in reversed(changes) if each['changes'].keys() - {'seed'}), -1)
    return [row for row in history if row['epoch'] > last]


def validations_since(history: list[dict[str, Any]], changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The epochs validated since the last change of what a validation measures."""
    for each in reversed(changes):
        if _MEASURED & each['changes'].keys() or 'clean' in each['changes'].get('loss', ()):
            start = each.get('rows')
            if start is None:  # of a checkpoint that did not count them
                start = sum(row['step'] <= each['step'] for row in history)
            return history[start:]
    return history


def best_row(
    recipe: Recipe, history: list[dict[str, Any]], changes: list[dict[str, Any]], best: float
) -> dict[str, Any] | None:
    """The row of the epoch that was saved as the best, with this metric; None if it is of another run."""
    metric, side, rows = metric_name(recipe), recipe.side_at(1.0), validations_since(history, changes)
    return next((row for row in rows if row.get(metric) == best and row.get('side') == side), None)
