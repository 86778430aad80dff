"""A study's points: each trained, measured and kept as JSON, several at a time."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..command_line import start_worker
from ..data import ImageData, load_dataset
from ..evaluation import curve_facts, evaluate, local_lipschitz, minimal_radii, set_shape, square_success
from ..files import atomic_file
from ..models import load_model
from ..pixels import pixel_input
from ..plots import read_run
from ..provenance import environment, git_commit
from ..training import Diverged, Recipe, build, fit
from .design import Arm, Measurement, Study


def run_points(study: Study, output: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of all points, in their order, `jobs` of them at a time.

    Raises:
        ChildProcessError: if a process was killed.
        ValueError: as check_images and run_point do.
    """
    check_images(study, output)
    if jobs == 1:
        for arm, seed in study.points:
            yield run_point(study, arm, seed, output)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(run_point, study, arm, seed, output) for arm, seed in study.points]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError('a process was killed, perhaps for memory; type the same again to go on') from error
        finally:
            pool.shutdown(cancel_futures=True)


def check_images(study: Study, output: Path) -> None:
    """Refuse, before the first training, images that are not there, and points of different images.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, or two points that cannot be paired.
    """
    first, known = ('', ''), dict[tuple[str, str | None], str]()
    for arm, seed in study.points:
        name = f'{arm.name}-s{seed}'
        kept, recipe = output / f'{name}.json', Recipe.from_values(arm.recipe, arm.name)
        place = recipe.dataset, recipe.data_dir
        if kept.is_file():
            images = json.loads(kept.read_text()).get('data_sha256')  # none of a training that diverged
        else:
            images = known[place] = known.get(place) or read_images(recipe, study.measurement).sha256()
        first = first if first[1] else (name, images)
        if images and images != first[1]:
            raise ValueError(
                f'{first[0]} and {name} are of different images, which cannot be paired; give both the same with '
                '--data-dir, or name another folder with -o'
            )


def run_point(study: Study, arm: Arm, seed: int, output: Path) -> dict[str, Any]:
    """Train and measure a point, unless that is done; a training that diverged for good is a result too.

    Raises:
        ValueError: if what is kept comes from other settings.
    """
    name = f'{arm.name}-s{seed}'
    kept = output / f'{name}.json'
    if not kept.is_file():
        device = device_of(Recipe.from_values(arm.recipe, arm.name))
        row = arm.facts(seed) | {'environment': {'commit': git_commit(), **environment(device)}}
        try:
            row['rollbacks'] = train(arm, seed, name, output)['rollbacks']
            row |= measure(arm, study.measurement, output / name)
        except Diverged as error:
            row['diverged'] = str(error)
        write_json(kept, row | {'settings': study.digest(arm)})
    row = json.loads(kept.read_text())
    if row.get('settings') != study.digest(arm):
        raise ValueError(
            f'{kept} comes from other settings; delete it, and the folder {output / name} too unless `measure` alone '
            'was changed; or name another folder with -o'
        )
    return row


def train(arm: Arm, seed: int, name: str, output: Path) -> dict[str, Any]:
    """Train a point, or go on with its training; returns the run's last line.

    Raises:
        ValueError: if its folder holds another training.
    """
    check_folder(arm, output / name)
    place = {'seed': seed, 'output': str(output), 'experiment': name, 'resume': 'auto'}
    run = build(Recipe.from_values({**arm.recipe, **place}, name))
    networks: list[Any] = [run.model] if run.ema is None else [run.model, run.ema.module]
    for network in networks:
        set_shape(network.act, {} if run.step else arm.shape, arm.learned)
    return fit(run)


def check_folder(arm: Arm, folder: Path) -> None:
    """Write down what is trained in a new folder, and refuse to go on there with anything else.

    The recipe of a checkpoint knows no shapes, and a network that was trained keeps its own.
    """
    told, training = folder / 'arm.json', json.loads(json.dumps(arm.training))
    if not folder.is_dir():
        write_json(told, training)
    elif not told.is_file() or json.loads(told.read_text()) != training:
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
    result, verdicts = evaluate(model, data, recipe.threat_model, attack=measurement.attack, name=folder.name)
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


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all; infinite curvature becomes null."""
    plain = {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in record.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(plain, indent=1) + '\n').encode())
