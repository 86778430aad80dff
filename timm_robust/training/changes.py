"""What a run that goes on may change: settings and images are compared with the checkpoint's, and between processes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..distributed import World
from ..threat_model import parse_eps
from .recipe import MACHINE, SETTINGS, Recipe

FREE = (
    *MACHINE,
    *('val_interval', 'patience', 'on_divergence'),
    *('channels_last', 'fold_bn', 'torchcompile', 'grad_checkpointing'),  # equal up to rounding
    *('batch_size', 'val_size'),  # compared elsewhere: times the processes, and without --val-split
)
"""Settings that a resumed run may change without a word; every other one changes what the run is."""
_OWN = ('data_dir', 'dataset_download', 'workers', 'device', 'output', 'experiment')  # of each process
_FILES = ('extra_data', 'initial_checkpoint')  # may lie elsewhere
Changes = dict[str, list[Any]]
"""What was changed -> what it was, and what it is."""


def find_changes(state: Mapping[str, Any], recipe: Recipe, images: Mapping[str, str]) -> Changes:
    """The settings and images of a checkpoint that are others now.

    Args:
        state: what the checkpoint holds; a setting that it lacks had its default, images that it lacks are not known.
        recipe: the settings now.
        images: what for -> fingerprint of the images now.
    """
    changes: Changes = {}
    default = Recipe()
    for name in SETTINGS:
        was, now = state['recipe'].get(name, getattr(default, name)), getattr(recipe, name)
        free = name in FREE or (name == 'budget' and (now or not was))  # without one the share of the run is of steps
        if not free and _meaning(name, was) != _meaning(name, now):
            changes[name] = [was, now]
    there = state.get('images') or {}
    for what, now in images.items():
        if what in there and there[what] != now:
            changes[what] = [there[what], now]
    return changes


def check_changes(path: Path, changes: Changes, allowed: bool) -> None:
    """Refuse to resume a checkpoint under other settings, or on other images; the seed alone is free.

    Raises:
        ValueError: with every difference, and what to type.
    """
    changes = {name: values for name, values in changes.items() if name != 'seed'}
    if not changes or allowed:
        return
    listed = '; '.join(f'{name} {_text(was)}, now {_text(now)}' for name, (was, now) in changes.items())
    flags = ' '.join(_flag(name, was) for name, (was, _) in changes.items() if name in SETTINGS)
    mend = [f'go on with {flags}'] if flags else []
    if any(name not in SETTINGS for name in changes):
        mend.append('name the right --data-dir')
    raise ValueError(
        f'{path} was trained with {listed}: {", ".join(mend)}, begin a new run by another --experiment, or type '
        '--allow-changes to change course (checkpoint and model card will tell it)'
    )


def check_processes(world: World, recipe: Recipe) -> None:
    """Refuse processes that were started with different settings.

    Raises:
        ValueError: with every difference, in every process.
    """
    ours = {name: getattr(recipe, name) for name in SETTINGS if name not in _OWN}
    check_equal(world, ours, 'settings; start all by the same command')


def check_equal(world: World, ours: Mapping[str, Any], what: str) -> None:
    """Refuse values that are not the same in every process.

    Raises:
        ValueError: with every difference, in every process.
    """
    if world.size == 1:
        return
    every = world.gather({world.rank: dict(ours)})
    listed = [
        f'{name} {_text(value)} in process 0, {_text(theirs.get(name))} in process {rank}'
        for rank, theirs in every.items()
        for name, value in every[0].items()
        if theirs.get(name) != value
    ]
    if listed:
        raise ValueError(f'{"; ".join(listed[:5])}: the processes of a run need the same {what}')


def _meaning(name: str, value: Any) -> Any:
    """What is compared: 8/255 is 0.0314, and a file may lie in another folder."""
    if name in ('eps', 'step_size', 'eval_step_size') and value is not None:
        return parse_eps(value)
    return Path(value).name if name in _FILES and value else value


def _text(value: Any) -> str:
    return 'none' if value is None else str(value)


def _flag(name: str, value: Any) -> str:
    """The setting as it is typed."""
    flag = '--' + name.replace('_', '-')
    if isinstance(value, bool):
        return flag if value else f'--no-{flag[2:]}'
    if isinstance(value, dict):
        return ' '.join([flag, *(shlex.quote(f'{key}={item}') for key, item in value.items())])
    return ' '.join([flag, *(shlex.quote(_text(item)) for item in (value if isinstance(value, list) else [value]))])
