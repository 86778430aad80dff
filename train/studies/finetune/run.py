#!/usr/bin/env python3
"""Your own classes made robust, from random, ordinary and robust weights: how many images does it take?

    python train/studies/finetune/run.py --data-dir CIFAR10 -o OUT

A quarter-width `resnet18_pssilu` learns eight classes of CIFAR-10, once as usual and once adversarially. The other
two, automobile and truck, are 'your own': a folder of 50, 200 or 1,000 pictures a class, another draw for each seed, on
which `timm-robust train finetune_folder` starts from random weights and from either network. Each of the 27 classifiers
meets APGD-CE + APGD-T on the same 500 test pictures. What was done before is not done again; results.csv, findings.md
and accuracy.png go to OUT.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
from PIL import Image

from timm_robust.command_line import Parser, command, count
from timm_robust.data import ImageData, load_dataset
from timm_robust.files import atomic_file
from timm_robust.plots import read_run
from timm_robust.results import RobustnessResult, mean_interval
from timm_robust.study import percent

OWN = ('automobile', 'truck')
NETWORK = ['--model', 'resnet18_pssilu', '--model-kwargs', 'width=16', '--eps', '8/255']
SOURCE = ['--dataset', 'npz', '--attack', 'n_fgsm', '--epochs', '6', '--warmup-epochs', '2', '--lr', '0.2', '--amp']
LOSSES = {'ordinary': 'clean', 'robust': 'pgd_at'}
RATES = {'random': '0.1', 'ordinary': '0.01', 'robust': '0.01'}
COLOURS = {'random': 'tab:grey', 'ordinary': 'tab:blue', 'robust': 'tab:red'}


class Arm(NamedTuple):
    """One classifier of the experiment."""

    start: str
    images: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f'{self.start}-{self.images}-s{self.seed}'


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, and write down what was found; 0 if it ended well."""
    parser = Parser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='folder that holds CIFAR-10')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder for pictures, runs and findings')
    parser.add_argument('--images', type=count, nargs='+', default=[50, 200, 1000], help='pictures a class')
    parser.add_argument('--seeds', type=count, default=3, help='draws of pictures, each with a training of every arm')
    parser.add_argument('-n', type=count, default=500, help='test pictures (default: %(default)s)')
    parser.add_argument('--jobs', type=count, default=2, help='processes at a time (default: %(default)s)')
    parser.add_argument('--max-steps', type=count, help='end each training early, to try the script')
    args = parser.parse_args(argv)
    arms = [Arm(start, n, seed) for n in args.images for start in RATES for seed in range(args.seeds)]
    write_pictures(args.data_dir, args.output, args.images, args.seeds)
    brief = ['--max-steps', str(args.max_steps)] if args.max_steps else []
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda start: learn_source(args.output, start, brief), LOSSES))
        list(pool.map(lambda arm: measure(args.output, arm, args.n, brief), sorted(arms, key=lambda arm: -arm.images)))
    report(args.output, arms)
    return 0


def write_pictures(cifar: Path, output: Path, images: Sequence[int], seeds: int) -> None:
    """The eight classes as arrays, the two others as folders of pictures: OUT/source, OUT/own-N-sSEED, OUT/test."""
    train, test = (load_dataset('cifar10', cifar, split) for split in ('train', 'test'))
    own = [train.classes.index(name) for name in OWN]
    others = [number for number in range(len(train.classes)) if number not in own]
    source = output / 'source'
    source.mkdir(parents=True, exist_ok=True)
    (source / 'classes.txt').write_text('\n'.join(train.classes[number] for number in others) + '\n')
    kept = np.isin(train.labels.numpy(), others)
    labels = np.searchsorted(others, train.labels.numpy()[kept])
    np.savez(source / 'train.npz', image=train.images.numpy()[kept], label=labels)
    write_folder(test, output / 'test/test', own, None, 0)
    for seed in range(seeds):
        for n in images:
            write_folder(train, output / f'own-{n}-s{seed}', own, n, seed)


def write_folder(data: ImageData, folder: Path, classes: Sequence[int], n: int | None, seed: int) -> None:
    """The pictures of some classes, or n of each drawn by a seed, of which smaller draws are a part."""
    for number in classes:
        rows = (data.labels == number).nonzero()[:, 0].numpy()
        if n is not None:
            rows = np.random.default_rng([seed, number]).permutation(rows)[:n]
        place = folder / data.classes[number]
        place.mkdir(parents=True, exist_ok=True)
        for row in rows:
            if not (path := place / f'{row}.png').exists():
                with atomic_file(path) as file:
                    Image.fromarray(data.images[row].permute(1, 2, 0).numpy()).save(file, 'png')


def learn_source(output: Path, start: str, brief: Sequence[str]) -> None:
    """Train a network on the eight classes."""
    settings = [
        '--loss',
        LOSSES[start],
        '--data-dir',
        str(output / 'source'),
        '--val-size',
        '0.025',
        '--val-interval',
        '3',
        *brief,
    ]
    run('train', *NETWORK, *SOURCE, *settings, '--output', str(output), '--experiment', start, '--resume', 'auto')


def measure(output: Path, arm: Arm, n: int, brief: Sequence[str]) -> None:
    """Train a classifier of the two classes and attack it."""
    folder, record = output / 'runs' / arm.name, output / 'records' / f'{arm.name}.json'
    flags = record.with_suffix('.npz')
    if record.exists() and flags.exists():  # a kill may come between the two
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    pictures = str(output / f'own-{arm.images}-s{arm.seed}')
    weights = ['--no-pretrained'] if arm.start == 'random' else ['--initial-checkpoint', str(output / arm.start)]
    settings = ['--img-size', '32', '--workers', '0', '--lr', RATES[arm.start], '--seed', str(arm.seed), *brief]
    place = ['--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
    run('train', 'finetune_folder', *NETWORK, '--data-dir', pictures, *weights, *settings, *place)
    test = ['--dataset', 'folder', '--data-dir', str(output / 'test'), '--split', 'test', '-n', str(n)]
    files = ['--flags-file', str(flags), '--results-file', str(record)]
    run('evaluate', str(folder), *test, '--attack', 'apgd', '--eps', '8/255', '--quiet', *files)


def run(*arguments: str) -> None:
    """One command of timm-robust, on one thread."""
    print('timm-robust', *arguments, flush=True)
    one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command_line = [sys.executable, '-m', 'timm_robust.cli', *arguments]
    done = subprocess.run(command_line, env=one_thread, capture_output=True, text=True)
    if done.returncode:
        last = ''.join(done.stderr.strip().splitlines()[-1:])
        raise ValueError(f'timm-robust {" ".join(arguments)} failed: {last}')


def report(output: Path, arms: Sequence[Arm]) -> None:
    """Write results.csv, findings.md and accuracy.png."""
    rows: list[dict[str, Any]] = []
    robust: dict[Arm, np.ndarray] = {}
    clean: dict[Arm, np.ndarray] = {}
    for arm in arms:
        record = RobustnessResult.from_json(output / 'records' / f'{arm.name}.json')
        with np.load(output / 'records' / f'{arm.name}.npz') as flags:
            robust[arm], clean[arm] = flags['robust'], flags['clean_correct']
        history = read_run(output / 'runs' / arm.name)
        row = {**arm._asdict(), 'clean_acc': record.clean_acc, 'pgd_acc': record.pgd_acc, 'apgd_acc': record.apgd_acc}
        rows.append(row | {'n': record.n, 'epochs': len(history), 'train_seconds': history[-1]['seconds']})
    with open(output / 'results.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    sizes, seeds = sorted({arm.images for arm in arms}), sorted({arm.seed for arm in arms})

    def verdicts(of: dict[Arm, np.ndarray], start: str, n: int) -> np.ndarray:
        return np.stack([of[Arm(start, n, seed)] for seed in seeds]).astype(float)

    lines = ['| pictures a class | start | clean | APGD-CE + APGD-T |', '|---|---|---|---|']
    for n in sizes:
        for start in RATES:
            cells = [percent(verdicts(of, start, n)) for of in (clean, robust)]
            lines.append(f'| {n} | {start} | {cells[0]} | {cells[1]} |')
    lines += ['', '| pictures a class | difference | clean | APGD-CE + APGD-T |', '|---|---|---|---|']
    for n in sizes:
        for a, b in (('robust', 'ordinary'), ('robust', 'random'), ('ordinary', 'random')):
            cells = [percent(verdicts(of, a, n) - verdicts(of, b, n), sign='+') for of in (clean, robust)]
            lines.append(f'| {n} | {a} - {b} | {cells[0]} | {cells[1]} |')
    (output / 'findings.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    draw(
        output / 'accuracy.png',
        sizes,
        {(s, n): (verdicts(clean, s, n), verdicts(robust, s, n)) for s in RATES for n in sizes},
    )


def draw(path: Path, sizes: Sequence[int], found: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]) -> None:
    """Clean and robust accuracy over the number of pictures, a line a start, with intervals."""
    figure = matplotlib.figure.Figure(figsize=(7, 3), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for axis, title, place in zip(axes, ('clean', 'APGD-CE + APGD-T, Linf 8/255'), (0, 1), strict=True):
        for shift, (start, colour) in enumerate(COLOURS.items()):
            means = np.array([mean_interval(found[start, n][place]) for n in sizes]) * 100
            around = abs(means[:, 1:] - means[:, :1]).T
            where = np.array(sizes) * 1.04 ** (shift - 1)
            axis.errorbar(where, means[:, 0], around, color=colour, marker='o', capsize=3, label=f'{start} weights')
        axis.axhline(50, color='black', linewidth=0.7, linestyle=':')
        axis.set(xscale='log', xlabel='pictures a class', title=title, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    axes[0].set_ylabel('accuracy on two classes (%)')
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    sys.exit(main())
