"""The package's main job in a few minutes on two CPU cores, without a download: `make demo`.

Trains a quarter-width `resnet18_pssilu` on scikit-learn's scanned digits twice, once as usual (the control) and once
adversarially, attacks both with the full standard AutoAttack, prints a table, and saves a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch

from .attacks import attacked, cross_entropy_of, pgd
from .command_line import Parser, command, count, say, start_worker
from .data import ImageData, load_dataset
from .evaluation import evaluate
from .models import load_model
from .plots import adversarial_figure
from .results import RobustnessResult
from .threat_model import ThreatModel
from .training import Recipe, build, fit

MARK = '.demo'
ROBUST = Recipe(
    model='resnet18_pssilu',
    model_kwargs={'width': 8},  # of 64: full AutoAttack on the full width is too slow for a demo on two cores
    dataset='digits',
    val_size=100,
    val_interval=4,
    crop_padding=2,
    hflip=0.0,
    eps=0.1,
    steps=2,
    epochs=8,
    batch_size=64,
    warmup_epochs=2.0,
    amp=True,
    log_interval=21,
    checkpoint_hist=1,
)
CONTROL = replace(ROBUST, loss='clean', val_interval=8, lr=0.05)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train both, attack both, print the table, save the picture."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--output', default='output/demo', help='folder for runs, results and picture (default: %(default)s)'
    )
    parser.add_argument('-n', type=count, default=6, help='held-out images to attack (default: %(default)s)')
    parser.add_argument('--epochs', type=count, help='train both models for so many epochs')
    args = parser.parse_args(argv)
    started, output = time.perf_counter(), Path(args.output)
    claim(output)
    test = load_dataset('digits', split='test').first(args.n)
    results = train_and_attack(output, args.n, args.epochs)
    torch.set_num_threads(1)  # threads that wait for each other on six small images take minutes on a busy machine
    models = {name: load_model(output / name.split()[0]) for name in results}
    picture = output / 'demo.png'
    draw(picture, models, test, ROBUST.threat_model)
    print(f'\nresnet18_pssilu (width 8 of 64), {len(test)} held-out digits, {ROBUST.threat_model}, full AutoAttack:\n')
    print(f'{"":22s}{"clean":>8s}{"PGD-10":>8s}{"AutoAttack":>12s}')
    for name, r in results.items():
        print(f'{name:22s}{r.clean_acc:8.1%}{r.pgd_acc:8.1%}{r.autoattack_acc:12.1%}')
    print(f'\npicture: {picture}   records: {output}/*.json   {time.perf_counter() - started:.0f} s')
    print(json.dumps({name: r.autoattack_acc for name, r in results.items()}))
    return 0


def train_and_attack(output: Path, n: int, epochs: int | None) -> dict[str, RobustnessResult]:
    """Both networks at once, a process with one thread each, which write logs; the last lines go to stderr."""
    recipes = {'standard training': CONTROL, 'robust training': ROBUST}
    logs = {name: output / f'{name.split()[0]}.log' for name in recipes}
    say(f'one process each, one core: {" and ".join(map(str, logs.values()))}')
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=start_worker, initargs=(1,)) as pool:
        jobs = {name: pool.submit(one, name, recipe, output, n, epochs) for name, recipe in recipes.items()}
        try:
            while wait(jobs.values(), timeout=10).not_done:
                for name, log in logs.items():
                    lines = log.read_text().splitlines() if log.is_file() else []
                    say(f'{name}: {lines[-1] if lines else "starts"}')
                if any(job.done() and job.exception() for job in jobs.values()):
                    break
            return {name: job.result() for name, job in jobs.items()}
        except BrokenProcessPool as error:
            raise ChildProcessError('a process was killed, perhaps for memory; type the same again') from error
        finally:
            pool.shutdown(cancel_futures=True)


def one(name: str, recipe: Recipe, output: Path, n: int, epochs: int | None) -> RobustnessResult:
    """Train a network and attack it; what is said goes to its log."""
    experiment, epochs = name.split()[0], epochs or recipe.epochs
    warmup = min(recipe.warmup_epochs, epochs / 4)
    recipe = replace(recipe, output=str(output), experiment=experiment, epochs=epochs, warmup_epochs=warmup)
    shutil.rmtree(output / experiment, ignore_errors=True)  # of the demo before
    with open(output / f'{experiment}.log', 'w', buffering=1) as log, contextlib.redirect_stderr(log):
        logging.basicConfig(level=logging.INFO, format='%(message)s', stream=log, force=True)
        fit(build(recipe))
        model = load_model(output / experiment).to(memory_format=torch.channels_last)  # a third faster here
        test = load_dataset('digits', split='test').first(n)
        result, _ = evaluate(model, test, recipe.threat_model, name=name, progress=logging.info)
    result.to_json(output / f'{experiment}.json')
    return result


def claim(output: Path) -> None:
    """Mark a new folder as the demo's own; what it makes there replaces what the demo before made.

    Raises:
        FileExistsError: for a folder that holds something else.
    """
    if output.exists() and not (output / MARK).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f'{output} is not of a demo, and stays; name a new folder with --output, or delete it')
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text('timm-robust demo replaces what is here.\n')


def draw(path: Path, models: dict[str, torch.nn.Module], data: ImageData, threat_model: ThreatModel) -> None:
    """The first six images under PGD-20 on each model, whether it succeeds or not."""
    x, y = data.pixels(slice(0, 6)), data.labels[:6]
    attempts = {}
    for name, model in models.items():
        with attacked(model):
            x_adv = pgd(cross_entropy_of(model, y), x, threat_model, steps=20, step_size=threat_model.eps / 8)
            with torch.no_grad():
                attempts[name.removesuffix(' training')] = x_adv, model(x_adv).argmax(1)
    adversarial_figure(path, x, y, attempts, data.classes, threat_model)


if __name__ == '__main__':
    sys.exit(main())
