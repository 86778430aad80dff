"""Where a model stands among RobustBench's entries.

The published numbers are in published.json, taken from the model_info folder of RobustBench's repository.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import new_figure, save_figure
from ..release import (
    extra_data_of,
    measurement_notes,
    percent,
    read_hyper,
    read_results,
    results_of,
    strongest,
)
from ..results import RobustnessResult
from ..threat_model import LEADERBOARD_EPS, parse_eps

TABLE = Path(__file__).with_name('published.json')
_NEAR = 5  # entries to show above and below
_COLORS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00')


def entries_of(dataset: str, norm: str) -> list[dict[str, Any]]:
    """The published entries of a data set and threat model, the most robust first.

    Raises:
        ValueError: if there are none.
    """
    entries = json.loads(TABLE.read_text(encoding='utf-8'))['entries']
    if f'{dataset} {norm}' not in entries:
        raise ValueError(f'no numbers of RobustBench for {dataset} {norm}; there are {", ".join(entries)}')
    return sorted(entries[f'{dataset} {norm}'], key=lambda entry: -entry['robust_acc'])


def compare(folder: Path) -> str:
    """A staged model beside RobustBench's entries, as a table: the nearest, and all of the same architecture.

    Args:
        folder: model_cards/<arch>.<tag>.

    Raises:
        ValueError: if nothing was measured that the leaderboard measures.
    """
    record, ours = _measured(folder)
    entries, robust = entries_of(ours.dataset, ours.norm), 100 * float(ours.robust_acc or 0)
    rank = sum(entry['robust_acc'] > robust for entry in entries)
    extra = extra_data_of(ours.model, read_hyper(folder))
    arch = ours.model.partition('.')[0]
    kind = '' if ours.attack == 'autoattack' else f' ({ours.attack_title})'
    own = (
        f'| **{rank + 1}** | **{ours.model}** | {arch} | {percent(ours.clean_acc, ours.n)} | '
        f'{percent(ours.robust_acc, ours.n)}{kind} | {ours.n} | {extra.text if extra else "no"} |'
    )
    lines = ['| place | model | network | clean | AutoAttack | n | extra data |', '|---|---|---|---|---|---|---|']
    for place, entry in enumerate(entries):
        if place == rank:
            lines.append(own)
        if abs(place - rank) <= _NEAR or _same_size(arch, entry['architecture']):
            more = 'yes' if entry['additional_data'] else 'no'
            lines.append(
                f'| {place + 1} | {entry["name"]} | {entry["architecture"]} | {entry["clean_acc"]:.2f} | '
                f'{entry["robust_acc"]:.2f} | 10000 | {more} |'
            )
    if rank == len(entries):
        lines.append(own)
    notes = dict.fromkeys([*record['training']['notes'], *measurement_notes(record)])
    lines += [
        '',
        f'Published: {len(entries)} entries, 10,000 official test images each. Ours: the first {ours.n} images,',
        f'{ours.attack_title}, ± one standard error. ' + ' '.join(notes),
    ]
    if extra:
        lines += ['RobustBench counts generated images as no extra data and names them in a footnote.']
    return '\n'.join(lines)


def _measured(folder: Path) -> tuple[dict[str, Any], RobustnessResult]:
    """A staged model's record, and its measurement that the leaderboard's compares with."""
    record = read_results(folder)
    results = _comparable(record)
    if not results:
        raise ValueError(
            f'{record["model"]} has no measurement with AutoAttack or its APGD part; type: '
            f'timm-robust measure {record["model"]} --data-dir DIR --attack apgd -n 1000'
        )
    best = strongest(result for result in results if at_leaderboard_eps(result))
    if best is None:
        raise ValueError(other_eps(record))
    return record, best


def is_measured(folder: Path) -> bool:
    """Whether anything of a staged model was measured that a leaderboard measures."""
    return bool(_comparable(read_results(folder)))


def _comparable(record: dict[str, Any]) -> list[RobustnessResult]:
    """The measurements of a record with AutoAttack or its APGD part."""
    return [result for result in results_of(record) if result.attack in ('autoattack', 'apgd')]


def _same_size(arch: str, architecture: str) -> bool:
    """Whether an entry's network is of our size: 'ResNet-18' for resnet18_silu, 'WideResNet-28-10' for wrn28_10_elu."""
    size = arch.rpartition('_')[0].replace('wrn', 'WideResNet-').replace('resnet', 'ResNet-').replace('_', '-')
    return bool(re.match(rf'(PreAct)?{re.escape(size)}(?!\d)', architecture))


def draw(folders: Sequence[Path], path: str | Path) -> None:
    """Clean against robust accuracy: the published entries in grey, staged models with their standard errors.

    Args:
        folders: model_cards/<arch>.<tag>, measured against one threat model on one data set.
        path: the picture; its suffix says which kind.

    Raises:
        ValueError: if they were measured against several, or one as the leaderboard measures was not.
    """
    found = [_measured(folder)[1] for folder in folders]
    threats = {(ours.dataset, ours.norm, ours.eps_text) for ours in found}
    if len(threats) != 1:
        raise ValueError(f'one picture shows one threat model, not {sorted(threats)}; name models that share theirs')
    dataset, norm, eps = threats.pop()
    figure = new_figure(6.4, 4.0)
    axis = figure.subplots()
    for extra, marker in ((False, 'o'), (True, '^')):
        part = [entry for entry in entries_of(dataset, norm) if bool(entry['additional_data']) == extra]
        label = 'RobustBench (AutoAttack), extra data' if extra else 'RobustBench (AutoAttack)'
        points = [entry['clean_acc'] for entry in part], [entry['robust_acc'] for entry in part]
        axis.plot(*points, marker, color='0.7', markersize=4, label=label)
    for ours, color in zip(found, itertools.cycle(_COLORS), strict=False):
        shares = ours.clean_acc, float(ours.robust_acc or 0)
        x, y = (100 * share for share in shares)
        xerr, yerr = (100 * (share * (1 - share) / ours.n) ** 0.5 for share in shares)
        label = f'{ours.model} ({ours.attack_title}, n {ours.n})'
        axis.errorbar([x], [y], xerr=xerr, yerr=yerr, fmt='*', color=color, markersize=11, label=label)
    axis.set_xlabel('clean accuracy (%)')
    axis.set_ylabel('robust accuracy (%)')
    axis.set_title(f'{dataset}, {norm} {eps}', fontsize=10)
    axis.legend(fontsize=7)
    save_figure(figure, path, dpi=150)


def at_leaderboard_eps(result: RobustnessResult) -> bool:
    """Whether a measurement is of the leaderboard's radius; in L2 128/255 counts as 0.5 there."""
    tolerance = 0.003 if result.norm == 'L2' else 1e-6
    return abs(parse_eps(result.eps_text) - parse_eps(LEADERBOARD_EPS[result.norm])) < tolerance


def other_eps(record: dict[str, Any]) -> str:
    """What to do with a model that was measured at another radius."""
    there = ', '.join(dict.fromkeys(f'{result.norm} {result.eps_text}' for result in results_of(record)))
    radii = ' and '.join(f'{norm} {eps}' for norm, eps in LEADERBOARD_EPS.items())
    return (
        f'{record["model"]} was measured at {there}, the leaderboard is for {radii}; stage its run again with '
        '--overwrite, then type timm-robust measure NAME --data-dir DIR --eps RADIUS'
    )
