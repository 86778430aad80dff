"""What a checkpoint holds: a run saved, and restored."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..files import link_file
from ..models import BEST, LAST, load_checkpoint
from .batches import image_shape, make_batches
from .changes import Changes, find_changes
from .checkpoints import later_checkpoints, prune_checkpoints, read_step, save_checkpoint, set_aside, snapshot
from .recipe import Recipe
from .run import Run, Sums, architecture, best_row

logger = logging.getLogger('timm_robust')


def save(run: Run, epoch: int, *, numbered: bool = True, is_best: bool = False) -> None:
    """Write last.pth.tar, and at an epoch's end checkpoint-<epoch>.pth.tar and model_best.pth.tar; drop old ones.

    A thread writes, once for all names; `run.writer.wait()` waits until everything is on the disk.

    Raises:
        OSError: if the save before this one failed.
    """
    sums = None
    if run.sums is not None:
        sums = [run.sums.first_step, run.world.sum(run.sums.loss), run.world.sum(run.sums.correct)]
    run.saved_rows, run.saved_at = len(run.history), perf_counter()
    if run.world.rank:
        return
    run.writer.wait()
    if run.point is not None and run.point[0].parent == run.folder:
        leave_course(run, *run.point)
    state = {
        'version': 1,
        'arch': architecture(run.recipe)[0],
        'model_kwargs': architecture(run.recipe)[1],
        'num_classes': run.model.num_classes,
        'classes': list(run.batches.data.classes),
        'input_size': image_shape(run.batches.data),
        'unreadable': sorted(getattr(run.batches.data, 'unreadable', {}).values()),
        'recipe': asdict(run.recipe),
        'split_seed': run.split_seed,
        'epoch': epoch,
        'step': run.step,
        'sums': sums,
        'seconds': run.clock.elapsed(),
        'progress': run.clock.progress(run.step),
        'best': run.best,
        'history': run.history,
        'rollbacks': run.rollbacks,
        'side': run.side,
        'origins': run.origins,
        'images': run.images,
        'changes': run.changes,
        'state_dict': run.model.state_dict(),
        'optimizer': run.train_step.optimizer.state_dict(),
    }
    if run.ema is not None:
        state['state_dict_ema'] = run.ema.module.state_dict()
    names = [LAST, BEST] if is_best else [LAST]
    if numbered:
        names.insert(0, f'checkpoint-{epoch}.pth.tar')
    run.writer.start(partial(_write, run.folder, snapshot(state), names, run.recipe))


def leave_course(run: Run, point: Path, step: int) -> None:
    """Set aside what was saved after the checkpoint that the run went on from."""
    run.point = None
    aside = set_aside(run.folder, step, point if point.is_file() else None, run.best_before)
    if aside is not None:
        logger.warning('what was saved after step %d is of the course that was left; it is in %s now', step, aside)


def _write(folder: Path, state: dict[str, Any], names: list[str], recipe: Recipe) -> None:
    """Write a state under its names, in an order of which every part is sound.

    What is killed between two of them goes on from the newest, which `mend_names` gives the names that it lacks.
    """
    save_checkpoint(folder / names[0], state, names[1:])
    prune_checkpoints(folder, recipe.checkpoint_hist)


def mend_names(path: Path, state: dict[str, Any], recipe: Recipe) -> None:
    """Give a checkpoint the names that a kill kept from it: last.pth.tar, and model_best.pth.tar if it is the best.

    Args:
        path: the checkpoint.
        state: what it holds.
        recipe: says what the best is best in.
    """
    best = best_row(recipe, state['history'], state.get('changes', []), state['best'])
    for name in [LAST, BEST] if best is not None and best['step'] == state['step'] else [LAST]:
        target = path.with_name(name)
        try:
            step = read_step(target)
        except Exception:  # missing, or damaged
            step = -1
        if step < state['step']:
            link_file(path, target)
            logger.warning('%s was missing or older; it is %s now', target, path.name)


def restore(run: Run, path: Path, state: dict[str, Any] | None = None) -> None:
    """Take the run to where a checkpoint was written.

    Args:
        run: the run.
        path: of the file.
        state: what it holds, where it has been read already.

    Raises:
        ValueError: if the checkpoint is of another model, of batches of another size, or behind the schedule's end.
    """
    recipe = run.recipe
    run.writer.wait()
    if state is None:
        state = load_checkpoint(path)
    check_resumable(run, path, state)
    changes = find_changes(state, recipe, run.images)
    try:
        run.model.load_state_dict(state['state_dict'])
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'{path} holds the weights of another {recipe.model}: {reason}') from None
    restore_optimizer(run, path, state, changes)
    if run.ema is not None:
        run.ema.module.load_state_dict(state.get('state_dict_ema', state['state_dict']))
    run.step, run.best, run.history = state['step'], state['best'], list(state['history'])
    run.changes = list(state.get('changes', ()))
    if changes:
        at = {'step': run.step, 'epoch': state['epoch'], 'rows': len(run.history)}
        run.changes.append({**at, 'changes': changes})
    if best_row(recipe, run.history, run.changes, run.best) is None:  # it was measured otherwise
        run.best = -1.0
    run.saved_rows, run.saved_at = len(run.history), perf_counter()
    if not run.world.rank:
        mend_names(path, state, recipe)
    run.point, run.best_before = (path, run.step), None
    if not (run.folder / BEST).is_file():  # the run was moved without it
        run.best = -1.0
    elif run.folder / BEST in later_checkpoints(run.folder, run.step):  # of a course that is left
        run.best_before = find_best(run)
        run.best = run.best if run.best_before else -1.0
    if 'images' not in state:
        logger.info('%s does not tell its images: they are taken for these', path)
    before = list(state.get('origins', ()))
    run.origins = before + [origin for origin in run.origins if origin not in before]
    run.side = state.get('side')
    run.sums = restore_sums(run, state)
    run.clock.restart(state['seconds'], state.get('progress'))
    change_seed(run, state['rollbacks'])
    steps = run.world.gather({run.world.rank: run.step})
    if len(set(steps.values())) > 1:
        raise ValueError(
            f'{path} is not the same file for every process: they would go on from steps {list(steps.values())}'
        )
    logger.info('resumed %s at step %d of %d', path, run.step, run.total_steps)


def check_resumable(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, of batches of another size, or behind the end.

    Raises:
        ValueError: saying what to type.
    """
    recipe = run.recipe
    for key, ours in (('arch', architecture(recipe)[0]), ('num_classes', run.model.num_classes)):
        if state.get(key) != ours:
            raise ValueError(f'{path} holds {key} {state.get(key)!r}, the recipe says {ours!r}; name the right one')
    theirs, processes = state['recipe']['batch_size'], processes_of(run, state)
    if theirs * processes != recipe.batch_size * run.world.size:
        raise ValueError(
            f'{path} was trained with --batch-size {theirs} in each of {processes} processes; resume with batches of '
            f'{theirs * processes} in all, not {recipe.batch_size} x {run.world.size}'
        )
    if run.clock.budget is None and state['step'] > run.total_steps:
        raise ValueError(
            f'{path} is at step {state["step"]}, behind the end of this schedule, step {run.total_steps}; '
            'type more --epochs or --max-steps, or begin a new run by another --experiment'
        )


def processes_of(run: Run, state: dict[str, Any]) -> int:
    """How many processes wrote a checkpoint; older ones do not say it."""
    return next((origin['processes'] for origin in reversed(state.get('origins', ()))), run.world.size)


def restore_sums(run: Run, state: dict[str, Any]) -> Sums | None:
    """What the epoch of a checkpoint had added up, over all processes, each of which adds the mean loss of its part."""
    if state['sums'] is None:
        return None
    first, loss, correct = state['sums']
    loss, correct = loss.to(run.world.device), correct.to(run.world.device)
    if run.world.rank:
        return Sums(first, torch.zeros_like(loss), torch.zeros_like(correct))
    processes = processes_of(run, state)
    return Sums(first, loss if run.world.size == processes else loss * run.world.size / processes, correct)


def restore_optimizer(run: Run, path: Path, state: dict[str, Any], changes: Changes) -> None:
    """The moments of the checkpoint under the recipe's settings; an optimizer of another kind begins without."""
    optimizer, saved = run.train_step.optimizer, state['optimizer']
    sizes = [[len(group['params']) for group in groups] for groups in (optimizer.param_groups, saved['param_groups'])]
    if 'opt' in changes or sizes[0] != sizes[1]:
        logger.warning('the optimizer is another than in %s: it begins without moments', path)
        return
    ours = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if changes.keys() & {'lr', 'momentum', 'weight_decay', 'opt_kwargs', 'layer_decay', 'sched'}:
        for group, settings in zip(optimizer.param_groups, ours, strict=True):
            group.update(settings)


def find_best(run: Run) -> Path | None:
    """The numbered checkpoint of the best epoch."""
    row = best_row(run.recipe, run.history, run.changes, run.best)
    if row is None:
        return None
    later = later_checkpoints(run.folder, row['step'] - 1)
    return next((path for path in later if path.name not in (LAST, BEST) and read_step(path) == row['step']), None)


def change_seed(run: Run, rollbacks: int) -> None:
    """Give data order, augmentation and attacks another seed, one for each rollback; 0 is the recipe's own."""
    if rollbacks != run.rollbacks:
        run.rollbacks = rollbacks
        seed = run.recipe.seed + 1_000_000_007 * rollbacks
        run.train_step.seed = seed
        run.batches = make_batches(run.recipe, run.batches.data, seed, run.world)
