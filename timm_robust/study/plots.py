"""Plots of a study: accuracy of the arms, their curves, robustness over curvature, the course of what is learned."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from ..activations import get_activation
from ..evaluation import set_shape
from ..plots import new_figure, save_figure
from ..results import mean_interval
from .design import ATTACK_NAMES
from .findings import LEAST_SEEDS, verdicts

_TITLES = {attack: f'{name} accuracy (%)' for attack, name in ATTACK_NAMES.items()}
_TITLES['radius'] = 'mean minimal radius (pixels)'
_CLAIMS = (
    ('best at 4 to 10 (Yu et al. 2026, arXiv:2603.23860)', 4.0, 10.0),
    ('low is better (Singla et al. 2021, arXiv:2102.07861)', 0.0, 1.0),
    ('high, finite is better (Dai et al. 2021, arXiv:2110.05626v1)', 1.0, math.inf),
)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Accuracy, curves, curvature and, where something is learned, its paths, of the points that were measured."""
    if not rows:
        return
    plot_accuracy(rows, folder / 'accuracy.png')
    plot_curves(rows, folder / 'curves.png')
    plot_curvature(rows, folder / 'curvature.png')
    if learned := [row for row in rows if row['learned'] and any(row['path'].values())]:
        plot_paths(learned, folder / 'paths.png')


def groups(rows: list[dict[str, Any]], loss: str) -> list[list[dict[str, Any]]]:
    """The rows of each arm with this loss, under all seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row['loss'] == loss:
            found.setdefault(row['arm'], []).append(row)
    return list(found.values())


def robustness(row: dict[str, Any]) -> tuple[str, float]:
    """What a point's robustness is judged by: the attack after adversarial training, the radius after standard."""
    if row['loss'] == 'clean' and 'radius' in row:
        return 'radius', row['radius']
    return row['attack'], 100 * row[f'{row["attack"]}_acc']


def plot_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """Clean and robust accuracy of every arm: the mean, of three and more trainings its 95 % interval; each a line."""
    arms = list(dict.fromkeys(row['arm'] for row in rows))
    figure = new_figure(9, 1.2 + 0.3 * len(arms))
    titles = {'clean_correct': 'clean accuracy (%)', 'robust': _TITLES[rows[0]['attack']]}
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for place, arm in enumerate(arms):
            values = 100 * verdicts(arm, rows, key).astype(float)
            mean, low, high = mean_interval(values)
            around = [[mean - low], [high - mean]] if len(values) >= LEAST_SEEDS else None
            axis.errorbar([mean], [place], xerr=around, fmt='o', color='C0', capsize=3)
            axis.plot(values.mean(1), [place] * len(values), '|', color='0.4')
        axis.set_xlabel(title)
        axis.grid(axis='x', linewidth=0.3)
    axis.set_yticks(range(len(arms)), arms, fontsize=7)
    axis.invert_yaxis()
    save_figure(figure, path, dpi=150)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """A curve an arm, of a learned one the first seed's, coloured by mean robustness; a panel a kind of training."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    losses = sorted({row['loss'] for row in rows})
    figure = new_figure(4.6 * len(losses), 3.8)
    x = torch.linspace(-4, 3, 300)
    for axis, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses, strict=True):
        part = groups(rows, loss)
        values = [statistics.mean(robustness(row)[1] for row in group) for group in part]
        norm = Normalize(min(values), max(values) + 1e-9)
        for group, value in zip(part, values, strict=True):
            act = get_activation(group[0]['act'])()
            set_shape(act, {name: group[0][f'final_{name}'] for name in act.initial})
            with torch.no_grad():
                axis.plot(x, act(x), color=colormaps['viridis'](norm(value)), linewidth=1.1)
        label = _TITLES[robustness(part[0][0])[0]]
        figure.colorbar(ScalarMappable(norm, 'viridis'), ax=axis, label=label)
        axis.set_title(f'training: {loss}', fontsize=9)
        axis.set_xlabel('x')
        axis.set_ylim(-1.5, 3.2)
    save_figure(figure, path, dpi=150)


def plot_curvature(rows: list[dict[str, Any]], path: Path) -> None:
    """Robustness against max |f''|, with what has been claimed; lines stand at the left, kinks at the right."""
    losses = sorted({row['loss'] for row in rows})
    figure = new_figure(5.4 * len(losses), 4.6)
    finite = [row['max_curvature'] for row in rows if row['max_curvature']] or [1.0]
    line, kink = min(finite) / 4, 4 * max(*finite, 10.0)  # outside of all that is claimed
    acts = sorted({row['act'] for row in rows})
    for axis, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses, strict=True):
        for act in acts:
            part = [group for group in groups(rows, loss) if group[0]['act'] == act]
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
            ends = left or min(*finite, right / 2), right if math.isfinite(right) else max(*finite, 2 * left)
            axis.plot(ends, [y, y], color='0.4', linewidth=3, solid_capstyle='butt')
            end, side = (ends[1], 'right') if level == 0 else (ends[0], 'left')  # inside the axes
            place = {'va': 'bottom', 'ha': side, 'xytext': (0, 2), 'textcoords': 'offset points'}
            axis.annotate(text, (end, y), fontsize=6, **place)
        axis.set_xlabel("max |f''| (kinks at the right; stars: learned, mean of seeds)")
        some = next(row for row in rows if row['loss'] == loss)
        axis.set_ylabel(f'{_TITLES[robustness(some)[0]]}, mean and range of seeds')
        axis.set_title(f'training: {loss}', fontsize=9)
        axis.legend(fontsize=7)
    save_figure(figure, path, dpi=150)


def plot_paths(rows: list[dict[str, Any]], path: Path) -> None:
    """Alpha and beta over the epochs of points that learn them, a colour an arm."""
    figure, arms = new_figure(8, 3.4), list(dict.fromkeys(row['arm'] for row in rows))
    for axis, key in zip(figure.subplots(1, 2), ('alpha', 'beta'), strict=True):
        for number, arm in enumerate(arms):
            courses = [row['path'][key] for row in rows if row['arm'] == arm and row['path'].get(key)]
            for seed, course in enumerate(courses):
                axis.plot(course, linewidth=1, color=f'C{number % 10}', label=None if seed else arm)
        axis.set_xlabel('epoch')
        axis.set_title(key, fontsize=9)
        if axis.lines:
            axis.legend(fontsize=6)
    save_figure(figure, path, dpi=150)
