"""A study's points: each trained and measured, several at a time."""

from __future__ import annotations

import itertools
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..command_line import start_worker
from ..data import ImageData, load_dataset
from ..evaluation import curve_facts, evaluate, local_lipschitz, minimal_radii, set_shape, square_success
from ..files import write_text
from ..models import load_model
from ..pixels import pixel_input
from ..plots import read_run
from ..provenance import environment, git_commit
from ..training import Diverged, Recipe, build, fit
from .design import Arm, Measurement, Study, alike

_logger = logging.getLogger('timm_robust')


def run_points(study: Study, done: list[dict[str, Any]], output: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of the points that are not done yet, as they end, `jobs` of them at a time.

    Raises:
        ChildProcessError: if a process was killed.
        ValueError: as train does.
    """
    have = {(row['arm'], row['seed']) for row in done}
    points = [(arm, seed) for arm, seed in study.points if (arm.name, seed) not in have]
    if jobs == 1:
        for arm, seed in points:
            yield run_point(study, arm, seed, output)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=start_worker, initargs=(threads,)) as pool:
        waiting, running, fault = iter(points), set[Future[dict[str, Any]]](), None
        try:
            while True:
                free = jobs - len(running) if fault is None else 0
                running |= {pool.submit(run_point, study, *point, output) for point in itertools.islice(waiting, free)}
                if not running:
                    break
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    error = future.exception()
                    if error is None:
                        yield future.result()
                    elif isinstance(error, BrokenProcessPool):
                        raise error
                    else:
                        fault = fault or error
                        _logger.warning('%s; what is in training is ended first', error)
        except BrokenProcessPool as error:
            raise ChildProcessError('a process was killed, perhaps for memory; type the same again to go on') from error
    if fault is not None:
        raise fault


def check_images(study: Study, done: list[dict[str, Any]]) -> None:
    """Refuse, before the first training, images that are not there, and points of different images.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, or two points that cannot be paired.
    """
    kept = {(row['arm'], row['seed']): row.get('data_sha256') for row in done}  # None of a training that diverged
    first: tuple[str, str | None] = ('', None)
    known: dict[tuple[str, str | None], str] = {}
    for arm, seed in study.points:
        recipe = Recipe.from_values(arm.recipe, arm.name)
        place = recipe.dataset, recipe.data_dir
        if (arm.name, seed) in kept:
            images = kept[arm.name, seed]
        else:
            images = known[place] = known.get(place) or read_images(recipe, study.measurement).sha256()
        first = first if first[1] else (f'{arm.name}-s{seed}', images)
        if images and images != first[1]:
            raise ValueError(
                f'{first[0]} and {arm.name}-s{seed} are of different images, which cannot be paired; give both the '
                'same with --data-dir, or name another folder with -o'
            )


def run_point(study: Study, arm: Arm, seed: int, output: Path) -> dict[str, Any]:
    """Train and measure a point; a training that diverged for good is a result too."""
    name = f'{arm.name}-s{seed}'
    device = device_of(Recipe.from_values(arm.recipe, arm.name))
    row = arm.facts(seed) | {'environment': {'commit': git_commit(), **environment(device)}}
    try:
        row |= train(arm, seed, name, output) | measure(arm, study.measurement, output / name)
    except Diverged as error:
        row['diverged'] = str(error.__cause__ or error)  # without the folder of this machine and the advice
    row = {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in row.items()}
    return row | {'settings': study.settings(arm)}


def train(arm: Arm, seed: int, name: str, output: Path) -> dict[str, Any]:
    """Train a point, or go on with its training; returns its rollbacks, and the commits of the code that trained it.

    Raises:
        ValueError: if its folder holds another training, or its network has no activation of its own to set.
    """
    check_folder(arm, output / name)
    place = {'seed': seed, 'output': str(output), 'experiment': name, 'resume': 'auto'}
    run = build(Recipe.from_values({**arm.recipe, **place}, name))
    networks: list[Any] = [run.model] if run.ema is None else [run.model, run.ema.module]
    if not hasattr(run.model, 'act'):
        raise ValueError(
            f'{run.recipe.model} has no one activation (`model.act`) that a study could set and follow, as '
            f'resnet18_{arm.act} has; change model in the recipe'
        )
    for network in networks:
        set_shape(network.act, {} if run.step else arm.shape, arm.learned)
    rollbacks = fit(run)['rollbacks']
    trained = [each['commit'] for each in run.origins if each['step'] < run.step]
    return {'rollbacks': rollbacks, 'commits': list(dict.fromkeys(trained))}


def check_folder(arm: Arm, folder: Path) -> None:
    """Write down what is trained in a new folder, and refuse to go on there with anything else.

    The recipe of a checkpoint knows no shapes, and a network that was trained keeps its own.
    """
    told, training = folder / 'arm.json', json.loads(json.dumps(arm.training))
    folder.mkdir(parents=True, exist_ok=True)
    if not any(path for path in folder.iterdir() if path.name[0] != '.'):  # a kill leaves hidden ones
        write_text(told, json.dumps(training, indent=1) + '\n')
    elif not told.is_file() or not alike(json.loads(told.read_text()), training):
        raise ValueError(f'{folder} holds a training with other settings; delete it, or name another folder with -o')


def device_of(recipe: Recipe) -> torch.device:
    """Where a point is trained and measured."""
    return torch.device(recipe.device or ('cuda' if torch.cuda.is_available() else 'cpu'))


def read_images(recipe: Recipe, measurement: Measurement) -> ImageData:
    """The images that a point is measured on."""
    return load_dataset(recipe.dataset, recipe.data_dir, measurement.split).first(measurement.n)


def measure(arm: Arm, measurement: Measurement, folder: Path) -> dict[str, Any]:
    """Everything that is measured of a trained point: accuracies, verdicts as '0110...', the curve, the landscape."""
    recipe = Recipe.from_values(arm.recipe, arm.name)
    device = device_of(recipe)
    model = load_model(folder, device=device)
    data = read_images(recipe, measurement).to(device)
    attack, state_dir = measurement.attack, folder / 'attack'
    result, verdicts = evaluate(model, data, recipe.threat_model, attack=attack, name=folder.name, state_dir=state_dir)
    row = {key: getattr(result, key) for key in ('attack', 'clean_acc', 'pgd_acc', 'apgd_acc', 'autoattack_acc', 'n')}
    row['data_sha256'] = data.sha256()
    if measurement.landscape:
        x, y, eps, net = data.pixels(), data.labels, recipe.threat_model.eps, pixel_input(model)
        generator, right = torch.Generator(device).manual_seed(0), verdicts['clean_correct']
        radii = minimal_radii(net, x, y, generator=generator)
        row['radius'] = float(radii[right].mean()) if right.any() else 0.0
        row['square_success'] = square_success(net, x, y, eps, measurement.square_queries)
        row['lipschitz'] = local_lipschitz(net, x, eps, generator=generator)
    act: Any = model.act
    history = read_run(folder)
    return {
        **row,
        **curve_facts(act),
        **{f'final_{name}': value for name, value in act.values().items()},
        'path': {key: [line[key] for line in history if line.get(key) is not None] for key in ('alpha', 'beta')},
        'warnings': result.warnings,
        'clean_correct': _bits(verdicts['clean_correct']),
        'robust': _bits(verdicts['robust']),
    }


def _bits(verdicts: torch.Tensor) -> str:
    return ''.join('1' if verdict else '0' for verdict in verdicts.tolist())
