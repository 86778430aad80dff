"""What an activation's shape does to robustness: timm-robust study train/studies/digits.yaml -o OUT.

A study is a YAML file: settings of the recipe that all points share, and sweeps, each of one activation with one
parameter frozen at, or learned from, several values. Every point is trained, measured and kept in a folder of its own,
so that a study that was stopped goes on where it was. `--jobs 2` runs two points at a time, each on its share of the
cores: networks as small as these use no more than one. OUT gets results.csv, environment.json and three plots.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch

from .activations import get_activation
from .command_line import Parser, command, count, keep_freed_memory, start_worker
from .data import SPLITS, load_dataset
from .evaluation import curve_facts, evaluate, local_lipschitz, minimal_radii, set_shape, square_success
from .files import atomic_file, read_yaml
from .models import load_model
from .pixels import pixel_input
from .plots import read_run
from .provenance import __version__, environment, git_commit
from .training import Diverged, Recipe, build, fit

_TITLES = {
    'autoattack': 'AutoAttack accuracy (%)',
    'apgd': 'APGD-CE + APGD-T accuracy (%)',
    'pgd': 'PGD-10 accuracy (%)',
    'radius': 'mean minimal radius (pixels)',
}
_MEASURE = ('n', 'attack', 'split', 'square_queries')
_CLAIMS = (
    ('best at 4 to 10 (Yu et al. 2026, arXiv:2603.23860)', 4, 10),
    ('low is better (Singla et al. 2021, arXiv:2102.07861)', None, 1),
    ('high, finite is better (Dai et al. 2021, arXiv:2110.05626v1)', 1, None),
)


@dataclass(frozen=True)
class Point:
    """One network of a study.

    Args:
        act: activation.
        parameter: the swept parameter; None for an activation as it is.
        value: its value, at which it is frozen or from which it is learned.
        learned: whether training changes the activation.
        loss: 'pgd_at', 'trades' or 'clean'.
        seed: of the training.
    """

    act: str
    parameter: str | None
    value: float | None
    learned: bool
    loss: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        shape = '' if self.parameter is None else f'-{self.parameter}{self.value:g}'
        return f'{self.act}{shape}-{"learned" if self.learned else "frozen"}-{self.loss}-s{self.seed}'


def read_study(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Point]]:
    """Settings of the recipe, settings of the measurement, and all points.

    Raises:
        ValueError: naming the unknown key or value.
    """
    study, _ = read_yaml(path)
    if not isinstance(study, dict):
        raise ValueError(f'{path} holds no study; it needs recipe, seeds and sweeps')
    _check_keys(study, ('recipe', 'measure', 'seeds', 'sweeps'), str(path))
    if missing := [key for key in ('recipe', 'seeds', 'sweeps') if not study.get(key)]:
        raise ValueError(f'{path} lacks {", ".join(missing)}')
    settings, options = study['recipe'], study.get('measure', {})
    _check_keys(options, _MEASURE, f'{path}, measure')
    if options.get('attack', 'autoattack') not in ('autoattack', 'apgd', 'pgd'):
        raise ValueError(f'{path}: attack {options["attack"]!r} is unknown; allowed: autoattack, apgd, pgd')
    for key in ('n', 'square_queries'):
        if not (type(options.get(key, 1)) is int and options.get(key, 1) >= 1):
            raise ValueError(
                f'{path}, measure: {key} {options[key]!r} is not allowed; allowed: whole numbers, 1 and more'
            )
    if options.get('split', 'test') not in SPLITS[1:]:
        raise ValueError(
            f'{path}, measure: split {options["split"]!r} is not allowed; allowed: {", ".join(SPLITS[1:])}'
        )
    if not isinstance(settings, dict) or not isinstance(settings.get('model'), str):
        raise ValueError(
            f'{path}, recipe: it needs model, the family of networks that each sweep adds its activation to'
        )
    if taken := {'seed', 'loss', 'output', 'experiment', 'resume'} & set(settings):
        raise ValueError(f'{path}, recipe: {min(taken)} is set by the study itself (seeds, sweeps, -o); leave it out')
    for key in ('seeds', 'sweeps'):
        if not isinstance(study[key], list):
            raise ValueError(f'{path}: {key} {str(study[key])[:100]} is no list; write {key}: [...]')
    points = [point for sweep in study['sweeps'] for point in _points(sweep, study['seeds'], str(path))]
    if not points:
        raise ValueError(f'{path}: its sweeps hold no point')
    for number, point in enumerate(points):
        if point in points[:number]:
            raise ValueError(f'{path}: {point.name} is given twice')
        own = point_settings(point, settings)
        Recipe.from_values(own, f'{path}, recipe of {point.name}')
        if not timm.is_model(own['model']):
            raise ValueError(f'{path}: {own["model"]!r} is no model in the timm registry; change model or act')
    return settings, options, points


def _points(sweep: Any, seeds: list[Any], path: str) -> list[Point]:
    """The points of a sweep.

    Raises:
        ValueError: for what a sweep cannot mean.
    """
    keys = ('act', 'parameter', 'values', 'learned', 'loss')
    if not isinstance(sweep, dict):
        raise ValueError(f'{path}: sweep {str(sweep)[:100]} is not of the form {{act: NAME, ...}}')
    if not isinstance(sweep.get('act'), str) or ('parameter' in sweep) != ('values' in sweep):
        raise ValueError(f'{path}: sweep {sweep} needs act, and parameter and values together or neither')
    _check_keys(sweep, keys, f'{path}, a sweep')
    initial, parameter = get_activation(sweep['act']).initial, sweep.get('parameter')
    if 'parameter' in sweep and parameter not in list(initial):
        has = ', '.join(initial) or 'none'
        raise ValueError(f'{path}: {sweep["act"]} has no parameter {parameter!r}; it has {has}')
    values = sweep['values'] if parameter else [None]
    if not isinstance(values, list) or not all(
        parameter is None or (type(value) in (int, float) and math.isfinite(value)) for value in values
    ):
        raise ValueError(f'{path}: values {values!r} of {parameter} are not allowed; allowed: a list of finite numbers')
    learned, losses = _list(sweep.get('learned', False)), _list(sweep.get('loss', 'pgd_at'))
    if not all(isinstance(item, bool) for item in learned):
        raise ValueError(
            f'{path}: learned {sweep["learned"]!r} is not allowed; allowed: true, false, or a list of them'
        )
    return [
        Point(sweep['act'], parameter, value, learns, loss, seed)
        for value in values
        for learns in learned
        for loss in losses
        for seed in seeds
    ]


def _check_keys(mapping: Any, allowed: Sequence[str], where: str) -> None:
    """Refuse what is no mapping, or has other keys."""
    if not isinstance(mapping, dict):
        raise ValueError(f'{where}: {str(mapping)[:100]} is no mapping of {", ".join(allowed)} to values')
    if unknown := sorted(map(str, set(mapping) - set(allowed))):
        raise ValueError(f'{where}: unknown key {", ".join(unknown)}; allowed: {", ".join(allowed)}')


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def point_settings(point: Point, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the recipe that trains a point."""
    return {**settings, 'model': f'{settings["model"]}_{point.act}', 'loss': point.loss, 'seed': point.seed}


def train(point: Point, settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train a point, or go on with its training; returns the run's last line."""
    run_settings = {'output': str(output), 'experiment': point.name, 'resume': 'auto'}
    run = build(Recipe.from_values(point_settings(point, settings) | run_settings, point.name))
    act: Any = run.model.act
    start = {} if run.step or point.parameter is None else {point.parameter: float(point.value or 0)}
    set_shape(act, start, point.learned)
    if run.ema is not None:
        set_shape(run.ema.module.act, start, point.learned)
    return fit(run)


def measure(point: Point, settings: dict[str, Any], options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that is measured of a trained point."""
    recipe = Recipe.from_values(point_settings(point, settings), point.name)
    device = torch.device(recipe.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    model = load_model(folder, device=device)
    data = load_dataset(recipe.dataset, recipe.data_dir, options.get('split', 'test')).first(options.get('n', 100))
    data, generator, net = data.to(device), torch.Generator(device).manual_seed(0), pixel_input(model)
    attack = options.get('attack', 'autoattack')
    result, _ = evaluate(model, data, recipe.threat_model, attack=attack, name=point.name)
    x, y, eps = data.pixels(), data.labels, recipe.threat_model.eps
    radii = minimal_radii(net, x, y, generator=generator)
    with torch.no_grad():
        right = net(x).argmax(1) == y
    history = read_run(folder)
    path = {key: [row[key] for row in history if row.get(key) is not None] for key in ('alpha', 'beta')}
    act: Any = model.act
    return {
        **{key: getattr(point, key) for key in (field.name for field in fields(point))},
        **{key: getattr(result, key) for key in ('attack', 'clean_acc', 'pgd_acc', 'apgd_acc', 'autoattack_acc', 'n')},
        'radius': float(radii[right].mean()) if right.any() else 0.0,
        'square_success': square_success(net, x, y, eps, options.get('square_queries', 1000)),
        'lipschitz': local_lipschitz(net, x, eps, generator=generator),
        **curve_facts(act),
        **{f'final_{name}': value for name, value in act.values().items()},
        'path': path,
        'warnings': result.warnings,
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, tabulate, plot; 0 if it ended well, 2 for bad input."""
    parser = Parser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('study', type=Path, help='YAML file of the study')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder for runs, table and plots')
    parser.add_argument('--data-dir', help='folder that holds the data')
    parser.add_argument(
        '--jobs', type=count, default=1, metavar='N', help='points at a time, each in a process of its own'
    )
    parser.add_argument(
        '--publish', type=Path, metavar='DIR', help='put table, environment and plots there, without runs'
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr, force=True)
    settings, options, points = read_study(args.study)
    if args.data_dir:
        settings['data_dir'] = args.data_dir
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in run_points(points, settings, options, args.output, args.jobs):
        rows.append(row)
        print(f'{len(rows)}/{len(points)} {describe(row)}', file=sys.stderr, flush=True)
    report(rows, args.study, args.publish or args.output)
    return 0


def run_points(
    points: Sequence[Point], settings: dict[str, Any], options: dict[str, Any], output: Path, jobs: int
) -> Iterator[dict[str, Any]]:
    """The rows of all points, in their order, `jobs` of them at a time.

    Raises:
        ChildProcessError: if a process was killed.
        ValueError: as run_point does.
    """
    if jobs == 1:
        for point in points:
            yield run_point(point, settings, options, output)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(run_point, point, settings, options, output) for point in points]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError('a process was killed, perhaps for memory; type the same again to go on') from error
        finally:
            pool.shutdown(cancel_futures=True)


def run_point(point: Point, settings: dict[str, Any], options: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train and measure a point, unless that is done; a training that diverged for good is a result too.

    Raises:
        ValueError: if what is kept comes from other settings.
    """
    kept = output / f'{point.name}.json'
    digest = hashlib.sha256(json.dumps([settings, options], sort_keys=True).encode()).hexdigest()[:16]
    if not kept.is_file():
        try:
            train(point, settings, output)
            row = measure(point, settings, options, output / point.name)
        except Diverged as error:
            row = {field.name: getattr(point, field.name) for field in fields(point)} | {'diverged': str(error)}
        write_json(kept, row | {'settings': digest})
    row = json.loads(kept.read_text())
    if row.get('settings') != digest:
        raise ValueError(f'{kept} was measured with other settings; name another folder with -o, or delete it')
    return row


def describe(row: dict[str, Any]) -> str:
    """A point in a line."""
    name = Point(*(row[field.name] for field in fields(Point))).name
    if 'diverged' in row:
        return f'{name}: diverged'
    robust = row[f'{row["attack"]}_acc']
    return f'{name}: clean {row["clean_acc"]:.1%}, {row["attack"]} {robust:.1%}, radius {row["radius"]:.4f}'


def report(rows: list[dict[str, Any]], study: Path, folder: Path) -> None:
    """Table, environment and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    left_out = ('path', 'warnings', 'settings', 'diverged')
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in left_out]
    with atomic_file(folder / 'results.csv') as file:
        lines = [','.join(columns)]
        lines += [','.join('' if row.get(key) is None else str(row[key]) for key in columns) for row in rows]
        file.write(('\n'.join(lines) + '\n').encode())
    facts = {'study': study.name, 'timm_robust': __version__, 'commit': git_commit()}
    write_json(folder / 'environment.json', facts | environment())
    rows = [row for row in rows if 'diverged' not in row]
    if not rows:
        return
    plot_curves(rows, folder / 'curves.png')
    plot_curvature(rows, folder / 'curvature.png')
    plot_paths(rows, folder / 'paths.png')


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all; infinite curvature becomes null."""
    plain = {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in record.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(plain, indent=1) + '\n').encode())


def groups(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows of the same point under all seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ('act', 'parameter', 'value', 'learned', 'loss')), []).append(row)
    return found


def robustness(row: dict[str, Any]) -> tuple[str, float]:
    """What a point's robustness is judged by: the attack after adversarial training, the radius after standard."""
    if row['loss'] == 'clean':
        return 'radius', row['radius']
    return row['attack'], 100 * row[f'{row["attack"]}_acc']


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of all points, coloured by robustness, one panel for each kind of training."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    losses = sorted({row['loss'] for row in rows})
    figure = Figure(figsize=(4.6 * len(losses), 3.8), layout='constrained')
    x = torch.linspace(-4, 3, 300)
    for axis, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses, strict=True):
        part = [(key, group) for key, group in groups(rows).items() if key[-1] == loss]
        values = [statistics.mean(robustness(row)[1] for row in group) for _, group in part]
        norm = Normalize(min(values), max(values) + 1e-9)
        for (key, group), value in zip(part, values, strict=True):
            act = get_activation(key[0])()
            set_shape(act, {name: group[0][f'final_{name}'] for name in act.initial})
            with torch.no_grad():
                axis.plot(x, act(x), color=colormaps['viridis'](norm(value)), linewidth=1.1)
        label = _TITLES[robustness(part[0][1][0])[0]]
        figure.colorbar(ScalarMappable(norm, 'viridis'), ax=axis, label=label)
        axis.set_title(f'training: {loss}', fontsize=9)
        axis.set_xlabel('x')
        axis.set_ylim(-1.5, 3.2)
    save(figure, path)


def plot_curvature(rows: list[dict[str, Any]], path: Path) -> None:
    """Robustness against max |f''|, with what has been claimed; lines stand at the left, kinks at the right."""
    from matplotlib.figure import Figure

    losses = sorted({row['loss'] for row in rows})
    figure = Figure(figsize=(5.4 * len(losses), 4.6), layout='constrained')
    finite = [row['max_curvature'] for row in rows if row['max_curvature']] or [1.0]
    line, kink = min(finite) / 4, 4 * max(finite)
    acts = sorted({row['act'] for row in rows})
    for axis, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses, strict=True):
        for act in acts:
            part = [group for key, group in groups(rows).items() if key[0] == act and key[-1] == loss]
            points = []
            for group in part:
                found = [kink if row['max_curvature'] is None else row['max_curvature'] or line for row in group]
                values = [robustness(row)[1] for row in group]
                points.append((statistics.geometric_mean(found), values, group[0]['learned']))
            color = f'C{acts.index(act)}'
            for number, (curvature, values, learned) in enumerate(sorted(points)):
                mean, low, high = statistics.mean(values), min(values), max(values)
                errors = [[mean - low], [high - mean]]
                marker, label = '*' if learned else 'o', act if number == 0 else None
                axis.errorbar([curvature], [mean], yerr=errors, fmt=marker, color=color, capsize=2, label=label)
        axis.set_xscale('log')
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom - 0.3 * (top - bottom), top)
        for level, (text, left, right) in enumerate(_CLAIMS):
            y = bottom - (0.06 + 0.09 * level) * (top - bottom)
            ends = left or min(finite), right or max(finite)
            axis.plot(ends, [y, y], color='0.4', linewidth=3, solid_capstyle='butt')
            end, side = (ends[1], 'right') if level == 0 else (ends[0], 'left')  # inside the axes
            place = {'va': 'bottom', 'ha': side, 'xytext': (0, 2), 'textcoords': 'offset points'}
            axis.annotate(text, (end, y), fontsize=6, **place)
        axis.set_xlabel("max |f''| (kinks at the right; stars: learned, mean of seeds)")
        some = next(row for row in rows if row['loss'] == loss)
        axis.set_ylabel(f'{_TITLES[robustness(some)[0]]}, mean and range of seeds')
        axis.set_title(f'training: {loss}', fontsize=9)
        axis.legend(fontsize=7)
    save(figure, path)


def plot_paths(rows: list[dict[str, Any]], path: Path) -> None:
    """Alpha and beta over the epochs of the points that learn them."""
    from matplotlib.figure import Figure

    learned = [row for row in rows if row['learned'] and any(row['path'].values())]
    figure = Figure(figsize=(8, 3.4), layout='constrained')
    for axis, key in zip(figure.subplots(1, 2), ('alpha', 'beta'), strict=True):
        for row in learned:
            if row['path'].get(key):
                axis.plot(row['path'][key], linewidth=1, label=describe(row).partition(':')[0])
        axis.set_xlabel('epoch')
        axis.set_title(key, fontsize=9)
        axis.legend(fontsize=5)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format='png', dpi=150)


if __name__ == '__main__':
    sys.exit(main())
