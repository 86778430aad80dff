"""Back to the last good state, after a run went wrong."""

from __future__ import annotations

import logging
from pathlib import Path

from ..files import link_file
from ..models import BEST, LAST
from .checkpoints import later_checkpoints, latest_checkpoint, read_step
from .run import Run, metric_name
from .state import change_seed, leave_course, restore
from .watchdog import Collapsed, Diverged

logger = logging.getLogger('timm_robust')

MAX_ROLLBACKS = 3
"""Rollbacks before the run stops."""


def roll_back(run: Run, error: Diverged) -> None:
    """Go back to the last good state, with another seed.

    Raises:
        Diverged: if the recipe says to stop, or the run went back too often already.
    """
    recipe, count = run.recipe, run.rollbacks + 1
    run.writer.wait()
    if run.point is not None and not run.world.rank:
        leave_course(run, *run.point)  # before anything of it could be gone back to
    path = run.world.broadcast_object(good_state(run, isinstance(error, Collapsed)))
    if path is None or recipe.on_divergence == 'stop' or count > MAX_ROLLBACKS:
        tried = f' after {run.rollbacks} rollbacks' if run.rollbacks else ''
        raise Diverged(
            f'{error}; the run stops{tried}. {run.folder} holds the last good state. '
            'Lower --lr, add --clip-grad 1.0, or resume with another --seed'
        ) from error
    logger.warning('%s: back to %s with another seed (%d of %d)', error, path, count, MAX_ROLLBACKS)
    spent = run.clock.elapsed()
    restore(run, path)
    if not run.world.rank:
        forget_later(run, path)
    run.returns.add(run.step)
    run.clock.restart(spent, run.clock.progress(run.step))  # the time is gone, the schedule goes back with the weights
    change_seed(run, count)


def good_state(run: Run, collapsed: bool) -> Path | None:
    """The newest checkpoint from before a divergence; None if there is none.

    A collapse may have begun long before it was seen, and what comes again from the same state did: then it is a state
    of before the last validation.
    """
    newest = latest_checkpoint(run.folder, before=run.step)  # what diverged may have been saved, too
    again = newest is not None and read_step(newest) in run.returns
    metric = metric_name(run.recipe)
    validated = [row['step'] for row in run.history if metric in row]
    if not (collapsed or again) or not validated:
        return newest
    earlier, best = latest_checkpoint(run.folder, before=validated[-1] + 1), run.folder / BEST
    if earlier is None and best.is_file() and best not in later_checkpoints(run.folder, validated[-1]):
        return best
    return earlier if earlier is not None or collapsed else newest


def forget_later(run: Run, path: Path) -> None:
    """Delete what diverged, so that a run that is killed now does not go on from it; last.pth.tar is the good state."""
    last, run.point = run.folder / LAST, None
    if path != last:
        link_file(path, last)
    for later in later_checkpoints(run.folder, run.step):
        if later.name != BEST:
            later.unlink()
