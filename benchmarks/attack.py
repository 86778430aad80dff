#!/usr/bin/env python3
"""Standard AutoAttack: ours beside pyautoattack's own loop on the same model and images, seconds of each attack.

    python benchmarks/attack.py --model MODEL --data-dir DIR -n 64    # MODEL: a checkpoint, a folder or a name
    python benchmarks/attack.py --train-steps 300 --width 16 -n 16    # trains one on scikit-learn's digits first

Each side runs in a process of its own, and they take turns; reported are the median of the repeats, the smallest and
the largest, and the images on which the two disagree. Ours is what `timm-robust evaluate` does: it searches
on a folded copy of the network and confirms on the network; the variant `model` searches on the network itself. The
peer is pyautoattack on the textbook network, the formula written out; `peer, our network` is it on ours, so that it
profits from our PSSiLU. Only images that survive cost time: an untrained network's
are gone at once, hence --train-steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import ACTIVATIONS, Peer
from torch import nn
from turns import RESULTS, Case, Measure, output_folder, serve, spread, take_turns, write

from timm_robust.command_line import Parser, command, count, keep_freed_memory, whole_number
from timm_robust.data import DATASETS, load_dataset
from timm_robust.evaluation.autoattack import autoattack, predict
from timm_robust.evaluation.runner import VERSIONS, upstream
from timm_robust.evaluation.search_network import search_model
from timm_robust.models.load import load_model
from timm_robust.pixels import pixel_input
from timm_robust.provenance import public_name
from timm_robust.threat_model import ThreatModel, parse_eps
from timm_robust.training.builder import build
from timm_robust.training.loop import fit
from timm_robust.training.recipe import Recipe

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
ATTACKS = ('apgd-ce', 'apgd-t', 'fab-t', 'square')
PEERS = ('peer', 'peer, our network')


class Clock(logging.Handler):
    """Seconds of each attack, from the lines that either side prints when one has ended."""

    def __init__(self, marks: tuple[str, str]) -> None:
        """Start now; a line that holds marks[0] + attack + marks[1] ends that attack."""
        super().__init__()
        self.marks, self.seconds, self.last = marks, dict[str, float](), time.perf_counter()

    def __call__(self, line: str) -> None:
        """Note the end of an attack, if that is what the line says."""
        before, after = self.marks
        for attack in ATTACKS:
            if f'{before}{attack}{after}' in line.lower():
                now = time.perf_counter()
                self.seconds[attack], self.last = now - self.last, now

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the peer's logger."""
        self(record.getMessage())


def peer(net: nn.Module, x: torch.Tensor, y: torch.Tensor, case: Case) -> tuple[torch.Tensor, dict[str, float]]:
    """Which images are robust, and each attack's seconds, as pyautoattack runs it."""
    eps = parse_eps(case['eps'])
    adversary = upstream().AutoAttack(net, norm='Linf', eps=eps, seed=0, device=DEVICE, version='standard')
    adversary.attacks_to_run = list(case['attacks'])
    adversary.logger = logging.Logger('peer')  # its own is silent; this one takes all levels
    clock = Clock(('robust accuracy after ', ':'))
    adversary.logger.addHandler(clock)
    _, labels = adversary.run_standard_evaluation(x, y, batch_size=case['batch_size'])
    return labels == y, clock.seconds


def ours(net: nn.Module, x: torch.Tensor, y: torch.Tensor, case: Case) -> tuple[torch.Tensor, dict[str, float]]:
    """The same, as `evaluate` does it."""
    clock = Clock(('', ': '))
    search = search_model(net, x[:16], len(x)) if case['side'] == 'ours folded' else None
    result = autoattack(
        net,
        x,
        y,
        ThreatModel('Linf', case['eps']),
        version='benchmark',
        batch_size=case['batch_size'],
        seed=0,
        progress=lambda line: clock(line) if line.endswith('images still robust') else None,
        search=search,
    )
    return result.robust, clock.seconds


def measure(case: Case) -> Measure:
    """What a case's process does: at the first turn it warms up, then it attacks all images at each."""
    net = network(case)
    with np.load(case['images']) as file:
        x, y = (torch.from_numpy(file[key]).to(DEVICE) for key in ('x', 'y'))
    attack: Callable[..., tuple[torch.Tensor, dict[str, float]]] = peer
    if case['side'] == 'peer':
        net = textbook(net)
    if case['side'].startswith('ours'):
        keep_freed_memory()
        VERSIONS['benchmark'] = tuple(case['attacks'])
        attack = ours
    warm: list[bool] = []

    def once() -> dict[str, Any]:
        if not warm:
            leaf = x[: case['batch_size']].clone().requires_grad_()
            torch.autograd.grad(net(leaf).sum(), leaf)
            warm.append(True)
            return {}
        started = time.perf_counter()
        robust, seconds = attack(net, x, y, case)
        total = time.perf_counter() - started
        return {'seconds': {'total': total, **seconds}, 'robust': robust.int().tolist()}

    return once


def network(case: Case) -> nn.Module:
    """The model, the same in each process, as one that takes pixels in [0, 1]."""
    torch.manual_seed(0)
    return pixel_input(load_model(case['model'], device=DEVICE, **case['model_kwargs'])).eval()


def textbook(net: nn.Module) -> nn.Module:
    """The network as one writes it without a library, with the same weights; itself for other kinds."""
    arch, stem = dict(getattr(net, 'pretrained_cfg', {})).get('architecture', ''), getattr(net, 'conv1', None)
    if arch not in [f'{family}_{act}' for family in ('resnet18', 'wrn28_10') for act in ACTIVATIONS]:
        return net
    other = Peer(arch, stem.out_channels if arch.startswith('resnet18') else None).to(DEVICE).eval()
    other.load_state_dict(net.state_dict())
    return other


def train(args: argparse.Namespace, folder: Path) -> Path:
    """A model trained for --train-steps steps, with PGD-2; the folder to load it from."""
    recipe = Recipe(
        model=args.model,
        model_kwargs={'width': args.width} if args.width else {},
        dataset=args.dataset,
        data_dir=args.data_dir,
        val_size=20,
        val_interval=10**6,
        crop_padding=2,
        hflip=0.0,
        eps=args.eps,
        steps=2,
        batch_size=64,
        lr=0.05,
        max_steps=args.train_steps,
        device=DEVICE.type,
        output=str(folder),
        experiment='model',
    )
    print(f'training {args.model} for {args.train_steps} steps', file=sys.stderr, flush=True)
    fit(build(recipe))
    return folder / 'model'


def images(args: argparse.Namespace, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n test images and their labels; random images with the model's own predictions without a data set."""
    if args.dataset:
        data = load_dataset(args.dataset, args.data_dir, 'test').first(args.n)
        return data.pixels(), data.labels
    x = torch.rand(args.n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x, predict(network(case), x, args.batch_size)


def report(found: dict[str, list[dict[str, Any]]], attacks: Sequence[str], n: int) -> dict[str, Any]:
    """Print a table; returns its rows. Times are seconds of all images, ratios those of the same turn."""
    rows: dict[str, Any] = {}
    heads = ''.join(f'{name:>12s}' for name in (*attacks, 'total'))
    print(f'\n{"seconds":26s}{heads}{"min to max":>18s}{"images/s":>10s}{"x peer":>8s}{"robust":>8s}{"differ":>8s}')
    for name, turns in found.items():
        row: dict[str, Any] = {'seconds': {}}
        for attack in (*attacks, 'total'):  # an attack that no image was left for took no time
            row['seconds'][attack] = spread([one['seconds'].get(attack, 0.0) for one in turns])
        total = row['seconds']['total']
        row['images_per_s'] = n / total['median']
        pairs = list(zip(turns, next(iter(found.values())), strict=True))
        row['x_peer'] = spread([other['seconds']['total'] / one['seconds']['total'] for one, other in pairs])['median']
        row['robust'] = [sum(one['robust']) for one in turns]
        row['differing'] = [differing(one['robust'], other['robust']) for one, other in pairs]
        rows[name] = row
        cells = ''.join(f'{row["seconds"][attack]["median"]:12.2f}' for attack in (*attacks, 'total'))
        between = f'{total["min"]:.2f} to {total["max"]:.2f}'
        counts = f'{row["images_per_s"]:10.3f}{row["x_peer"]:8.2f}{row["robust"][0]:8d}{max(row["differing"]):8d}'
        print(f'{name:26s}{cells}{between:>18s}{counts}')
    return rows


def differing(flags: Sequence[int], others: Sequence[int]) -> int:
    """Images whose verdicts differ."""
    return sum(a != b for a, b in zip(flags, others, strict=True))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours and the peer in turns; the record."""
    case: Case = {'model': args.model, 'model_kwargs': {'width': args.width} if args.width else {}}
    if args.train_steps:
        case = {'model': str(train(args, folder)), 'model_kwargs': {}}
    x, y = images(args, case)
    np.savez(folder / 'images.npz', x=x.numpy(), y=y.numpy())
    case |= {'images': str(folder / 'images.npz'), 'eps': args.eps, 'attacks': args.attacks}
    case |= {'batch_size': args.batch_size}
    sides = [*args.peers, *(f'ours {variant}' for variant in args.variants)]
    found = take_turns(__file__, {side: case | {'side': side} for side in sides}, args.repeats)
    about = {'model': public_name(args.model), 'width': args.width, 'train_steps': args.train_steps}
    about |= {'dataset': args.dataset or 'random', 'n': args.n, 'norm': 'Linf', 'eps': args.eps}
    about |= {'batch_size': args.batch_size, 'repeats': args.repeats}
    return about | {'rows': report(found, args.attacks, args.n)}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', default='resnet18_pssilu', help='a registry name, a checkpoint or a folder')
    add('--width', type=count, help="width of a registry's ResNet-18, 64 if not given")
    add(
        '--train-steps', type=whole_number(0), default=0, help='first train the model, adversarially, for so many steps'
    )
    add('--dataset', choices=DATASETS, help='default: cifar10 with --data-dir, else digits to train on, else random')
    add('--data-dir', help='folder of the data set')
    add('-n', type=count, default=32, help='images, the first of the test split')
    add('--eps', default='8/255', help='radius of the Linf ball, in pixels on the [0, 1] scale')
    add('--attacks', nargs='+', default=list(ATTACKS), choices=ATTACKS)
    add('--peers', nargs='+', default=list(PEERS), choices=PEERS, help='the first is what ours is set against')
    add('--variants', nargs='+', default=['folded'], choices=('folded', 'model'), help='what ours searches on')
    add('--batch-size', type=count, default=250)
    add('--repeats', type=count, default=1)
    add('--toy', action='store_true', help='a tiny network, few images, the first attack alone: to see that it runs')
    add('--output', type=output_folder, default=str(RESULTS), help="folder for the JSON; '' for none")
    add('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve(json.loads(args.worker), measure)
        return 0
    if args.toy:
        args.width, args.n, args.train_steps, args.attacks = 8, 8, 30, ['apgd-ce']
    if not args.dataset and (args.data_dir or args.train_steps):
        args.dataset = 'cifar10' if args.data_dir else 'digits'
    if not ThreatModel('Linf', args.eps).eps:
        raise ValueError(f'eps {args.eps!r} leaves the attacks no room; allowed: > 0')
    upstream()  # if it is missing, say so now
    with tempfile.TemporaryDirectory() as folder:
        record = compare(args, Path(folder))
    write('attack', record, args.output, DEVICE)
    return 0


if __name__ == '__main__':
    sys.exit(main())
