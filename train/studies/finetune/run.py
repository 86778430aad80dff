#!/usr/bin/env python3
"""Your own classes made robust, from random, ordinary and robust weights: how many images does it take?

    python train/studies/finetune/run.py --data-dir CIFAR10 -o OUT --tune     # once: rates.csv, beside this file
    python train/studies/finetune/run.py --data-dir CIFAR10 -o OUT

Under each seed a quarter-width `resnet18_pssilu` learns eight classes of CIFAR-10, once as usual, once adversarially.
The other two, automobile and truck, are 'your own': a draw of 50, 200 or 1,000 pictures a class, on which
`finetune_folder` starts from random weights and from either network. Each of the 27 classifiers meets APGD-CE + APGD-T
on the same -n test pictures. All take 600 steps whatever their pictures, under the crops and flips of the first
training; nothing is held out, and the last weights count.

--tune tries five rates for each start and size under seed 99, with networks and a draw of its own, on 1,000 training
pictures that are in no draw. The best mean of clean and PGD accuracy wins, of equal ones the lowest rate: PGD accuracy
alone is 50 % there for a classifier that always says the same.

results.csv, findings.md and accuracy.png go to OUT; what was done with the same settings is not done again.

Hours: 0.8 for --tune and 0.8 for the rest with -n 200, on two CPU cores with bf16, tests beside.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from timm_robust import cli
from timm_robust.command_line import Parser, command, count, run_quietly, start_worker
from timm_robust.data import ImageData, load_dataset
from timm_robust.files import atomic_file
from timm_robust.plots import read_run
from timm_robust.results import RobustnessResult, mean_interval
from timm_robust.study import LEAST_SEEDS, percent

OWN = ('automobile', 'truck')
STEPS, TUNE_SEED = 600, 99
GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
NETWORK = ('--model', 'resnet18_pssilu', '--model-kwargs', 'width=16', '--eps', '8/255', '--dataset', 'npz', '--amp')
SOURCE = ('--attack', 'n_fgsm', '--epochs', '3', '--warmup-epochs', '1', '--lr', '0.2')
# nothing is held out, and nothing but the last step chooses the weights
LAST = ('--val-size', '0', '--val-split', 'none', '--patience', 'none', '--no-model-ema')
TUNING = ('--split', 'validation', '--attack', 'pgd')
LOSSES = {'robust': 'pgd_at', 'ordinary': 'clean'}  # the longer first, so that two processes end together
COLOURS = {'random': 'tab:grey', 'ordinary': 'tab:blue', 'robust': 'tab:red'}


class Arm(NamedTuple):
    """One classifier of the experiment."""

    start: str
    images: int
    seed: int
    lr: float


class Run(NamedTuple):
    """How commands of timm-robust are run: each in a process of one thread that has its libraries in memory already."""

    workers: ProcessPoolExecutor
    output: Path
    max_steps: int | None

    def __call__(self, *arguments: str) -> None:
        """Run one.

        Raises:
            ValueError: if it failed, with its last line.
            ChildProcessError: if a process was killed.
        """
        words = f'timm-robust {" ".join(arguments)}'
        print(f'{words}\n', end='', flush=True)  # one write: threads print beside each other
        try:
            status, last = self.workers.submit(run_quietly, cli.main, arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError('a process was killed, perhaps for memory; type the same again to go on') from error
        if status:
            raise ValueError(f'{words} failed: {last}')


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, and write down what was found; 0 if it ended well."""
    parser = Parser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='folder that holds CIFAR-10')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder for pictures, runs and findings')
    parser.add_argument('--tune', action='store_true', help='measure the rates, and write them to --rates')
    rates = Path(__file__).with_name('rates.csv')
    parser.add_argument('--rates', type=Path, default=rates, help='file of the rates (default: rates.csv beside this)')
    parser.add_argument('--images', type=count, nargs='+', default=[50, 200, 1000], help='pictures a class')
    parser.add_argument('--seeds', type=count, default=3, help='networks, draws and trainings (default: %(default)s)')
    parser.add_argument('-n', type=count, default=500, help='test pictures (default: %(default)s)')
    parser.add_argument('--jobs', type=count, default=2, help='processes at a time (default: %(default)s)')
    parser.add_argument('--max-steps', type=count, help='end each training early, to try the script')
    args = parser.parse_args(argv)
    if args.tune and args.max_steps and args.rates.resolve() == rates.resolve():
        raise ValueError('rates of --max-steps are none to train by; name another file for them: --rates FILE')
    starts = [(start, n) for n in args.images for start in COLOURS]
    test: tuple[str, ...]
    if args.tune:
        seeds, test = [TUNE_SEED], TUNING
        arms = [Arm(*start, TUNE_SEED, lr) for start in starts for lr in GRID]
    else:
        seeds, test = list(range(args.seeds)), ('--split', 'test', '--attack', 'apgd', '-n', str(args.n))
        chosen = read_rates(args.rates, starts)
        arms = [Arm(*start, seed, chosen[start]) for start in starts for seed in seeds]
    write_pictures(args.data_dir, args.output, args.images, seeds)
    sources = [(start, seed) for start in LOSSES for seed in seeds]
    spawn = multiprocessing.get_context('spawn')
    workers = ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=start_worker, initargs=(1,))
    with workers, ThreadPoolExecutor(args.jobs) as pool:
        run = Run(workers, args.output, args.max_steps)
        learned = {source: pool.submit(learn_source, run, source) for source in sources}

        def classify(arm: Arm) -> Path:
            if arm.start in LOSSES:
                learned[arm.start, arm.seed].result()
            return measure(run, arm, test)

        first = sorted(arms, key=lambda arm: arm.start in LOSSES)  # random weights wait for no network
        try:
            done = dict(zip(first, pool.map(classify, first), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
    records = [done[arm] for arm in arms]
    if args.tune:
        write_rates(args.rates, arms, records)
    else:
        report(args.output, arms, records)
    return 0


def write_pictures(cifar: Path, output: Path, images: Sequence[int], seeds: Sequence[int]) -> None:
    """The eight classes: OUT/source; the two others: OUT/own-N-sSEED, and OUT/test with what nothing is trained on.

    The last tenth of each class's training pictures are in no draw: --tune measures on them.

    Raises:
        ValueError: if there are fewer pictures than asked for.
    """
    train, test = (load_dataset('cifar10', cifar, split) for split in ('train', 'test'))
    own = [train.classes.index(name) for name in OWN]
    others = [number for number in range(len(train.classes)) if number not in own]
    rows = {number: np.flatnonzero(train.labels.numpy() == number) for number in own}
    cuts = {number: len(rows[number]) - len(rows[number]) // 10 for number in own}
    if max(images) > min(cuts.values()):
        raise ValueError(
            f'--images {max(images)}: a class has {min(cuts.values())} pictures to draw from; ask for less'
        )
    write_arrays(output / 'source/train.npz', train, others, np.flatnonzero(np.isin(train.labels, others)))
    write_arrays(output / 'test/test.npz', test, own, np.flatnonzero(np.isin(test.labels, own)))
    left = np.concatenate([rows[number][cuts[number] :] for number in own])
    write_arrays(output / 'test/validation.npz', train, own, np.sort(left))
    for seed in seeds:
        drawn = [np.random.default_rng([seed, number]).permutation(rows[number][: cuts[number]]) for number in own]
        for n in images:
            part = np.sort(np.concatenate([numbers[:n] for numbers in drawn]))
            write_arrays(output / f'own-{n}-s{seed}/train.npz', train, own, part)


def write_arrays(file: Path, data: ImageData, classes: Sequence[int], rows: np.ndarray) -> None:
    """Some rows of a data set as NumPy file, labelled among these classes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / 'classes.txt').write_text('\n'.join(data.classes[number] for number in classes) + '\n')
    labels = np.searchsorted(classes, data.labels.numpy()[rows])
    with atomic_file(file) as stream:
        np.savez(stream, image=data.images.numpy()[rows], label=labels)


def named(name: str, *settings: Any) -> str:
    """A name that differs where settings do, so that nothing is taken for what it is not."""
    return f'{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}'


def source_run(start: str, seed: int, max_steps: int | None) -> tuple[str, list[str]]:
    """Name and settings of a network of the eight classes."""
    settings = [*NETWORK, *SOURCE, *LAST, '--loss', LOSSES[start], '--seed', str(seed)]
    settings += ['--max-steps', str(max_steps)] if max_steps else []
    return named(f'{start}-s{seed}', settings), settings


def arm_run(arm: Arm, max_steps: int | None) -> tuple[str, list[str]]:
    """Name and settings of a classifier of the two classes; the name stands for the settings of its source too."""
    batch = min(32, 2 * arm.images)
    epochs = math.ceil(STEPS / (2 * arm.images // batch))
    numbers = {'batch-size': batch, 'epochs': epochs, 'warmup-epochs': epochs / 10, 'val-interval': epochs}
    numbers |= {'max-steps': min(STEPS, max_steps or STEPS), 'lr': arm.lr, 'seed': arm.seed}
    settings = [*NETWORK, *LAST, *(word for name, value in numbers.items() for word in (f'--{name}', str(value)))]
    source = source_run(arm.start, arm.seed, max_steps)[0] if arm.start in LOSSES else ''
    return named(f'{arm.start}-{arm.images}-s{arm.seed}', settings, source), settings


def learn_source(run: Run, source: tuple[str, int]) -> None:
    """Train a network on the eight classes, from a start's name and a seed, or go on."""
    name, settings = source_run(*source, run.max_steps)
    place = ['--data-dir', str(run.output / 'source'), '--output', str(run.output / 'sources'), '--experiment', name]
    run('train', *settings, *place, '--resume', 'auto')


def measure(run: Run, arm: Arm, test: Sequence[str]) -> Path:
    """Train a classifier of the two classes and attack it; returns its record, beside which its verdicts lie."""
    output = run.output
    name, settings = arm_run(arm, run.max_steps)
    record = output / 'records' / f'{named(name, test)}.json'
    flags = record.with_suffix('.npz')
    if record.exists() and flags.exists():  # a kill may come between the two
        return record
    record.parent.mkdir(parents=True, exist_ok=True)
    weights = ['--no-pretrained']
    if arm.start in LOSSES:
        source = output / 'sources' / source_run(arm.start, arm.seed, run.max_steps)[0]
        weights = ['--initial-checkpoint', str(source / 'last.pth.tar')]
    pictures = ['--data-dir', str(output / f'own-{arm.images}-s{arm.seed}')]
    place = ['--output', str(output / 'runs'), '--experiment', name, '--resume', 'auto']
    run('train', 'finetune_folder', *settings, *pictures, *weights, *place)
    data = ['--dataset', 'npz', '--data-dir', str(output / 'test'), *test, '--eps', '8/255', '--no-checks']
    files = ['--flags-file', str(flags), '--results-file', str(record), '--quiet']
    run('evaluate', str(output / 'runs' / name / 'last.pth.tar'), *data, *files)
    return record


def write_rates(path: Path, arms: Sequence[Arm], records: Sequence[Path]) -> None:
    """Write what --tune measured; what was measured with other numbers of pictures stays."""
    results = [RobustnessResult.from_json(record) for record in records]
    rows = [
        {'start': arm.start, 'images': arm.images, 'lr': arm.lr, 'clean_acc': found.clean_acc, 'pgd_acc': found.pgd_acc}
        for arm, found in zip(arms, results, strict=True)
    ]
    sizes = {str(arm.images) for arm in arms}
    old = csv.DictReader(path.read_text().splitlines()) if path.is_file() else ()
    write_table(path, [*(row for row in old if row['images'] not in sizes), *rows])


def read_rates(path: Path, starts: Sequence[tuple[str, int]]) -> dict[tuple[str, int], float]:
    """The rate of each start at each size: the best mean of clean and PGD accuracy, of equal ones the lowest.

    Raises:
        ValueError: if they were not measured.
    """
    best: dict[tuple[str, int], tuple[float, float]] = {}
    for row in csv.DictReader(path.read_text().splitlines()) if path.is_file() else ():
        score = round(
            float(row['clean_acc']) + float(row['pgd_acc']), 6
        )  # a sum of floats would break ties by its dust
        key = row['start'], int(row['images'])
        best[key] = max(best.get(key, (0.0, 0.0)), (score, -float(row['lr'])))
    if missing := [start for start in starts if start not in best]:
        raise ValueError(
            f'{path} has no rate for {missing[0][0]} weights and {missing[0][1]} pictures a class; measure them first: '
            'type the same with --tune'
        )
    return {key: -lr for key, (_, lr) in best.items()}


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def report(output: Path, arms: Sequence[Arm], records: Sequence[Path]) -> None:
    """Write results.csv, findings.md and accuracy.png."""
    rows: list[dict[str, Any]] = []
    clean: dict[tuple[str, int], list[np.ndarray]] = {}
    robust: dict[tuple[str, int], list[np.ndarray]] = {}
    for arm, path in zip(arms, records, strict=True):
        record = RobustnessResult.from_json(path)
        with np.load(path.with_suffix('.npz')) as flags:
            clean.setdefault(arm[:2], []).append(flags['clean_correct'])
            robust.setdefault(arm[:2], []).append(flags['robust'])
            share = float(flags['y'].mean())  # of the second class
        last = read_run(output / 'runs' / Path(record.model).parent.name)[-1]
        row = {**arm._asdict(), 'clean_acc': record.clean_acc, 'pgd_acc': record.pgd_acc, 'apgd_acc': record.apgd_acc}
        rows.append(row | {'n': record.n, 'steps': int(last['step']), 'train_seconds': last['seconds']})
        rows[-1] |= {'commit': record.commit, 'data_sha256': record.data_sha256}
    if len({row['data_sha256'] for row in rows}) > 1:
        raise ValueError(
            f'{output} holds measurements of other test pictures; delete {output / "records"} and its runs'
        )
    if len(commits := {row['commit'] for row in rows}) > 1:
        print(f'the classifiers were measured by several versions of the code: {", ".join(map(str, commits))}')
    write_table(output / 'results.csv', rows)
    sizes = sorted({arm.images for arm in arms})

    def verdicts(of: dict[tuple[str, int], list[np.ndarray]], start: str, n: int) -> np.ndarray:
        return np.stack(of[start, n]).astype(float)

    both = {key: [(a.astype(float) + b) / 2 for a, b in zip(clean[key], robust[key], strict=True)] for key in clean}
    lines = ['| pictures a class | start | clean | APGD-CE + APGD-T | mean of the two |', '|---|---|---|---|---|']
    for n in sizes:
        for start in COLOURS:
            cells = [percent(verdicts(of, start, n)) for of in (clean, robust, both)]
            lines.append(f'| {n} | {start} | {" | ".join(cells)} |')
    lines += ['', lines[0].replace('start', 'difference'), lines[1]]
    for n in sizes:
        for a, b in (('robust', 'ordinary'), ('robust', 'random'), ('ordinary', 'random')):
            cells = [percent(verdicts(of, a, n) - verdicts(of, b, n), sign='+') for of in (clean, robust, both)]
            lines.append(f'| {n} | {a} - {b} | {" | ".join(cells)} |')
    lines += [
        '',
        'Intervals are 95 %, over seeds: each has first networks, pictures and trainings of its own. They take seeds',
    ]
    lines += [
        'for normal draws, and say nothing of other test pictures. One in twenty of no differences looks like one.'
    ]
    (output / 'findings.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    draw(
        output / 'accuracy.png',
        sizes,
        {(s, n): (verdicts(clean, s, n), verdicts(robust, s, n)) for s in COLOURS for n in sizes},
        max(share, 1 - share),
    )


def draw(
    path: Path, sizes: Sequence[int], found: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]], constant: float
) -> None:
    """Clean and robust accuracy over the number of pictures, a line a start; dotted: a constant answer."""
    figure = matplotlib.figure.Figure(figsize=(7, 3), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for axis, title, place in zip(axes, ('clean', 'APGD-CE + APGD-T, Linf 8/255'), (0, 1), strict=True):
        for shift, (start, colour) in enumerate(COLOURS.items()):
            means = np.array([mean_interval(found[start, n][place]) for n in sizes]) * 100
            around = abs(means[:, 1:] - means[:, :1]).T if len(found[start, sizes[0]][place]) >= LEAST_SEEDS else None
            where = np.array(sizes) * 1.04 ** (shift - 1)
            axis.errorbar(where, means[:, 0], around, color=colour, marker='o', capsize=3, label=f'{start} weights')
        axis.axhline(100 * constant, color='black', linewidth=0.7, linestyle=':')
        axis.set(xscale='log', xlabel='pictures a class', title=title, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    axes[0].set_ylabel('accuracy on two classes (%)')
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    sys.exit(main())
