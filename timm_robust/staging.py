"""Releases in the making: a finished run becomes model_cards/<arch>.<tag>/, is measured as stored, and described.

    timm-robust stage RUN NAME [--note TEXT]
    timm-robust measure NAME --data-dir DIR --attack autoattack -n 200 [--run RUN] [--note TEXT]
    timm-robust render

`stage` writes weights, configuration, hyper-parameters and the course of training; `measure` adds one measurement with
the verdict on every image; both and `render` write the card, the check sums, the table of releases and RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .command_line import Parser, command, count, keep_freed_memory, say, whole_number
from .data import DATASETS, SPLITS, ImageData, is_stream
from .distributed import World
from .evaluation import DEFAULT_N, evenly, fit_channels, read_split
from .files import recover_folder
from .models import BEST, load_model, read_weights
from .provenance import RECIPES
from .release import measure, read_hyper, read_results, render, stage, stored_weights
from .results import ATTACKS
from .training import HELD_OUT, held_out_images
from .weights import CARDS, WEIGHTS, table_of


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    keep_freed_memory()
    table = args.table or table_of(args.cards)
    for old in args.cards.glob('.*/old'):  # of a command killed between two renames
        recover_folder(args.cards / old.parent.name[1:].rpartition('.')[0])
    if args.command == 'stage':
        settings = {'notes': args.note, 'license_id': args.license, 'overwrite': args.overwrite}
        stage(args.run, args.name, cards=args.cards, **settings)
    elif args.command == 'measure':
        world = World.join(args.device)
        data = _read_data(args, world).to(world.device)
        settings = {key: getattr(args, key) for key in ('attack', 'n', 'batch_size', 'seed', 'split', 'state_dir')}
        settings['split'] = HELD_OUT if args.run else args.split or 'test'
        if is_stream(args.dataset or read_hyper(args.cards / args.name)['dataset']):
            settings['n'] = args.n and min(args.n, len(data))  # some may not have been readable
        settings |= {'device': world.device, 'world': world, 'progress': None if world.rank else say}
        measure(args.cards / args.name, data, ' '.join(args.note) or None, eps=args.eps, **settings)
        world.leave()
        if world.rank:
            return 0
    render(args.cards, table, args.recipes)
    return 0


def _read_data(args: argparse.Namespace, world: World) -> ImageData:
    """The images that staged weights are measured on.

    Raises:
        ValueError: for images held out by a run that trained other weights.
    """
    folder = args.cards / args.name
    read_results(folder)
    dataset = args.dataset or read_hyper(folder)['dataset']
    model = load_model(folder)
    if args.run is None:
        return read_split(model, dataset, args.data_dir, args.split or 'test', n=args.n, processes=world.size)
    if args.split or args.dataset:
        raise ValueError('--run measures on what that run held out; leave --split and --dataset out, or --run')
    ours, theirs = read_weights(folder / WEIGHTS), stored_weights(args.run)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise ValueError(f'{args.run} trained other weights than those of {folder}; name the run that was staged')
    return evenly(fit_channels(model, held_out_images(args.run / BEST, args.data_dir)), args.n)


def _parser() -> Parser:
    """The three commands."""
    parser = Parser('python -m timm_robust.staging', description=(__doc__ or '').partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    run = commands.add_parser('stage', help='write model_cards/NAME/ from a finished run')
    run.add_argument('run', metavar='RUN', help='folder that training wrote')
    run.add_argument('name', metavar='NAME', help='<arch>.<tag>')
    run.add_argument(
        '--overwrite', action='store_true', help='replace weights of this name, and drop their measurements'
    )
    run.add_argument(
        '--license',
        metavar='ID',
        help="of the weights, such as apache-2.0 or cc-by-nc-4.0; that of timm's weights where it began from them",
    )
    add = commands.add_parser('measure', help='measure staged weights and keep the verdict on every image').add_argument
    add('name', metavar='NAME', help='<arch>.<tag>')
    add('--data-dir', help='folder that holds the data')
    add('--dataset', help="the training's if not given; " + ', '.join(DATASETS) + ', folder, ...')
    add('--split', help=', '.join(SPLITS) + '; of a folder its sub-folder; test if not given')
    add('--run', type=Path, help='measure on what this run, that of the weights, had held out; for data without a test')
    add(
        '-n',
        type=count,
        help=f'images, the first of the split, all if not given; of a folder spread over it, {DEFAULT_N} if not given',
    )
    add(
        '--attack',
        default='autoattack',
        choices=ATTACKS,
        help='the strongest attack to run, after PGD; none: clean accuracy',
    )
    add(
        '--batch-size',
        type=count,
        help="images a batch; AutoAttack's random numbers depend on it (default: 250, fewer above 64 pixels a side)",
    )
    add('--eps', help='radius, such as 8/255; that of the measurements before, or else of training')
    add('--seed', type=whole_number(0, 2**32 - 1), default=0, metavar='N', help='seed of all attacks')
    add('--state-dir', help="keep AutoAttack's finds there; type the same again to go on after a kill")
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    commands.add_parser('render', help='write cards, check sums, the table of releases and RESULTS.md')
    for one in commands.choices.values():
        one.add_argument('--cards', type=Path, default=CARDS, help='folder of staged models')
        one.add_argument('--table', type=Path, help="table of releases; the package's, or that beside other --cards")
        one.add_argument('--recipes', type=Path, default=RECIPES, help='folder of recipes')
    for name in ('stage', 'measure'):
        note = commands.choices[name].add_argument
        note('--note', action='append', default=[], help='what the reader of the card must know')
    return parser


if __name__ == '__main__':
    sys.exit(main())
