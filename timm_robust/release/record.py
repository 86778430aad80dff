"""What is staged of a model, read back: results, settings, and how they are worded."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models import HYPER_PARAMETERS, read_hyper_parameters
from ..results import RobustnessResult, check_types, read_object
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


def read_staged(path: Path) -> dict[str, Any]:
    """results.json of a staged model: 'model', 'weights', 'training' and 'measurements', every value of its type.

    Raises:
        ValueError: naming what is wrong.
    """
    record = read_object(path)
    check_types(record, _STAGED, str(path))
    check_types(record['weights'], _WEIGHTS, f'{path}, weights')
    check_types(record['training'], _TRAINING, f'{path}, training')
    for origin in record['training']['origins']:
        check_types({'versions': {}} | origin, _ORIGIN, f'{path}, origins')
    for item in record['measurements']:
        check_types(item, {'key': str, 'note': str | None, 'result': dict[str, Any]}, f'{path}, measurements')
        result = RobustnessResult.from_dict(item['result'], f'{path}, {item["key"]}')
        if item['key'] != f'{result.attack}_{result.n}' or result.model != record['model']:
            raise ValueError(f'{path}: {item["key"]} is of {result.attack} on {result.n} images of {result.model}')
        item['result'] = asdict(result)
    return record


RESULTS, FLAGS = 'results.json', 'flags'
_ATTACKS = ('autoattack', 'apgd', 'pgd', 'none')  # the strongest first


def read_results(folder: Path) -> dict[str, Any]:
    """The record of a staged model: 'model', 'weights', 'training' and 'measurements'.

    Raises:
        FileNotFoundError: if nothing is staged there.
        ValueError: if the record is damaged, or of another model than its folder.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; type: timm-robust stage RUN {folder.name}')
    record = read_staged(path)
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
    if settings['norm'] not in LEADERBOARD_EPS:
        raise ValueError(f'{folder / HYPER_PARAMETERS}: norm {settings["norm"]!r} is none')
    return settings


def strongest(record: dict[str, Any]) -> dict[str, Any] | None:
    """The measurement with the strongest attack, among equals that on most images; None if there is none."""
    attacked = [item for item in record['measurements'] if item['result']['attack'] != 'none']
    return min(attacked, key=lambda m: (_ATTACKS.index(m['result']['attack']), -m['result']['n']), default=None)


def robust_acc(result: dict[str, Any]) -> float | None:
    """Share of images that resist the strongest attack of a measurement; None where none ran."""
    keys = {'autoattack': 'autoattack_acc', 'apgd': 'apgd_acc', 'pgd': 'pgd_acc'}
    return result[keys[result['attack']]] if result['attack'] in keys else None


def attack_title(result: dict[str, Any]) -> str:
    """What the strongest attack of a measurement is called; the first two of AutoAttack are never called AutoAttack."""
    titles = {'autoattack': 'AutoAttack', 'apgd': 'APGD-CE + APGD-T', 'pgd': f'PGD-{result.get("steps")}'}
    return {**titles, 'none': 'clean'}[result['attack']]


def measurement_notes(record: dict[str, Any]) -> list[str]:
    """What was noted of the images of its measurements."""
    return list(dict.fromkeys(item['note'] for item in record['measurements'] if item['note']))


def limits(record: dict[str, Any]) -> list[str]:
    """What the reader must not overlook."""
    lines = [f'- {note}' for note in record['training']['notes']]
    warnings = dict.fromkeys(text for item in record['measurements'] for text in item['result']['warnings'])
    lines += [f'- Evaluation warned: {text}' for text in warnings]
    best = strongest(record)
    if best is not None and best['result']['n'] < 10_000:
        lines.append(f'- Robust accuracy is known from {best["result"]["n"]} images only; mind the standard error.')
    return [*lines, '- Robust against the threat models of the measurements above, and measured against no other.']


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


def versions_of(origin: dict[str, Any]) -> str:
    """The packages of a start of a training, with their versions."""
    return ', '.join(f'{package} {version}' for package, version in origin.get('versions', {}).items() if version)


def paper_link(where: str) -> str:
    """The address of a paper: its number on arXiv, or the address itself."""
    return f'https://arxiv.org/abs/{where}' if where[0].isdigit() else where
