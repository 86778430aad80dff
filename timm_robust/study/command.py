"""The command `timm-robust study`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_line import Parser, command, count, keep_freed_memory
from .design import read_study
from .findings import read_points, write_findings
from .plots import draw
from .points import check_images, run_points


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, tabulate, plot; 0 if it ended well, 2 for bad input."""
    parser = Parser(description='Test claims by networks that differ in one thing, over seeds, on the same images.')
    parser.add_argument('study', type=Path, help='YAML file of the study')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder for runs, tables and plots')
    parser.add_argument('--data-dir', help='folder that holds the data')
    parser.add_argument(
        '--jobs', type=count, default=1, metavar='N', help='points at a time, each in a process of its own'
    )
    parser.add_argument(
        '--publish',
        type=Path,
        metavar='DIR',
        help='put points, tables and plots there; what is done there is not done again',
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr, force=True)
    study = read_study(args.study, args.data_dir)
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.publish or args.output
    rows = read_points(study, folder / 'points.jsonl')
    check_images(study, rows)
    if rows:
        write_findings(study, rows, folder)
    place = {(arm.name, seed): number for number, (arm, seed) in enumerate(study.points)}
    for row in run_points(study, rows, args.output, args.jobs):
        known = [*rows, *read_points(study, folder / 'points.jsonl'), row]  # others may have published meanwhile
        found = {(row['arm'], row['seed']): row for row in known}
        rows = [found[key] for key in sorted(found, key=place.__getitem__)]
        write_findings(study, rows, folder)
        print(f'{len(rows)}/{len(study.points)} {_describe(row)}', file=sys.stderr, flush=True)
    draw([row for row in rows if 'diverged' not in row], folder)
    return 0


def _describe(row: dict[str, Any]) -> str:
    """A point in a line."""
    name = f'{row["arm"]}-s{row["seed"]}'
    if 'diverged' in row:
        return f'{name}: diverged'
    radius = f', radius {row["radius"]:.4f}' if 'radius' in row else ''
    return f'{name}: clean {row["clean_acc"]:.1%}, {row["attack"]} {row[row["attack"] + "_acc"]:.1%}{radius}'
