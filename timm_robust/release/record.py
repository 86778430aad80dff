"""What is staged of a model, read back: results, settings, and how they are worded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..models import HYPER_PARAMETERS, read_hyper_parameters
from ..results import ATTACKS, RobustnessResult, check_types, read_object
from ..threat_model import LEADERBOARD_EPS
from ..weights import split_name

_STAGED = {'model': str, 'weights': dict[str, Any], 'training': dict[str, Any], 'measurements': list[dict[str, Any]]}
_WEIGHTS = {'sha256': str, 'size': int, 'parameters': int}
_TRAINING = {
    'epoch': int,
    'weights': str,
    'epochs': int,
    'steps': int,
    'seconds': float,
    'images_per_s': float,
    'activation': dict[str, float],
    'origins': list[dict[str, Any]],
    'notes': list[str],
}
_ORIGIN = {'hardware': str, 'versions': dict[str, str | None]}


RESULTS, FLAGS = 'results.json', 'flags'


def read_results(folder: Path) -> dict[str, Any]:
    """The record of a staged model: 'model', 'weights', 'training' and 'measurements', every value of its type.

    Each of 'measurements' has a 'key', such as 'pgd_1000', a 'note' or None, and its 'result', a RobustnessResult.

    Raises:
        FileNotFoundError: if nothing is staged there.
        ValueError: if the record is damaged, or of another model than its folder.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; type: timm-robust stage RUN {folder.name}')
    record = read_object(path)
    check_types(record, _STAGED, str(path))
    check_types(record['weights'], _WEIGHTS, f'{path}, weights')
    check_types(record['training'], _TRAINING, f'{path}, training')
    check_types({'start': None} | record['training'], {'start': str | None}, f'{path}, training')
    for origin in record['training']['origins']:
        check_types({'versions': {}} | origin, _ORIGIN, f'{path}, origins')
    for item in record['measurements']:
        check_types(item, {'key': str, 'note': str | None, 'result': dict[str, Any]}, f'{path}, measurements')
        result = RobustnessResult.from_dict(item['result'], f'{path}, {item["key"]}')
        if item['key'] != f'{result.attack}_{result.n}' or result.model != record['model']:
            raise ValueError(f'{path}: {item["key"]} is of {result.attack} on {result.n} images of {result.model}')
        item['result'] = result
    split_name(record['model'])
    if record['model'] != folder.resolve().name:
        raise ValueError(f'{path} is of {record["model"]}; a folder has the name of its model')
    return record


_HYPER = {
    'model': str,
    'dataset': str,
    'norm': str,
    'eps': float | str,
    'loss': str,
    'attack': str,
    'steps': int,
    'beta': float,
    'batch_size': int,
    'sched': str,
    'lr': float,
    'val_size': float,
}


def read_hyper(folder: Path) -> dict[str, Any]:
    """The settings of a staged model's training, those that a card tells of held against their types.

    Raises:
        ValueError: if one is missing or wrong.
    """
    settings = read_hyper_parameters(folder)
    check_types(settings, _HYPER, str(folder / HYPER_PARAMETERS))
    kinds = {'model_kwargs': dict[str, Any] | None, 'initial_checkpoint': str | None, 'pretrained': bool | None}
    check_types({key: settings.get(key) for key in kinds}, kinds, str(folder / HYPER_PARAMETERS))
    if settings['norm'] not in LEADERBOARD_EPS:
        raise ValueError(f'{folder / HYPER_PARAMETERS}: norm {settings["norm"]!r} is unknown; allowed: Linf, L2')
    return settings


def results_of(record: dict[str, Any]) -> list[RobustnessResult]:
    """What was measured of a staged model."""
    return [item['result'] for item in record['measurements']]


def verdicts_file(folder: Path, result: RobustnessResult) -> Path:
    """Where a staged model keeps the verdict on every image of a measurement."""
    return folder / FLAGS / f'{result.attack}_{result.n}.npz'


def strongest(results: Iterable[RobustnessResult]) -> RobustnessResult | None:
    """The measurement with the strongest attack, among equals that on most images; None where none attacked."""
    attacked = [result for result in results if result.attack != 'none']
    return min(attacked, key=lambda result: (ATTACKS.index(result.attack), -result.n), default=None)


def measurement_notes(record: dict[str, Any]) -> list[str]:
    """What was noted of the images of its measurements."""
    return list(dict.fromkeys(item['note'] for item in record['measurements'] if item['note']))


def percent(share: float | None, n: int) -> str:
    """A fraction in percent with its standard error."""
    if share is None:
        return ''
    return f'{100 * share:.2f} ± {100 * math.sqrt(share * (1 - share) / n):.2f}'


def trained_on(training: dict[str, Any]) -> str:
    """The hardware of every piece of a training, each kind once."""
    return ' and '.join(dict.fromkeys(origin['hardware'] for origin in training['origins'])) or 'unknown hardware'


def hours(seconds: float) -> str:
    """A duration as people say it."""
    for size, unit in ((3600, 'hours'), (60, 'minutes')):
        if seconds >= size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} seconds'
