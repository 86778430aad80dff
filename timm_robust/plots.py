"""Pictures: the course of training runs, and adversarial examples beside their originals.

timm-robust plot RUN [RUN ...] [-o plots.png] draws the summary.csv of run folders side by side.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .command_line import Parser, command
from .files import atomic_file
from .threat_model import ThreatModel

# column of summary.csv -> label of the panel, factor of the values
_PANELS = {
    'train_loss': ('training loss', 1),
    'val_clean_acc': ('clean accuracy, held out (%)', 100),
    'val_pgd_acc': ('PGD accuracy, held out (%)', 100),
    'lr': ('learning rate', 1),
    'alpha': (r'activation $\alpha$', 1),
    'beta': (r'activation $\beta$', 1),
    'max_curvature': (r"max curvature $|f\,''|$", 1),
    'images_per_s': ('training speed (images/s)', 1),
}
# Okabe and Ito's colours, told apart by colour-blind readers; without yellow, which is faint on white
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_DASHES = ('-', '--', '-.', ':')
_STAR: dict[str, Any] = {'markersize': 8, 'markeredgecolor': 'black', 'markeredgewidth': 0.5, 'zorder': 3}
_STYLE = {
    'font.size': 8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'axes.grid': True,
    'axes.formatter.useoffset': False,
    'grid.color': '0.9',
    'grid.linewidth': 0.5,
    'lines.linewidth': 1.3,
    'pdf.fonttype': 42,
}

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]


def run_figure(path: str | Path, runs: dict[str, Rows], metrics: dict[str, str] | None = None) -> None:
    """Save a figure of training runs: a panel for each quantity that a run has, over the images seen.

    A star marks each run's best epoch. The suffix of the path chooses the format: .png, .pdf, .svg.

    Args:
        path: the picture.
        runs: name of a run -> its rows, as in summary.csv or in its history; absent and None are gaps.
        metrics: name of a run -> the column its best epoch is best in; 'val_pgd_acc' where not given.

    Raises:
        ImportError: if matplotlib is missing, with what to type.
        ValueError: if there is nothing to draw, or no such format.
    """
    matplotlib = _matplotlib()
    series = {key: {name: _series(name, rows, key) for name, rows in runs.items()} for key in _PANELS}
    panels = [key for key in _PANELS if any(series[key].values())]
    if not panels:
        raise ValueError(f'none of {", ".join(runs) or "no run"} has a number in {", ".join(_PANELS)}: nothing to draw')
    best = {name: _best(rows, (metrics or {}).get(name, 'val_pgd_acc')) for name, rows in runs.items()}
    largest = max(x for key in panels for points in series[key].values() for x, _ in points)
    scale, unit = _unit(largest)
    columns = len(panels) if len(panels) < 4 else (len(panels) + 1) // 2
    lines = math.ceil(len(panels) / columns)
    handles, labels = _legend(best)
    room, wide = 44 * max(columns, 2), [len(label) + 7 for label in labels]  # of the legend, in characters
    beside = len(labels) if sum(wide) <= room else max(1, room // max(wide))
    height = 2.1 * lines + 0.19 * math.ceil(len(labels) / beside) + 0.1
    with matplotlib.rc_context(_STYLE):
        figure = new_figure(2.6 * max(columns, 2), height)
        grid = figure.subplots(lines, columns, squeeze=False).flat
        for index, axis in enumerate(grid):
            if index >= len(panels):
                axis.remove()
                continue
            _draw(axis, panels[index], series[panels[index]], best, scale)
            axis.set_xlim(-0.03 * largest / scale, 1.03 * largest / scale)
            if index + columns >= len(panels):
                axis.set_xlabel(f'training images seen{unit}')
        figure.legend(handles, labels, loc='outside lower center', ncols=beside, frameon=False)
        save_figure(figure, path, dpi=200)


def read_run(folder: str | Path) -> Rows:
    """The rows of a run's summary.csv: numbers, None for empty cells.

    Raises:
        FileNotFoundError: if there is no such folder or no summary.csv in it, with what there is.
        ValueError: if the file is empty or a cell is no number, with its line and column.
    """
    folder = Path(folder)
    path = folder / 'summary.csv'
    if not path.is_file():
        what = 'holds no summary.csv' if folder.is_dir() else 'is not a folder'
        place = folder if folder.is_dir() else folder.parent
        names = (
            sorted(f'{item.name}/' if item.is_dir() else item.name for item in place.iterdir())
            if place.is_dir()
            else []
        )
        there = ', '.join(names[:12]) + (f' and {len(names) - 12} more' if len(names) > 12 else '') or 'nothing'
        where = 'it' if place == folder else str(place)
        raise FileNotFoundError(f'run {folder} {what}; {where} holds {there}; name the folder that training wrote')
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file, restkey='')
            rows = [{key: _number(path, reader.line_num, key, cell) for key, cell in row.items()} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f'{path} is not a table of comma-separated text: {error}') from None
    if not rows:
        raise ValueError(f'{path} holds no row; training writes one after each epoch: wait for the first')
    return rows


def adversarial_figure(
    path: str | Path,
    x: torch.Tensor,
    y: torch.Tensor,
    attempts: dict[str, tuple[torch.Tensor, torch.Tensor]],
    classes: Sequence[str],
    threat_model: ThreatModel,
) -> None:
    """Save a figure: a row an image, the original, then under each model's name its adversarial image and perturbation.

    Args:
        path: the picture.
        x: original images [B, C, H, W] in [0, 1], C 1 or 3.
        y: true labels [B].
        attempts: name of a model -> (adversarial images [B, C, H, W], the model's labels of them [B]).
        classes: class names.
        threat_model: its eps sets the magnification of the perturbation: grey is none, black and white are eps.

    Raises:
        ImportError: if matplotlib is missing, with what to type.
    """
    figure = new_figure(1.7 * (1 + 2 * len(attempts)), 1.95 * len(x) + 0.7)
    figure.suptitle(f'{threat_model}: red labels are wrong, green ones right', fontsize=10)
    first, *others = figure.subfigures(1, 1 + len(attempts), width_ratios=[1] + [2] * len(attempts), squeeze=False)[0]
    first.suptitle('original', fontsize=9)
    for axes, image, label in zip(first.subplots(len(x), 1, squeeze=False), x, y, strict=True):
        _show(axes[0], image, classes[int(label)], 'black')
    for part, (name, (x_adv, predicted)) in zip(others, attempts.items(), strict=True):
        part.suptitle(name, fontsize=9)
        rows = part.subplots(len(x), 2, squeeze=False)
        for axes, delta, image, label, right in zip(rows, x_adv - x, x_adv, predicted, predicted == y, strict=True):
            _show(axes[0], image, classes[int(label)], 'seagreen' if right else 'firebrick')
            scale = threat_model.eps if threat_model.norm == 'Linf' else delta.abs().max().clamp_min(1e-12).item()
            unchanged = 'resists' if right else 'wrong unattacked'
            title = f'perturbation x {0.5 / scale:.3g}' if delta.any() else unchanged
            _show(axes[1], (0.5 + 0.5 * delta / scale).clamp(0, 1), title, 'black')
    save_figure(figure, path, dpi=100)


def report_figure(
    path: str | Path,
    clean: torch.Tensor,
    attacked: torch.Tensor,
    rows: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    classes: Sequence[str],
    threat_model: ThreatModel,
) -> None:
    """Save a figure: what is taken for what, as it is and under attack, and rows of images below.

    Args:
        path: the picture.
        clean: images of each class (row) that got each label (column), [classes, classes].
        attacked: the same for their adversarial images.
        rows: title -> (images [B, C, H, W] in [0, 1], labels [B], the model's answers [B], those under attack [B]).
        classes: class names.
        threat_model: of the attack, for the title.

    Raises:
        ImportError: if matplotlib is missing, with what to type.
    """
    few = len(classes) <= 20
    side = max(4.0, 0.32 * len(classes)) if few else 6.0
    figure = new_figure(2 * side + 1, side + 1.9 * len(rows) + 0.6)
    top, *others = figure.subfigures(1 + len(rows), 1, height_ratios=[side + 0.6] + [1.9] * len(rows))
    for axis, title, counts in zip(
        top.subplots(1, 2), ('as they are', str(threat_model)), (clean, attacked), strict=True
    ):
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        axis.imshow(shares.cpu().numpy(), cmap='Blues', vmin=0, vmax=1)
        axis.set_title(f'{title}: {int(counts.diagonal().sum())} of {int(counts.sum())} right', fontsize=9)
        axis.set_xlabel('answer', fontsize=8)
        axis.set_ylabel('class', fontsize=8)
        ticks = range(len(classes)) if few else []
        names = [classes[number][:16] for number in ticks]
        axis.set_xticks(list(ticks), names, rotation=90, fontsize=7)
        axis.set_yticks(list(ticks), names, fontsize=7)
        for row, column in counts.nonzero().tolist() if few else ():
            color = 'white' if shares[row, column] > 0.5 else 'black'
            axis.text(column, row, int(counts[row, column]), ha='center', va='center', fontsize=6, color=color)
    for part, (title, (images, labels, answers, fooled)) in zip(others, rows.items(), strict=True):
        part.suptitle(title, fontsize=9)
        cells = part.subplots(1, len(images), squeeze=False)[0]
        for axis, image, *numbers in zip(cells, images, labels, answers, fooled, strict=True):
            own, answer, under = (int(number) for number in numbers)
            text = f'{classes[own][:14]}\n-> {classes[answer][:14]}, {classes[under][:14]}'
            _show(axis, image, text, 'seagreen' if own == answer == under else 'firebrick')
    save_figure(figure, path, dpi=110)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, whose parts make room for each other.

    Raises:
        ImportError: if matplotlib is missing, with what to type.
    """
    return _matplotlib().figure.Figure(figsize=(width, height), layout='constrained')


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a figure whole or not at all; the suffix of the path chooses the format, PNG where there is none."""
    with atomic_file(path) as file:
        figure.savefig(file, format=Path(path).suffix.lstrip('.') or 'png', dpi=dpi)


def _show(axis: Any, image: torch.Tensor, title: str, color: str) -> None:
    """One image with its caption, no ticks."""
    axis.imshow(image.detach().cpu().permute(1, 2, 0).squeeze(-1).numpy(), cmap='gray', vmin=0, vmax=1)
    axis.set_title(title, fontsize=8, color=color)
    axis.set_axis_off()


def _matplotlib() -> Any:
    """The library, with its figure module."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib; type: pip install matplotlib') from error
    return matplotlib


def _number(path: Path, line: int, column: str, cell: Any) -> float | None:
    """A cell of summary.csv as a number; empty ones are None."""
    if cell is None or cell == '':
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        where = f'column {column!r}' if column else 'more cells than the header has columns'
        raise ValueError(f'{path}:{line}: cannot read {cell!r} ({where}); allowed: a number or nothing') from None


def _finite(value: Any) -> bool:
    """Whether it is a number, neither nan nor inf."""
    return value is not None and math.isfinite(value)


def _series(name: str, rows: Rows, key: str) -> Points:
    """The points of a run in a panel: absent ones left out, nan where a value is not finite; [] if none is."""
    given = [row for row in rows if row.get(key) is not None]
    if not any(_finite(row[key]) for row in given):
        return []
    if not all(_finite(row.get('images')) for row in given):
        columns = ', '.join(dict.fromkeys(key for row in rows for key in row))
        raise ValueError(f'run {name} has a {key} without images, the x axis; its columns: {columns}')
    factor = _PANELS[key][1]
    return [(float(row['images']), factor * row[key] if _finite(row[key]) else math.nan) for row in given]


def _best(rows: Rows, metric: str) -> dict[str, Any]:
    """The row of the best epoch, the first of equals; with its 'metric', and its place as 'epoch' if it has none."""
    last = rows[-1].get('side') if rows else None  # of progressive resizing: smaller images are another task
    rows = [row for row in rows if row.get('side') == last]
    for key in (metric, 'val_clean_acc'):
        if there := [(row[key], -index) for index, row in enumerate(rows) if _finite(row.get(key))]:
            index = -max(there)[1]
            return {'epoch': index, **rows[index], 'metric': key}
    return {}


def _unit(largest: float) -> tuple[float, str]:
    """Divisor of the images and its name, so that the ticks stay short."""
    for scale, name in ((1e9, 'billions'), (1e6, 'millions'), (1e3, 'thousands')):
        if largest >= scale:
            return scale, f' ({name})'
    return 1.0, ''


def _draw(axis: Any, key: str, series: dict[str, Points], best: dict[str, Any], scale: float) -> None:
    """One panel: a line a run, a star at its best epoch."""
    values = [y for points in series.values() for _, y in points if math.isfinite(y)]
    for index, (name, points) in enumerate(series.items()):
        color, dashes = _look(index)
        # runs often share one schedule: the first ones lie below, wider
        width = 1.3 + (min(len(series) - 1 - index, 3) if key == 'lr' else 0)
        x, y = [x / scale for x, _ in points], [y for _, y in points]
        axis.plot(x, y, dashes, color=color, linewidth=width, marker='.' if len(x) <= 25 else '', markersize=4)
        star = [point for point in points if point[0] == best[name].get('images')]
        if star:
            axis.plot(star[-1][0] / scale, star[-1][1], '*', color=color, **_STAR)
    axis.set_ylabel(_PANELS[key][0])
    if key == 'beta' and min(values) > 0 and max(values) > 100 * min(values):
        axis.set_yscale('log')
    elif key in ('lr', 'images_per_s') and 0 <= min(values) < max(values):
        axis.set_ylim(0, 1.08 * max(values))


def _look(index: int) -> tuple[str, Any]:
    """Colour and dashes of the run with this index."""
    return _COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)]


def _legend(best: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """Handles and labels of the one legend: the runs with their best accuracy, and what the star is."""
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    labels: list[str] = []
    for index, (name, row) in enumerate(best.items()):
        color, dashes = _look(index)
        handles.append(Line2D([], [], color=color, linestyle=dashes))
        name = name if len(name) <= 60 else f'{name[:29]}...{name[-28:]}'
        what = 'PGD' if row.get('metric') == 'val_pgd_acc' else 'clean'
        score = f' ({what} {100 * row[row["metric"]]:.1f} %, epoch {row["epoch"]:.0f})' if row else ''
        shown = f' {name}' if name.startswith('_') else name  # a leading '_' hides it
        labels.append((shown + score).replace('$', r'\$'))
    if any(best.values()):
        handles.append(Line2D([], [], color='0.4', linestyle='', marker='*', **_STAR))
        labels.append('best epoch')
    return handles, labels


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name of a run -> its folder, once each: as much of the path's end as tells them apart."""
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = {'/'.join(folder.parts[-length:]): folder for folder in folders}
        if len(names) == len(folders):
            break
    return names


def _metric(folder: Path) -> str:
    """What the best epoch of a run is best in: clean accuracy if its args.yaml says that it trained clean."""
    args = folder / 'args.yaml'
    clean = args.is_file() and 'loss: clean' in args.read_text(encoding='utf-8', errors='replace').splitlines()
    return 'val_clean_acc' if clean else 'val_pgd_acc'


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 2 for bad input."""
    parser = Parser('python -m timm_robust.plots', description='Draw the course of training runs side by side.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, with its summary.csv')
    parser.add_argument('-o', '--output', metavar='FILE', help='.png, .pdf or .svg; plots.png in the first RUN if none')
    args = parser.parse_args(argv)
    path = Path(args.output or Path(args.runs[0]) / 'plots.png')
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; name a file there, such as -o {path / "plots.png"}')
    rows = {Path(folder): read_run(folder) for folder in args.runs}
    names = _names(list(rows))
    by_folder = {folder.resolve(): table for folder, table in rows.items()}
    metrics = {name: _metric(folder) for name, folder in names.items()}
    run_figure(path, {name: by_folder[folder] for name, folder in names.items()}, metrics)
    print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
