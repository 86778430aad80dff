"""What a study's file says: its arms, seeds, measurement and claims."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from ..activations import get_activation
from ..data import SPLITS
from ..files import read_yaml
from ..training import Recipe

ATTACK_NAMES = {'autoattack': 'AutoAttack', 'apgd': 'APGD-CE + APGD-T', 'pgd': 'PGD-10'}
_OWN = {'seed', 'output', 'experiment', 'resume'}
"""Settings of a recipe that a study makes itself."""


@dataclass(frozen=True)
class Arm:
    """What is trained under every seed.

    Args:
        name: the start of its folders' names.
        act: activation.
        shape: values of its parameters, at which they are frozen or from which they are learned.
        learned: whether training changes the activation.
        recipe: all settings of its training but seed and place.
    """

    name: str
    act: str
    shape: dict[str, float]
    learned: bool
    recipe: dict[str, Any]

    @property
    def training(self) -> dict[str, Any]:
        """All that its training depends on, but seed, place and code; settings that the file leaves out included."""
        made = Recipe.from_values(self.recipe, self.name)
        recipe = made.public() | {'extra_data': made.extra_data, 'initial_checkpoint': made.initial_checkpoint}
        del recipe['seed']
        return {'act': self.act, 'shape': self.shape, 'learned': self.learned, 'recipe': recipe}

    def facts(self, seed: int) -> dict[str, Any]:
        """What tells a point from the others, as columns of the table."""
        how = {'learned': self.learned, 'loss': self.recipe['loss']}
        return {'arm': self.name, 'act': self.act, **how, 'seed': seed}


@dataclass(frozen=True)
class Claim:
    """One arm is said to be more robust than another."""

    text: str
    more: str
    than: str


@dataclass(frozen=True)
class Measurement:
    """How every trained network is measured.

    Args:
        n: images, the first of the split.
        attack: 'autoattack', 'apgd' or 'pgd'.
        split: part of the data.
        landscape: whether minimal radii, success of Square and local Lipschitz constants are measured as well.
        square_queries: forward passes an image that Square has.
    """

    n: int = 100
    attack: str = 'autoattack'
    split: str = 'test'
    landscape: bool = True
    square_queries: int = 1000


@dataclass(frozen=True)
class Study:
    """A study as read."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    measurement: Measurement = field(default_factory=Measurement)
    claims: tuple[Claim, ...] = ()

    @property
    def points(self) -> list[tuple[Arm, int]]:
        """Every arm under every seed; a seed is finished before the next, so that a part of the study compares."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def settings(self, arm: Arm) -> dict[str, Any]:
        """How a point of this arm is trained and measured, as JSON holds it."""
        found: dict[str, Any] = json.loads(json.dumps({**arm.training, 'measure': vars(self.measurement)}))
        return found

    def accepts(self, arm: Arm, settings: Any) -> bool:
        """Whether a kept point was trained and measured so."""
        return alike(settings, self.settings(arm))


def alike(kept: Any, now: dict[str, Any]) -> bool:
    """Whether settings are those of now; what recipes did not have when they were kept was at its default."""
    defaults = json.loads(json.dumps(Recipe().public()))
    del defaults['seed']
    try:
        return now == {**kept, 'recipe': {**defaults, **kept['recipe']}}
    except (KeyError, TypeError):
        return False


def read_study(path: Path, data_dir: str | None = None) -> Study:
    """A study out of its file.

    Args:
        path: of the YAML file.
        data_dir: folder that holds the data, instead of what the file says.

    Raises:
        ValueError: naming the unknown key or value.
    """
    study, _ = read_yaml(path)
    if not isinstance(study, dict):
        raise ValueError(f'{path} holds no study; it needs recipe, seeds and sweeps')
    _check_keys(study, ('recipe', 'measure', 'seeds', 'sweeps', 'claims'), str(path))
    if missing := [key for key in ('recipe', 'seeds', 'sweeps') if not study.get(key)]:
        raise ValueError(f'{path} lacks {", ".join(missing)}')
    for key in ('seeds', 'sweeps', 'claims'):
        if not isinstance(study.get(key, []), list):
            raise ValueError(f'{path}: {key} {str(study[key])[:100]} is no list; write {key}: [...]')
    shared = study['recipe']
    if not isinstance(shared, dict) or not isinstance(shared.get('model'), str):
        raise ValueError(
            f'{path}, recipe: it needs model, the family of networks that each sweep adds its activation to'
        )
    if taken := (_OWN | {'loss'}) & set(shared):
        raise ValueError(f'{path}, recipe: {min(taken)} is set by the study itself (seeds, sweeps, -o); leave it out')
    if data_dir:
        shared = {**shared, 'data_dir': data_dir}
    measurement = _measurement(study.get('measure', {}), path)
    arms = [arm for sweep in study['sweeps'] for arm in _arms(sweep, shared, path)]
    if not arms:
        raise ValueError(f'{path}: its sweeps hold no point')
    for what, items in (('arm', [arm.name for arm in arms]), ('seed', study['seeds'])):
        for number, item in enumerate(items):
            if item in items[:number]:
                raise ValueError(f'{path}: {what} {item} is given twice')
    for arm in arms:
        for seed in study['seeds']:
            Recipe.from_values({**arm.recipe, 'seed': seed}, f'{path}, recipe of {arm.name}')
        if not timm.is_model(arm.recipe['model']):
            raise ValueError(f'{path}: {arm.recipe["model"]!r} is no model in the timm registry; change model or act')
    _check_alike(arms, path)
    claims = [_claim(claim, [arm.name for arm in arms], path) for claim in study.get('claims', [])]
    return Study(tuple(arms), tuple(study['seeds']), measurement, tuple(claims))


def _measurement(options: Any, path: Path) -> Measurement:
    """How to measure.

    Raises:
        ValueError: for an unknown key or value.
    """
    _check_keys(options, tuple(Measurement.__dataclass_fields__), f'{path}, measure')
    found = Measurement(**options)
    if found.attack not in [*ATTACK_NAMES]:  # it may be unhashable
        raise ValueError(f'{path}: attack {found.attack!r} is unknown; allowed: {", ".join(ATTACK_NAMES)}')
    if found.split not in SPLITS[1:]:
        raise ValueError(f'{path}, measure: split {found.split!r} is not allowed; allowed: {", ".join(SPLITS[1:])}')
    for key in ('n', 'square_queries'):
        if not (type(options.get(key, 1)) is int and options.get(key, 1) >= 1):
            raise ValueError(
                f'{path}, measure: {key} {options[key]!r} is not allowed; allowed: whole numbers, 1 and more'
            )
    if not isinstance(found.landscape, bool):
        raise ValueError(f'{path}, measure: landscape {found.landscape!r} is not allowed; allowed: true, false')
    return found


def _arms(sweep: Any, shared: dict[str, Any], path: Path) -> list[Arm]:
    """The arms of a sweep.

    Raises:
        ValueError: for what a sweep cannot mean.
    """
    if not isinstance(sweep, dict):
        raise ValueError(f'{path}: sweep {str(sweep)[:100]} is not of the form {{act: NAME, ...}}')
    if not isinstance(sweep.get('act'), str):
        raise ValueError(f'{path}: sweep {sweep} needs act, the name of an activation')
    parameters = list(get_activation(sweep['act']).initial)
    keys = ('act', 'learned', 'loss', 'settings', 'name')
    _check_keys(sweep, (*keys, *parameters), f'{path}, sweep of {sweep["act"]}')
    values = {name: _list(sweep[name]) for name in parameters if name in sweep}
    for name, items in values.items():
        if not items or not all(type(item) in (int, float) and math.isfinite(item) for item in items):
            raise ValueError(f'{path}: {name} {sweep[name]!r} is not allowed; allowed: finite numbers, as a list')
    if len({len(items) for items in values.values()}) > 1:
        raise ValueError(f'{path}: {" and ".join(values)} of {sweep["act"]} go together; give as many values of each')
    shapes = [dict(zip(values, items, strict=True)) for items in zip(*values.values(), strict=True)] or [{}]
    learned, losses = _list(sweep.get('learned', False)), _list(sweep.get('loss', 'pgd_at'))
    if not all(isinstance(item, bool) for item in learned):
        raise ValueError(
            f'{path}: learned {sweep["learned"]!r} is not allowed; allowed: true, false, or a list of them'
        )
    if True in learned and not parameters:
        raise ValueError(f'{path}: {sweep["act"]} has no parameters to learn; leave learned out')
    settings = sweep.get('settings', {})
    if not isinstance(settings, dict):
        raise ValueError(f'{path}: settings {str(settings)[:100]} is no mapping of settings of the recipe to values')
    if taken := (_OWN | {'loss', 'model'}) & set(settings):
        raise ValueError(f'{path}: {min(taken)} is no setting of a sweep; leave it out')
    recipe = {**shared, **settings, 'model': f'{shared["model"]}_{sweep["act"]}'}
    arms = []
    for shape, learns, loss in itertools.product(shapes, learned, losses):
        words = [sweep['act'], *(f'{name}{value:g}' for name, value in shape.items())]
        name = '-'.join([*words, 'learned' if learns else 'frozen', str(loss)])
        arms.append(Arm(name, sweep['act'], shape, learns, {**recipe, 'loss': loss}))
    if 'name' not in sweep:
        return arms
    name = sweep['name']
    if len(arms) != 1 or not isinstance(name, str) or not name.replace('-', '').replace('_', '').isalnum():
        raise ValueError(
            f'{path}: name {name!r} is not allowed; allowed: letters, digits, - and _, for a sweep of one arm'
        )
    return [dataclasses.replace(arms[0], name=name)]


def _check_alike(arms: Sequence[Arm], path: Path) -> None:
    """Refuse arms that are attacked at other radii, which cannot be compared, and one arm under two names.

    Raises:
        ValueError: naming two arms.
    """
    seen: list[tuple[dict[str, Any], Arm]] = []
    for arm in arms:
        ball, first = (str(Recipe.from_values(each.recipe, each.name).threat_model) for each in (arm, arms[0]))
        if ball != first:
            raise ValueError(
                f'{path}: {arm.name} is trained and attacked at {ball}, {arms[0].name} at {first}: give a study to each'
            )
        meant = arm.training | {'shape': {**get_activation(arm.act)().initial, **arm.shape}}
        if other := next((other for training, other in seen if training == meant), None):
            raise ValueError(f'{path}: {arm.name} is the same training as {other.name}; leave one out')
        seen.append((meant, arm))


def _claim(claim: Any, names: Sequence[str], path: Path) -> Claim:
    """A claim.

    Raises:
        ValueError: if it is not about two of the arms.
    """
    _check_keys(claim, ('claim', 'more', 'than'), f'{path}, a claim')
    if missing := [key for key in ('claim', 'more', 'than') if not isinstance(claim.get(key), str)]:
        raise ValueError(f'{path}, a claim lacks {", ".join(missing)}; write {{claim: TEXT, more: ARM, than: ARM}}')
    if unknown := [claim[key] for key in ('more', 'than') if claim[key] not in names]:
        raise ValueError(f'{path}, a claim: no arm is called {unknown[0]!r}; there are {", ".join(names)}')
    if claim['more'] == claim['than']:
        raise ValueError(f'{path}, a claim: {claim["more"]} cannot be more robust than itself; name two arms')
    return Claim(claim['claim'], claim['more'], claim['than'])


def _check_keys(mapping: Any, allowed: Sequence[str], where: str) -> None:
    """Refuse what is no mapping, or has other keys."""
    if not isinstance(mapping, dict):
        raise ValueError(f'{where}: {str(mapping)[:100]} is no mapping of {", ".join(allowed)} to values')
    if unknown := sorted(map(str, set(mapping) - set(allowed))):
        raise ValueError(f'{where}: unknown key {", ".join(unknown)}; allowed: {", ".join(allowed)}')


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
