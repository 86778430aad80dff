"""How much it takes: `make soak` kills a training again and again, fuzzes every reader, trains on, and prints a table.

    python tests/reliability/soak.py --kills 50 --count 250 --minutes 60

Killed: a small training gets SIGKILL at random moments, in saves too, and is resumed each time; its final weights must
be those of an undisturbed run, bit for bit. Faults: see test_faults.py. Fuzzed: see fuzz.py. Soaked: training and
attacks run on, and memory, open files and the log must not grow.
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
from pathlib import Path
from xml.etree import ElementTree

import torch

from timm_robust.checkpoint import load_checkpoint

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TRAINING = [
    '--dataset', 'digits', '--model', 'resnet18_pssilu', '--model-kwargs', 'width=4', '--eps', '0.1', '--steps', '1',
    '--eval-steps', '1', '--val-size', '30', '--hflip', '0', '--crop-padding', '1', '--batch-size', '100',
    '--model-ema', '--model-ema-decay', '0.9', '--log-interval', '1', '--save-interval', '2', '--experiment', 'run',
]  # fmt: skip


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    """The training script as its user starts it."""
    command = [sys.executable, str(ROOT / 'train/adv_train.py'), *TRAINING, '--output', str(folder), *arguments]
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run ended with."""
    state = load_checkpoint(folder / 'run/last.pth.tar')
    return {f'{part}.{k}': v for part in ('state_dict', 'state_dict_ema') for k, v in state[part].items()}


def killed(kills: int, seed: int) -> dict[str, object]:
    """Kill a training `kills` times, resuming each time, and compare its end with an undisturbed run's."""
    rng, quiet = random.Random(seed), {'stderr': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL}
    epochs = ['--epochs', str(max(2, kills // 4))]
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / 'whole', Path(name) / 'broken'
        began = time.perf_counter()
        assert start(whole, *epochs, **quiet).wait() == 0
        seconds, hits = time.perf_counter() - began, 0
        while True:
            process = start(broken, *epochs, '--resume', 'auto', **quiet)
            try:
                process.wait(timeout=rng.uniform(4.0, 4.0 + 3 * seconds / kills) if hits < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                hits += 1
                continue
            break
        assert process.returncode == 0, process.returncode
        a, b = weights(whole), weights(broken)
        equal = a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
    return {'kills': hits, 'same bits at the end': equal}


def fuzzed(count: int, seed: int) -> dict[str, dict]:
    """What fuzz.py finds, kind by kind, each in a process of its own."""
    found = {}
    for kind in ('checkpoint', 'safetensors', 'config', 'recipe', 'npz', 'parquet', 'result', 'releases'):
        command = [sys.executable, str(HERE / 'fuzz.py'), '--kind', kind, '--count', str(count), '--seed', str(seed)]
        run = subprocess.run(command, capture_output=True, text=True)
        lines = run.stdout.splitlines()
        found |= (
            json.loads(lines[-1]) if run.returncode == 0 else {kind: {'read': 0, 'refused': 0, 'crashed': [run.stderr]}}
        )
    return found


def faults() -> dict[str, dict[str, int]]:
    """What test_faults.py finds, test by test; those that this machine cannot provoke are left out."""
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / 'report.xml'
        command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', str(HERE / 'test_faults.py')]
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL)
        found: dict[str, dict[str, int]] = {}
        for case in ElementTree.parse(report).iter('testcase'):
            row = found.setdefault(case.get('name').partition('[')[0][5:].replace('_', ' '), {'tried': 0, 'lost': 0})
            row['tried'] += case.find('skipped') is None
            row['lost'] += case.find('failure') is not None or case.find('error') is not None
    return {name: row for name, row in found.items() if row['tried']}


def soaked(minutes: float) -> dict[str, object]:
    """Train for so long; memory and open files at a tenth of the time and at the end, and the size of the log."""
    with tempfile.TemporaryDirectory() as name, open(Path(name) / 'log', 'w') as log:
        process = start(Path(name), '--budget', f'{60 * minutes:.0f}s', '--epochs', '100000', stderr=log, stdout=log)
        began, samples = time.perf_counter(), []
        while process.poll() is None:
            time.sleep(max(0.5, 0.6 * minutes))
            try:
                pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
                samples.append((time.perf_counter() - began, pages, len(os.listdir(f'/proc/{process.pid}/fd'))))
            except (FileNotFoundError, ProcessLookupError, IndexError):
                break
        assert process.returncode in (0, None) and process.wait() == 0
        size = (Path(name) / 'log').stat().st_size
        rows = len((Path(name) / 'run/summary.csv').read_text().splitlines()) - 1
    early = [sample for sample in samples if sample[0] > 6 * minutes] or samples
    growth = early[-1][1] / early[0][1] - 1
    return {
        'minutes': minutes,
        'epochs': rows,
        'memory grew by': f'{growth:+.2%}',
        'open files grew by': early[-1][2] - early[0][2],
        'log bytes an epoch': round(size / max(rows, 1)),
    }


def main() -> int:
    """Print the table; 0 if nothing was lost, nothing crashed and memory stayed within 2 %."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--count', type=int, default=250)
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    kills = killed(args.kills, args.seed) if args.kills else None
    fuzz = fuzzed(args.count, args.seed) if args.count else {}
    soak = soaked(args.minutes) if args.minutes else None
    provoked = faults()
    print('| fault | tried | survived | lost |\n|---|---|---|---|')
    if kills:
        same = bool(kills['same bits at the end'])
        print(
            f'| SIGKILL of a training | {kills["kills"]} | {kills["kills"] if same else "?"} | {0 if same else "yes"} |'
        )
    for name, row in provoked.items():
        print(f'| {name} | {row["tried"]} | {row["tried"] - row["lost"]} | {row["lost"]} |')
    print('\n| damaged and hostile files | tried | read | refused | crashed |\n|---|---|---|---|---|')
    for kind, found in fuzz.items():
        tried = found['read'] + found['refused'] + len(found['crashed'])
        print(f'| {kind} | {tried} | {found["read"]} | {found["refused"]} | {len(found["crashed"])} |')
    print('\n' + json.dumps({'killed': kills, 'soaked': soak, 'crashes': {k: v['crashed'] for k, v in fuzz.items()}}))
    flat = soak is None or abs(float(str(soak['memory grew by']).rstrip('%'))) <= 2
    fine = kills is None or kills['same bits at the end']
    fine = fine and not any(v['crashed'] for v in fuzz.values()) and not any(v['lost'] for v in provoked.values())
    return 0 if fine and flat else 1


if __name__ == '__main__':
    sys.exit(main())
