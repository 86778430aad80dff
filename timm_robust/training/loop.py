"""The epoch loop: steps, validation, watchdog, checkpoints, log.

The best checkpoint is chosen by PGD accuracy on images held out of the training set; the test set is never looked at.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn

from ..activations import activation_state
from ..files import atomic_file, lock_folder, new_folder, sweep_temporaries
from ..models import BEST, LAST
from ..precision import fastest_convolutions
from .advice import near_chance
from .averaging import averaged_weights
from .batches import HELD_OUT_NAMES
from .checkpoints import read_step
from .log import RunLog
from .rollback import roll_back
from .run import (
    TICKS,
    Run,
    Sums,
    best_row,
    losses_since,
    metric_name,
    shown_share,
    take_lock,
    training_batch,
    unnamed,
    validations_since,
)
from .state import save
from .validation import StopAsked, reestimate_batch_norm, validate
from .warmup import pays, reserve, saving_seconds, training_interval, warm_up
from .watchdog import Diverged, check_epoch, check_loss, check_weights

logger = logging.getLogger('timm_robust')


SAVE_SECONDS = 600
"""After so long without a save there is one, whatever the intervals: a run that is killed loses no more."""

STAGE_BN_BATCHES = 50
"""Batches that re-estimate batch norm where progressive resizing goes on to another side."""


class Stopped(Exception):
    """The run was asked to stop; it saved its state first."""


def fit(run: Run) -> dict[str, Any]:
    """Train to the end of the schedule; returns the run's result, the last line of the log.

    Raises:
        Stopped: after a signal, with what to type to go on.
        Diverged: if the run went wrong more often than the recipe lets it go back.
        FileExistsError: if a new run would mix its checkpoints with those of another.
        BlockingIOError: if another process trains in the folder.
    """
    try:
        return train(run)
    finally:
        if run.lock is not None:
            run.lock.close()
            run.lock = None


def train(run: Run) -> dict[str, Any]:
    """What `fit` does while it holds the folder."""
    recipe = run.recipe
    occupy(run)
    if not run.world.rank:
        sweep_temporaries(run.folder)
    describe(run)
    log = RunLog(
        run.folder,
        config=recipe.public(),
        total_steps=run.total_steps,
        tensorboard=recipe.tensorboard,
        wandb=recipe.log_wandb,
        rank=run.world.rank,
        history=run.history,
        images=run.step * recipe.batch_size * run.world.size,
    )
    with log, run.writer, fastest_convolutions(run.world.device):
        prepare(run)
        while True:
            going = run.sums is not None or not (progress(run) >= 1 or out_of_patience(run))
            if not going and not unsettled(run):
                if progress(run) < 1:
                    logger.info('no better epoch in %d validations: the run ends early', recipe.patience)
                break
            try:
                if going:
                    finish_epoch(run, train_epoch(run, log), log)
                else:  # budget or patience ended behind an epoch that was not to be validated, or not to be saved
                    finish_epoch(run, run.history.pop(), log, last=True)
            except Diverged as error:
                if not going:  # the run has ended
                    logger.warning('%s: the best checkpoint stands', error)
                    break
                roll_back(run, error)
    run.world.wait()
    return result(run)


def occupy(run: Run) -> None:
    """Make the run's folder, or enter it, and hold it; a folder that nobody named is the run's own."""
    recipe, held = run.recipe, run.world.broadcast_object(run.lock is not None)
    if unnamed(recipe) and not run.step and not run.world.rank:
        run.folder = new_folder(run.folder)
    run.folder = run.world.broadcast_object(run.folder)
    if not held:
        if not run.world.rank:
            run.folder.mkdir(parents=True, exist_ok=True)
        run.lock = take_lock(run.folder, run.world)
    mixed = not (run.step or recipe.resume) and any(run.folder.glob('*.pth.tar'))  # no other run can make any now
    if run.world.broadcast_object(mixed):
        raise FileExistsError(
            f'{run.folder} holds a run already; go on with it by --resume auto, name another --experiment, or delete it'
        )
    make_folder(run)


def make_folder(run: Run) -> None:
    """The run's folder, with the recipe in it, and the names of what was held out of a folder of pictures."""
    if not run.world.rank:
        run.folder.mkdir(parents=True, exist_ok=True)
        replace(run.recipe, allow_changes=False, resume=None).to_yaml(run.folder / 'args.yaml')
        if run.held_out_names:
            with atomic_file(run.folder / HELD_OUT_NAMES) as file:
                file.write(os.fsencode('\n'.join([*run.held_out_names, ''])))  # a name may be no text


def describe(run: Run) -> None:
    """Say what is about to happen; an epoch is a number of images seen."""
    recipe, per_epoch, world = run.recipe, run.batches.steps_per_epoch, run.world
    if world.rank:
        return
    length = f'{recipe.budget} on the clock' if recipe.budget else f'{run.total_steps} steps'
    data = f'{len(run.batches.data)} images'
    if recipe.extra_data:
        data += f' and {len(run.batches.extra)} generated ones, {recipe.extra_fraction:.0%} of each batch'
    seen = per_epoch * recipe.batch_size * world.size
    bn = f'with batch norm in {recipe.attack_bn} mode'
    for line in (
        f'output in {run.folder}',
        f'{recipe.model} on {data} of {recipe.dataset}',
        f'{length} in batches of {recipe.batch_size} x {world.size}; an epoch is {seen} images seen, {per_epoch} steps',
        f'{recipe.loss} against {recipe.threat_model}, {recipe.attack} attack {bn}, on {world.device}',
    ):
        logger.info('%s', line)


def prepare(run: Run) -> None:
    """Compile, save what a first rollback goes back to, and tell the clock what a budget must leave time for."""
    started = time.perf_counter()
    timing = None
    try:
        timing = warm_up(run) if pays(run) else None
    except StopAsked:
        stop_if_asked(run, (run.step - 1) // run.batches.steps_per_epoch)
    if timing is not None:
        message = 'warmed up in %.1f s; a step takes %.3g s, a validation %.3g s'
        logger.info(message, time.perf_counter() - started, timing.steps[0.0], timing.validation)
    if timing is not None and run.clock.budget is not None:
        reserve(run, timing, saving_seconds(run))
        check_budget(run)
    if run.world.broadcast_object(run.step == 0 or not (run.folder / LAST).is_file()):
        save(run, (run.step - 1) // run.batches.steps_per_epoch, numbered=False)


def check_budget(run: Run) -> None:
    """Refuse a budget that start-up and the last validation use up; tell of one that they use half of.

    Raises:
        ValueError: with what a new run would need.
    """
    gone, closing, left = run.world.broadcast_object(
        (run.clock.elapsed(), run.clock.closing, run.clock.training_seconds())
    )
    what = f'--budget {run.recipe.budget}: start-up took {gone:.0f} s, the last validation needs {closing:.0f} s'
    if not run.step and not left:
        raise ValueError(f'{what}: nothing is left to train in; give at least {2 * (gone + closing):.0f}s')
    if not run.step and left < gone + closing:
        logger.warning('%s, which leaves %.0f s of training', what, left)


def progress(run: Run) -> float:
    """The share of the run that is done, the same in every process."""
    done = run.clock.progress(run.step)
    return done if run.clock.budget is None else run.world.broadcast_object(done)


def out_of_patience(run: Run) -> bool:
    """Whether so many validations as the recipe's patience have passed since the best one, at the full eps."""
    if run.recipe.patience is None:
        return False
    best = best_row(run.recipe, run.history, run.changes, run.best)
    grown = [row for row in run.history if shown_share(run, row) > run.recipe.eps_warmup]
    since = [row for row in grown if metric_name(run.recipe) in row and best and row['step'] > best['step']]
    return run.world.broadcast_object(len(since) >= run.recipe.patience)  # each process has a clock of its own


def unsettled(run: Run) -> bool:
    """Whether the last epoch has not been saved, or not been validated though there are images for it.

    Without such images it is settled once its weights are the best: a budget may end between an epoch and its save.
    """
    if len(run.history) > run.saved_rows:
        return True
    if run.held_out is None:
        run.writer.wait()
        return bool(run.history) and run.world.broadcast_object(best_step(run.folder) != run.step)
    return run.held_out is not None and bool(run.history) and metric_name(run.recipe) not in run.history[-1]


def best_step(folder: Path) -> int | None:
    """The step of a run's model_best.pth.tar; None where there is none, or a damaged one."""
    try:
        return read_step(folder / BEST)
    except Exception:
        return None


def save_is_due(run: Run) -> bool:
    """Whether the last save was SAVE_SECONDS ago, the same in every process."""
    return run.world.broadcast_object(time.perf_counter() - run.saved_at >= SAVE_SECONDS)


def train_epoch(run: Run, log: RunLog) -> dict[str, Any]:
    """Steps up to the end of the epoch (a resumed run may start inside one); returns its row for summary.csv."""
    recipe, per_epoch = run.recipe, run.batches.steps_per_epoch
    epoch = (run.step - (run.sums is not None)) // per_epoch  # an unfinished one may have taken its last step
    end = (epoch + 1) * per_epoch
    if run.clock.budget is None:
        end = min(end, run.total_steps)
    if run.sums is None:
        zero = torch.zeros((), device=run.world.device)
        run.sums = Sums(run.step, zero, zero)
    sums, first, started = run.sums, run.step, time.perf_counter()
    while run.step < end:
        done = progress(run)
        if done >= 1 and run.step > sums.first_step:  # the budget is spent, and the epoch has its one step at least
            break
        if run.scheduler is not None:
            run.scheduler.step_update(round(done * TICKS) if run.clock.budget else run.step)
        enter_stage(run, recipe.side_at(done))
        x, y = training_batch(run, run.step)
        run.clock.go()
        out = run.train_step(x, y, run.step, done)
        sums.loss, sums.correct = sums.loss + out.loss, sums.correct + out.correct
        run.step += 1
        if run.step % recipe.log_interval == 0 or run.step == end:
            show(run, log, epoch_row(run, sums, first, started))
        stop_if_asked(run, epoch)
        run.writer.check()
        due = recipe.save_interval is not None and run.step % recipe.save_interval == 0
        if run.world.size == 1 or run.step % recipe.log_interval == 0:  # all processes must agree, which takes time
            due = save_is_due(run) or due
        if due and run.step < end:
            save_within(run, epoch)
    return epoch_row(run, sums, first, started)


def enter_stage(run: Run, side: int | None) -> None:
    """Train on images of this side from now on; batch norm's statistics, those of another side, are estimated anew.

    Raises:
        Stopped: after a signal; the run goes on with this.
    """
    if side == run.side:
        return
    before, run.side = run.side, side
    logger.info('images of %d x %d pixels from step %d on', side, side, run.step)
    if before is None:
        return
    run.clock.stop()
    try:
        reestimate_batch_norm(run, STAGE_BN_BATCHES)
    except StopAsked:
        run.side = before
        if run.sums is not None and run.sums.first_step == run.step:  # of an epoch without a step there is no row
            run.sums = None
        stop_if_asked(run, (run.step - 1) // run.batches.steps_per_epoch)


def save_within(run: Run, epoch: int) -> None:
    """Write last.pth.tar inside an epoch, unless the weights went wrong.

    Raises:
        Diverged: if a weight is not finite, in any process: their statistics differ within an epoch.
    """
    fault: Diverged | None = None
    run.clock.stop()
    try:
        check_weights(run.model)
    except Diverged as error:
        fault = error
    if run.world.max(float(fault is not None)):
        raise fault or Diverged('weights of another process are not finite')
    save(run, epoch, numbered=False)


def epoch_row(run: Run, sums: Sums, first: int, started: float) -> dict[str, Any]:
    """The present epoch's numbers so far, over all processes; this waits for the device.

    Args:
        run: the run.
        sums: of the epoch.
        first: the step at which this session began the epoch.
        started: when that was.

    Raises:
        Diverged: if the loss is not finite, or jumped.
    """
    steps, world = max(run.step - sums.first_step, 1), run.world
    loss, correct = world.sum(torch.stack([sums.loss.double(), sums.correct.double()])).tolist()
    batch, seconds = run.recipe.batch_size * world.size, time.perf_counter() - started
    check_loss(loss / steps / world.size, losses_since(run.history, run.changes), run.step)
    return {
        'epoch': (run.step - 1) // run.batches.steps_per_epoch,
        'step': run.step,
        'images': run.step * batch,
        'train_loss': loss / steps / world.size,
        'train_acc': correct / steps / batch,
        'lr': max(group['lr'] for group in run.train_step.optimizer.param_groups),  # layer decay lowers the others
        'images_per_s': (run.step - first) * batch / seconds,
        'seconds': run.clock.elapsed(),
    }


def show(run: Run, log: RunLog, row: dict[str, Any]) -> None:
    """The live line."""
    batch = run.recipe.batch_size * run.world.size
    if run.clock.budget is not None:
        log.total_steps = round(run.step / max(run.clock.progress(run.step), 1e-6))
    log.step(row, run.clock.left(run.step, row['images_per_s'] / batch))


def finish_epoch(run: Run, row: dict[str, Any], log: RunLog, *, last: bool = False) -> None:
    """Validate, watch, log and save; of the epochs between those of val_interval validate and save the last alone."""
    recipe, started = run.recipe, time.perf_counter()
    run.clock.stop()
    ended = last or progress(run) >= 1
    due = ended or (row['epoch'] + 1) % recipe.val_interval == 0
    if run.world.size > 1:
        for network in [run.model] if run.ema is None else [run.model, run.ema.module]:
            distribute_bn(network, run.world.size, reduce=True)
    if (run.held_out is not None and due) or (run.ema is not None and ended):
        if run.sums is not None and (ended or save_is_due(run)):  # validation may take long, or be killed
            save_within(run, row['epoch'])
        try:
            with averaged_weights(run.model, run.ema):
                if run.ema is not None:
                    reestimate_batch_norm(run, recipe.ema_bn_batches)
                if run.held_out is not None:
                    row.update(validate(run, run.held_out))
        except StopAsked:
            if run.sums is None:  # of an epoch that had ended before: its row waits to be validated
                run.history.append(row)
            stop_if_asked(run, row['epoch'])
    run.sums = None
    if run.side is not None:
        row['side'] = run.side
    row.update(activation_state(run.model if run.ema is None else run.ema.module))  # whose accuracy the row has
    check_epoch(row, validations_since(run.history, run.changes))
    check_weights(run.model)
    if not (run.world.rank or run.folder.is_dir()):  # other nodes may never have had it
        logger.warning('%s has vanished; it is made anew', run.folder)
        make_folder(run)
        run.lock = lock_folder(run.folder)
    run.history.append(row)
    log.epoch(run.history)
    if not run.world.rank and (line := near_chance(run)):
        logger.warning(line)
    metric = row.get(metric_name(recipe), -1.0)
    last_stage = run.side == recipe.side_at(1.0)  # smaller images are another task
    # with nothing to choose by the last weights are those of the run
    is_best = ended if run.held_out is None else last_stage and metric > run.best
    run.best = metric if is_best else run.best
    if due or save_is_due(run):
        save(run, row['epoch'], is_best=is_best)
    if metric_name(recipe) in row or run.held_out is None:
        seconds = run.world.max(time.perf_counter() - started + run.writer.seconds)
        interval = run.clock.interval
        if row['images_per_s']:  # not where a resumed epoch had no step left to take
            interval = training_interval(run) * recipe.batch_size * run.world.size / row['images_per_s']
        # the last one re-estimates the average too, where nothing is held out it alone does
        whole = run.held_out is not None or run.ema is None
        like_the_last = progress(run) >= recipe.turning_points[-1] and run.side == recipe.side_at(1.0) and whole
        run.clock.note_validation(seconds, interval, like_the_last)


def stop_if_asked(run: Run, epoch: int) -> None:
    """After a signal: save, and end the run.

    Raises:
        Stopped: with what to type to go on.
        Diverged: if a weight is not finite.
    """
    asked = run.world.max(float(run.stop)) if run.world.size > 1 else run.stop
    if asked:
        save_within(run, epoch)
        run.writer.wait()
        raise Stopped(
            f'stopped by a signal at step {run.step}, and saved; go on with --resume {run.folder / "last.pth.tar"} '
            'and the same settings'
        )


def result(run: Run) -> dict[str, Any]:
    """The run in one line: the best epoch's accuracies, steps, time and where the checkpoint is."""
    best = best_row(run.recipe, run.history, run.changes, run.best) or (run.history or [{}])[-1]
    keys = ('epoch', 'val_clean_acc', 'val_pgd_acc', 'alpha', 'beta')
    return {
        'model': run.recipe.model,
        'threat_model': str(run.recipe.threat_model),
        'output': str(run.folder),
        **{key: best[key] for key in keys if key in best},
        'steps': run.step,
        'images': run.step * run.recipe.batch_size * run.world.size,
        'seconds': round(run.clock.elapsed(), 1),
        'rollbacks': run.rollbacks,
    }
