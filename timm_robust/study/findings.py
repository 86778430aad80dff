"""What a study found: a row a point with its verdicts, a table of the arms, and every claim with its interval."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from ..results import mean_interval
from ..training import Recipe
from .design import ATTACK_NAMES, Arm, Claim, Study

_LEFT_OUT = ('path', 'warnings', 'settings', 'diverged', 'clean_correct', 'robust', 'environment', 'commits')
LEAST_SEEDS = 3
"""Trainings that an interval takes: of two the spread is known too badly."""
_LIMITS = """
Intervals are 95 %, and take seeds for normal draws. That of an arm is mean +- t * sd / sqrt(seeds) of its accuracies,
on these images. That of a claim is of differences paired by seed and image, and for other images as well: both count
as draws (crossed random effects). The verdict is on the robust accuracy. What was learned is that of the network that
was measured, the best checkpoint."""
_CAUTION = """

'Not shown' does not mean equal: an effect as large as half of the interval is shown about every other time, one of 1.4
times that about seven times in ten. A claim about arms that are equal is shown or contradicted about one time in
twenty (in simulations 4 to 8 times in a hundred with three seeds, 4 to 6 with five). Of {count} such claims about
{expected:.2g} would be, on average; claims that share an arm err together."""


def read_points(study: Study, path: Path) -> list[dict[str, Any]]:
    """The rows of the points that are done, out of points.jsonl; none if there is no such file.

    Raises:
        ValueError: for a line that is none of this study.
    """
    rows: list[dict[str, Any]] = []
    arms = {arm.name: arm for arm in study.arms}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            arm, seed, settings = str(row['arm']), row['seed'], row['settings']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number} is no point of a study; delete the line') from error
        if arm not in arms or seed not in study.seeds or not study.accepts(arms[arm], settings):
            raise ValueError(
                f'{path}, line {number}: {arm}-s{seed} comes from other settings than the study has now; undo the '
                'change, delete the line and the folder of that training, or name another folder'
            )
        if not _is_whole(row, study.measurement.n):
            raise ValueError(
                f'{path}, line {number}: {arm}-s{seed} lacks results, or those of {study.measurement.n} images; '
                'delete the line'
            )
        if any((arm, seed) == (other['arm'], other['seed']) for other in rows):
            raise ValueError(f'{path}, line {number}: {arm}-s{seed} stands there twice; delete one of the lines')
        rows.append(row)
    return rows


def _is_whole(row: dict[str, Any], n: int) -> bool:
    """Whether a row says that its training diverged, or has what was measured on n images."""
    if 'diverged' in row:
        return True
    verdicts = [row.get(key) for key in ('clean_correct', 'robust')]
    return 'attack' in row and all(
        isinstance(text, str) and len(text) == n and set(text) <= {'0', '1'} for text in verdicts
    )


def write_findings(study: Study, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write points.jsonl, results.csv and findings.md of the points that are done.

    Args:
        study: as read.
        rows: of points.
        folder: they go to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _LEFT_OUT]
    table = [','.join(columns)]
    table += [','.join('' if row.get(key) is None else str(row[key]) for key in columns) for row in rows]
    texts = {'points.jsonl': map(json.dumps, rows), 'results.csv': table, 'findings.md': findings(study, rows)}
    for name, lines in texts.items():
        write_text(folder / name, '\n'.join(lines) + '\n')


def findings(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of findings.md: arms, then claims; accuracies in percent with 95 % intervals (`mean_interval`).

    An arm's are over seeds on these images, a claim's over seeds and images.
    """
    attack, measurement = ATTACK_NAMES[study.measurement.attack], study.measurement
    recipes = [Recipe.from_values(arm.recipe, arm.name) for arm in study.arms]
    balls, data = {str(recipe.threat_model) for recipe in recipes}, {recipe.dataset for recipe in recipes}
    lines = [
        f'Robust: still right under {attack}, {" or ".join(sorted(balls))}, on the first {measurement.n} images of '
        f'{" or ".join(sorted(data))}, {measurement.split} split.',
        '',
        '| arm | seeds | clean (%) | robust (%) | learned |',
        '|---|---|---|---|---|',
    ]
    for arm in study.arms:
        clean, robust = (verdicts(arm.name, rows, key) for key in ('clean_correct', 'robust'))
        cells = [percent(clean), percent(robust)] if len(robust) else ['', '']
        lines.append(f'| {arm.name} | {len(robust)} | {" | ".join(cells)} | {_learned(arm, rows)} |')
    lost = [f'{row["arm"]}-s{row["seed"]}' for row in rows if 'diverged' in row]
    if lost:
        lines += ['', f'Diverged: {", ".join(lost)}.']
    commits = [row.get('commits') or [row['environment']['commit']] for row in rows if 'environment' in row]
    if counts := Counter(' and '.join(commit or 'none' for commit in each) for each in commits):
        lines += ['', f'Networks by commit: {", ".join(f"{n} at {commit}" for commit, n in counts.items())}.']
    if study.claims:
        lines += ['', '| claim | arms | pairs of seeds | clean (points) | robust (points) | verdict |']
        lines += ['|---|---|---|---|---|---|']
    for claim in study.claims:
        clean, robust = (differences(claim, rows, key) for key in ('clean_correct', 'robust'))
        effects = [percent(values, '+', other_images=True) if len(values) else '' for values in (clean, robust)]
        cells = [f'{len(robust)} of {len(study.seeds)}', *effects, judge(study, claim, rows, robust)]
        lines.append(f'| {claim.text} | {claim.more} - {claim.than} | {" | ".join(cells)} |')
    caution = _CAUTION.format(count=len(study.claims), expected=0.05 * len(study.claims)) if study.claims else ''
    return lines + (_LIMITS + caution).split('\n')


def judge(study: Study, claim: Claim, rows: list[dict[str, Any]], differences: np.ndarray) -> str:
    """'shown' or 'contradicted' if the 95 % interval of the mean lies above or below 0, else 'not shown'.

    'not yet' until every point of both arms is there. Where a training diverged nothing is shown: the seeds that are
    left would speak for the arm that lost the others; nor where all differences are equal, or of fewer than three
    seeds, and their spread is unknown.
    """
    own = [row for row in rows if row['arm'] in (claim.more, claim.than)]
    if len(own) < 2 * len(study.seeds):
        return 'not yet'
    if lost := {row['seed'] for row in own if 'diverged' in row}:
        return f'not shown ({len(lost)} seed{"s" * (len(lost) > 1)} lost)'
    _, low, high = mean_interval(differences, other_images=True)
    if len(differences) < LEAST_SEEDS:
        return f'not shown ({len(differences)} of the {LEAST_SEEDS} seeds that a claim takes)'
    if len(set(differences.sum(1))) == 1:
        return 'not shown'
    return 'shown' if low > 0 else 'contradicted' if high < 0 else 'not shown'


def percent(values: np.ndarray, sign: str = '', other_images: bool = False) -> str:
    """A mean in percent with its 95 % interval (`mean_interval`), if there are as many trainings as that takes."""
    mean, low, high = (100 * value for value in mean_interval(values.astype(float), other_images=other_images))
    return f'{mean:{sign}.1f}' + (f' ({low:{sign}.1f} to {high:{sign}.1f})' if len(values) >= LEAST_SEEDS else '')


def differences(claim: Claim, rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """The verdicts of a claim's arms, one minus the other, under each seed that both have: [seeds, images]."""
    more, than = (by_seed(name, rows, key) for name in (claim.more, claim.than))
    both = sorted(more.keys() & than.keys())
    return np.stack([more[seed].astype(float) - than[seed] for seed in both]) if both else np.zeros((0, 0))


def by_seed(name: str, rows: list[dict[str, Any]], key: str) -> dict[int, np.ndarray]:
    """The verdicts [images] of an arm under each seed."""
    return {row['seed']: np.array(list(row[key])) == '1' for row in rows if row['arm'] == name and key in row}


def verdicts(name: str, rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """The verdicts of an arm, [seeds, images]."""
    found = by_seed(name, rows, key)
    return np.stack([found[seed] for seed in sorted(found)]) if found else np.zeros((0, 0), bool)


def _learned(arm: Arm, rows: list[dict[str, Any]]) -> str:
    """The learned parameters of an arm's measured networks: 'alpha 1.42, 1.68; beta 0.0004, 0.0003'."""
    own = [row for row in rows if arm.learned and row['arm'] == arm.name and 'robust' in row]
    names = [key for key in (own[0] if own else {}) if key.startswith('final_')]
    return '; '.join(f'{key.removeprefix("final_")} ' + ', '.join(f'{row[key]:.2g}' for row in own) for key in names)
