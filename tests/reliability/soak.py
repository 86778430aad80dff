"""How much it takes: `make soak` kills a training again and again, fuzzes every reader, trains on, and prints a table.

    python tests/reliability/soak.py --kills 50 --count 250 --minutes 60

Killed: a small training gets SIGKILL at random moments, in saves too, and is resumed each time; its final weights must
be those of an undisturbed run, bit for bit; so must those of one that two processes feed with JPEGs from the disk. An
evaluation likewise: its verdicts. Faults: what the tests of PROVOKED provoke. Fuzzed: see fuzz.py. Soaked: a training
and, in a process beside it, AutoAttack run on, and memory, open files and the log must not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from timm_robust.data import load_dataset
from timm_robust.evaluation.autoattack import autoattack
from timm_robust.evaluation.search_network import search_model
from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.models.load import load_model
from timm_robust.pixels import pixel_input
from timm_robust.threat_model import ThreatModel

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TRAINING = [
    '--model', 'resnet18_pssilu', '--model-kwargs', 'width=4', '--eps', '0.1', '--steps', '1', '--eval-steps', '1',
    '--model-ema', '--model-ema-decay', '0.9', '--log-interval', '1', '--save-interval', '2', '--experiment', 'run',
]  # fmt: skip
DIGITS = ['--dataset', 'digits', '--val-size', '30', '--batch-size', '100', '--hflip', '0', '--crop-padding', '1']
STREAM = ['--dataset', 'folder', '--val-size', '20', '--batch-size', '20', '--img-size', '24', '--workers', '2']
PROVOKED = [
    HERE / 'test_faults.py',
    HERE / 'test_hostile.py',
    f'{HERE.parent}/test_kill.py::test_a_kill_before_any_rename_link_or_deletion_loses_nothing',
    f'{HERE.parent}/test_kill.py::test_a_polite_signal_saves_says_how_to_go_on_and_exits',
    f'{HERE.parent}/test_command_lines.py::test_bad_input_is_one_line_and_status_2',
]


def start(folder: Path, *arguments: str, data: Sequence[str] = DIGITS, **options) -> subprocess.Popen:
    """The training script as its user starts it."""
    script = str(ROOT / 'train/adv_train.py')
    command = [sys.executable, script, *TRAINING, *data, '--output', str(folder), *arguments]
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run ended with."""
    state = load_checkpoint(folder / 'run/last.pth.tar')
    return {f'{part}.{k}': v for part in ('state_dict', 'state_dict_ema') for k, v in state[part].items()}


def evaluation(folder: Path, run: Path, **options) -> subprocess.Popen:
    """The evaluation as its user starts it; the verdicts go to a file."""
    settings = ['--dataset', 'digits', '-n', '24', '--eps', '0.1', '--batch-size', '4', '--state-dir', str(folder)]
    command = [sys.executable, '-m', 'timm_robust.evaluate', str(run), *settings, '--flags-file', f'{folder}.npz']
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True, **options)


def verdicts(folder: Path) -> dict[str, np.ndarray]:
    """What an evaluation ended with."""
    with np.load(f'{folder}.npz') as file:
        return dict(file)


def at_work(process: subprocess.Popen, log: Path, sign: str) -> float:
    """Seconds until a process has written its first sign of work, or has ended."""
    began = time.perf_counter()
    while process.poll() is None and sign not in log.read_text():
        time.sleep(0.02)
    return time.perf_counter() - began


def interrupted(
    begin: Callable[..., subprocess.Popen], sign: str, whole: Path, broken: Path, kills: int, seed: int
) -> int:
    """Run a job undisturbed, then kill it at random moments and begin it again; how often it was killed.

    Three in four are killed while they work, so early that the job outlives all kills; the others as they start.
    """
    rng, log = random.Random(seed), whole.with_suffix('.log')
    with open(log, 'w') as file:
        process = begin(whole, stderr=file, stdout=file)
        starting = at_work(process, log, sign)
        began = time.perf_counter()
        assert process.wait() == 0, log.read_text()
        work = time.perf_counter() - began
    for hits in range(kills + 1):
        with open(log, 'w') as file:
            process = begin(broken, stderr=file, stdout=file)
            patience = None if hits == kills else rng.uniform(0, starting)
            if patience and rng.random() < 0.75:
                at_work(process, log, sign)
                patience = rng.uniform(0, 2 * work / kills)
            try:
                assert process.wait(timeout=patience) == 0, log.read_text()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return hits


def write_pictures(folder: Path) -> Path:
    """A folder of 200 JPEGs of noise, 24 x 24, in five classes."""
    rng = np.random.default_rng(0)
    for number in range(200):
        path = folder / f'c{number % 5}' / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    return folder


def killed_training(folder: Path, data: Sequence[str], kills: int, seed: int) -> tuple[dict[str, int], Path]:
    """Kill a training so often: what of it was lost, and the folder of the undisturbed run."""
    epochs = ['--epochs', str(max(4, kills // 2)), '--resume', 'auto']
    whole, broken = folder / 'whole', folder / 'broken'
    begin = lambda place, **files: start(place, *epochs, data=data, **files)  # noqa: E731
    hits = interrupted(begin, '  step ', whole, broken, kills, seed)
    a, b = weights(whole), weights(broken)
    same = a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
    return {'tried': hits, 'lost': 0 if same else hits}, whole / 'run'


def killed(kills: int, seed: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Kill two trainings `kills` times and an evaluation half as often; whether they end as undisturbed ones do."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ('digits', 'stream'):
            (folder / kind).mkdir()
        digits, run = killed_training(folder / 'digits', DIGITS, kills, seed)
        yield 'SIGKILL of a training, then the same weights', digits
        stream = [*STREAM, '--data-dir', str(write_pictures(folder / 'pictures'))]
        streamed, _ = killed_training(folder / 'stream', stream, kills, seed + 1)
        yield 'SIGKILL of a training from the disk, then the same weights', streamed
        states = Path(name) / 'state', Path(name) / 'broken-state'
        stops = interrupted(partial(evaluation, run=run), 'PGD-10', *states, kills // 2, seed)
        ours, theirs = (verdicts(state) for state in states)
        equal = ours.keys() == theirs.keys() and all((value == theirs[key]).all() for key, value in ours.items())
        yield 'SIGKILL of an evaluation, then the same verdicts', {'tried': stops, 'lost': 0 if equal else stops}


def fuzzed(count: int, seed: int) -> Iterator[tuple[str, dict]]:
    """What fuzz.py finds, kind by kind, each in a process of its own."""
    for kind in ('checkpoint', 'safetensors', 'config', 'recipe', 'npz', 'parquet', 'result', 'releases'):
        command = [sys.executable, str(HERE / 'fuzz.py'), '--kind', kind, '--count', str(count), '--seed', str(seed)]
        run = subprocess.run(command, capture_output=True, text=True)
        lines = run.stdout.splitlines()
        found = json.loads(lines[-1]) if run.returncode == 0 else {}
        yield from found.items() or [(kind, {'read': 0, 'refused': 0, 'crashed': [run.stderr]})]


def faults() -> Iterator[tuple[str, dict[str, int]]]:
    """What the tests of PROVOKED find, test by test; those that this machine cannot provoke are left out."""
    for tests in PROVOKED:
        with tempfile.TemporaryDirectory() as name:
            report = Path(name) / 'report.xml'
            command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', str(tests)]
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL)
            found: dict[str, dict[str, int]] = {}
            for case in ElementTree.parse(report).iter('testcase'):
                test = case.get('name').partition('[')[0].removeprefix('test_').replace('_', ' ')
                row = found.setdefault(test, {'tried': 0, 'lost': 0})
                row['tried'] += case.find('skipped') is None
                row['lost'] += case.find('failure') is not None or case.find('error') is not None
        yield from ((test, row) for test, row in found.items() if row['tried'])


def attack_on(folder: Path, minutes: float) -> None:
    """The soak's second process: the standard AutoAttack on a trained network, with one seed after another."""
    model = pixel_input(load_model(str(folder))).eval()
    data = load_dataset('digits', None, 'test').first(20)
    ends, seed = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < ends:
        search = search_model(model, data.pixels(), len(data))
        found = autoattack(model, data.pixels(), data.labels, ThreatModel('Linf', 0.1), seed=seed, search=search)
        print(f'seed {seed}: {int(found.robust.sum())} of {len(data)} resist', flush=True)
        seed += 1


def watch(processes: dict[str, subprocess.Popen], minutes: float) -> dict[str, dict[str, Any]]:
    """By how much the memory and the open files of each process grew after a tenth of the time."""
    began, samples = time.perf_counter(), {name: list[tuple[float, int, int]]() for name in processes}
    while any(process.poll() is None for process in processes.values()):
        time.sleep(max(0.5, 0.6 * minutes))
        for name, process in processes.items():
            try:
                pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
                files = len(os.listdir(f'/proc/{process.pid}/fd'))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if pages:
                samples[name].append((time.perf_counter() - began, pages, files))
    found = {}
    for name, process in processes.items():
        assert process.returncode == 0, f'{name} ended with {process.returncode}'
        settled = [sample for sample in samples[name] if sample[0] > 6 * minutes] or samples[name]
        (_, pages, files), (_, last, open_now) = settled[0], settled[-1]
        found[name] = {'memory': last / pages - 1, 'files': open_now - files}
    return found


def soaked(minutes: float) -> dict[str, dict[str, Any]]:
    """Train, and beside it attack, for so long: what was done, and what grew."""
    quiet = {'stderr': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as name, open(Path(name) / 'log', 'w') as log:
        folder, settings = Path(name), ['--budget', f'{60 * minutes:.0f}s', '--epochs', '100000']
        assert start(folder / 'before', '--epochs', '4', **quiet).wait() == 0
        attack = [sys.executable, __file__, '--attack', str(folder / 'before/run'), '--minutes', str(minutes)]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        with open(folder / 'attacks', 'w') as attacks:
            training = start(folder, *settings, stderr=log, stdout=log)
            attacking = subprocess.Popen(attack, env=environment, stdout=attacks)
            found = watch({'training': training, 'AutoAttack': attacking}, minutes)
        epochs = len((folder / 'run/summary.csv').read_text().splitlines()) - 1
        found['training']['done'] = f'{epochs} epochs, {(folder / "log").stat().st_size / epochs:.0f} bytes of log each'
        found['AutoAttack']['done'] = f'{len((folder / "attacks").read_text().splitlines())} attacks on 20 images'
        return found


def main() -> int:
    """Print the tables; 0 if nothing was lost, nothing crashed and memory grew by 2 % at most."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--count', type=int, default=250)
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--attack', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attack:
        attack_on(args.attack, args.minutes)
        return 0
    print('| fault | tried | survived | lost |\n|---|---|---|---|', flush=True)
    provoked: dict[str, dict[str, int]] = {}
    for part in (killed(args.kills, args.seed) if args.kills else [], faults()):
        for name, row in part:
            provoked[name] = row
            print(f'| {name} | {row["tried"]} | {row["tried"] - row["lost"]} | {row["lost"]} |', flush=True)
    print('\n| damaged and hostile files | tried | read | refused | crashed |\n|---|---|---|---|---|', flush=True)
    fuzz = {}
    for kind, found in fuzzed(args.count, args.seed) if args.count else []:
        fuzz[kind] = found
        tried = found['read'] + found['refused'] + len(found['crashed'])
        print(f'| {kind} | {tried} | {found["read"]} | {found["refused"]} | {len(found["crashed"])} |', flush=True)
    print('\n| soak | minutes | done | memory grew by | open files grew by |\n|---|---|---|---|---|', flush=True)
    soak = soaked(args.minutes) if args.minutes else {}
    for name, row in soak.items():
        print(f'| {name} | {args.minutes:g} | {row["done"]} | {row["memory"]:+.2%} | {row["files"]} |')
    print('\n' + json.dumps({'faults': provoked, 'files': fuzz, 'soak': soak}))
    fine = not any(row['crashed'] for row in fuzz.values()) and not any(row['lost'] for row in provoked.values())
    flat = all(row['memory'] <= 0.02 and row['files'] <= 0 for row in soak.values())
    return 0 if fine and flat else 1


if __name__ == '__main__':
    sys.exit(main())
