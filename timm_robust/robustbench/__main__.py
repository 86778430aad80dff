"""The one door to RobustBench: load, benchmark, convert, compare, submit.

    pip install -e '.[robustbench]' && pip install --no-deps robustbench==1.1.1
    timm-robust robustbench benchmark NAME --data-dir DIR -n 200
    timm-robust robustbench convert Dai2021Parameterizing FILE.pt OUT
    timm-robust robustbench compare NAME

How its package is imported beside the timm of today: package.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import timm
import torch

from ..command_line import Parser, command, count, keep_freed_memory, say, whole_number
from ..data import load_dataset
from ..files import read_yaml
from ..models import load_model as load_any
from ..pixels import pixel_input
from ..release import RESULTS
from ..weights import CARDS
from .conversion import convert, fetch
from .measure import benchmark, corruptions
from .report import compare, draw, is_measured
from .submit import submission
from .zoo import LINF


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 2 for bad input."""
    args = _parser().parse_args(argv)
    keep_freed_memory()
    answer = args.run(args)
    if answer is not None:
        print(json.dumps(answer, indent=2))
    return 0


def _run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.name)
    if not path.exists() and timm.is_model(args.name) and '.' not in args.name:
        raise ValueError(f'{args.name} is a network without weights; name MODEL.TAG, a checkpoint file or a folder')
    model = pixel_input(load_any(path if path.exists() else args.name, device=args.device))
    if args.threat_model == 'corruptions':
        if args.dataset != 'cifar10' or args.eps is not None or (args.n or 0) > 10_000:
            raise ValueError(
                'corruptions are those of CIFAR-10-C, 10,000 images; leave --dataset, --eps and larger -n out'
            )
        options = {'n': args.n or 10_000, 'batch_size': args.batch_size, 'device': args.device}
        with redirect_stdout(sys.stderr):  # RobustBench prints its progress
            return corruptions(model, args.data_dir, **options)
    data = load_dataset(args.dataset, args.data_dir, 'test')
    options = {key: getattr(args, key) for key in ('eps', 'n', 'batch_size', 'seed', 'device')}
    with redirect_stdout(sys.stderr):
        result = benchmark(model, data, norm=args.threat_model, **options)
    return result | {'robust': result['robust'].int().tolist()}


def _run_convert(args: argparse.Namespace) -> dict[str, Any]:
    return {'written': str(convert(args.entry, args.source, args.target))}


def _run_fetch(args: argparse.Namespace) -> dict[str, Any]:
    with redirect_stdout(sys.stderr):
        return {'written': str(fetch(args.entry, args.target))}


def _run_compare(args: argparse.Namespace) -> None:
    folders = [args.cards / name for name in args.names]
    if not folders:
        staged = sorted(path.parent for path in args.cards.glob(f'*/{RESULTS}'))
        if not staged:
            raise ValueError(f'{args.cards} holds no staged model; type: timm-robust stage RUN NAME')
        folders = [folder for folder in staged if is_measured(folder)] or staged
        for folder in staged:
            if folder not in folders:
                say(f'{folder.name} is left out: it has no measurement with AutoAttack or its APGD part')
    print('\n\n'.join(compare(folder) for folder in folders))
    if args.picture:
        draw(folders, args.picture)


def _run_submission(args: argparse.Namespace) -> dict[str, Any]:
    info, _ = read_yaml(args.paper)
    if not isinstance(info, dict):
        raise ValueError(f'{args.paper} holds no paper; write link, name, authors and venue, each as KEY: VALUE')
    return {'written': str(submission(args.cards / args.name, args.target, args.data_dir, info))}


def _parser() -> Parser:
    """The commands."""
    parser = Parser('python -m timm_robust.robustbench', description='The door to RobustBench.')
    commands = parser.add_subparsers(dest='command', required=True)
    one = commands.add_parser('benchmark', help="RobustBench's own benchmark() on our model and local images")
    one.set_defaults(run=_run_benchmark)
    one.add_argument('name', help='registry name, checkpoint file or folder')
    one.add_argument('--data-dir', required=True, help='folder that holds the data, or CIFAR-10-C/')
    one.add_argument('--dataset', default='cifar10', choices=('cifar10', 'cifar100'))
    one.add_argument('--threat-model', default='Linf', choices=('Linf', 'L2', 'corruptions'))
    one.add_argument('--eps', help="radius, such as 8/255; the leaderboard's if not given")
    one.add_argument('-n', type=count, help='number of images, the first of the test set; all if not given')
    one.add_argument('--batch-size', type=count, default=250)
    one.add_argument('--seed', type=whole_number(0, 2**32 - 1), default=0, metavar='N')
    one.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    one = commands.add_parser('convert', help="RobustBench's .pt to a folder of ours, or the way back")
    one.set_defaults(run=_run_convert)
    one.add_argument('entry', help=f'entry of the zoo: {", ".join(LINF)}')
    one.add_argument('source', help='.pt file; for the way back our folder or checkpoint')
    one.add_argument('target', help='folder to write; for the way back a .pt file')
    one = commands.add_parser('fetch', help='download an entry of the zoo and convert it')
    one.set_defaults(run=_run_fetch)
    one.add_argument('entry')
    one.add_argument('target', help='folder to write')
    one = commands.add_parser('compare', help="a staged model beside RobustBench's published entries")
    one.set_defaults(run=_run_compare)
    one.add_argument(
        'names', nargs='*', metavar='NAME', help='<arch>.<tag>; all staged and measured models if none is given'
    )
    one.add_argument('--picture', metavar='FILE.png', help='save clean against robust accuracy there')
    one.add_argument('--cards', type=Path, default=CARDS, help='folder of staged models')
    one = commands.add_parser('submission', help='write a folder that submits a staged model')
    one.set_defaults(run=_run_submission)
    one.add_argument('name', help='<arch>.<tag>')
    one.add_argument('target', help='folder to write')
    one.add_argument('--data-dir', required=True, help='holds the official cifar-10-batches-py')
    paper = 'link, name, authors, venue, footnote, additional_data'
    one.add_argument('--paper', required=True, metavar='FILE.yaml', help=paper)
    one.add_argument('--cards', type=Path, default=CARDS, help='folder of staged models')
    return parser


if __name__ == '__main__':
    sys.exit(main())
