"""Measure a model: clean, PGD and AutoAttack accuracy on the first n images of a data set, as one record.

    python -m timm_robust.evaluate MODEL --data-dir DIR -n 1000 --eps 8/255 --attack autoattack

MODEL is a registry name, a checkpoint file or a folder. Progress goes to stderr; stdout gets a table and, as its last
line, the record as JSON. eps is in pixels on the [0, 1] scale, whatever mean and std the model was trained with.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from timm.utils import ParseKwargs
from torch import nn

from .allocator import keep_freed_memory
from .checkpoint import load_model, trained_classes
from .data import DATASETS, SPLITS, ImageData, StreamData, is_stream, load_dataset
from .distributed import World
from .results import ATTACKS, SCREENS, RobustnessResult, atomic_file, check_output, is_record, say
from .robustness import evaluate
from .threat_model import NORMS, ThreatModel, parse_eps

_DEFAULT_N = 1000
_SETTINGS = (
    *('attack', 'n', 'pgd_steps', 'pgd_step_size', 'pgd_restarts', 'batch_size', 'seed', 'split', 'img_size'),
    *('search', 'screen', 'state_dir', 'checks'),
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with one line, 'error: ...', and exit status 2."""
    import timm_robust  # noqa: F401  (registers the models)

    parser = _parser()
    keep_freed_memory()
    try:
        args = parser.parse_args(argv)
        record = RobustnessResult.from_json(args.repeat) if args.repeat else None
        if record is not None:
            _take_settings(args, record)
        args.dataset = args.dataset or 'cifar10'
        _check_files(args)
        threat_model = ThreatModel(args.norm, args.eps)
        world = World.join(args.device)
        model = load_model(args.model, device=world.device, **args.model_kwargs)
        with world.in_turn(args.dataset_download):
            data = _read_data(args, model, world).to(world.device)
    except Exception as error:  # whatever fails up to here is input
        parser.error(str(error) or type(error).__name__)
    if timm.is_model(args.model) and '.' not in args.model and not args.model_kwargs.get('pretrained'):
        say(f'note: {args.model} has random weights; for trained ones name MODEL.TAG, a checkpoint file or a folder')
    settings = {key: value for key, value in vars(args).items() if key in _SETTINGS}
    settings['n'] = min(_DEFAULT_N, len(data)) if args.n is None else args.n
    if is_stream(args.dataset):  # without those that could not be read
        settings['n'] = len(data)
    progress = None if args.quiet or world.rank else say
    try:
        result, tensors = evaluate(
            model, data, threat_model, name=args.model, progress=progress, world=world, **settings
        )
        world.leave()
    except torch.cuda.OutOfMemoryError:
        parser.error(f'out of memory; type --batch-size {max(args.batch_size // 2, 1)}')
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, 'interrupted\n')
    if world.rank:
        return
    if failures := _hand_out(args, result, tensors):
        parser.error('; '.join(failures))
    if record is not None and (differences := _differences(record, result)):
        parser.exit(1, 'not repeated: ' + '; '.join(differences) + '\n')


def _read_data(args: argparse.Namespace, model: nn.Module, world: World) -> ImageData:
    """The images to measure on; of a streamed data set n at the model's size, evenly from first to last."""
    if not is_stream(args.dataset):
        return load_dataset(args.dataset, args.data_dir, args.split, args.dataset_download)
    config = dict(getattr(model, 'pretrained_cfg', None) or {})
    size = args.img_size or config.get('img_size') or config.get('input_size', (3, 224, 224))[-1]
    options: dict[str, Any] = {'download': args.dataset_download, 'classes': trained_classes(model)}
    if args.dataset.partition('/')[0] in ('wds', 'hfids', 'tfds'):  # folders know their classes, and may lack some
        options['num_classes'] = getattr(model, 'num_classes', None)
    stream = StreamData(args.dataset, args.data_dir, args.split, size, **options)
    if stream.iterable and world.size > 1:
        raise ValueError(
            f'{args.dataset} has an order, not numbers, so it is measured in one process, without torchrun'
        )
    n = min(_DEFAULT_N, len(stream)) if args.n is None else args.n
    first = stream.first(n)
    if not stream.iterable:  # folders come class by class: the first images would all be of one
        first = stream.subset(torch.arange(n) * len(stream) // n)
    return first.in_memory()


def _check_files(args: argparse.Namespace) -> None:
    """Refuse files and a folder that could not be written after hours of attack, or that would replace others."""
    if args.results_file and args.flags_file and Path(args.results_file).resolve() == Path(args.flags_file).resolve():
        raise ValueError(f'--results-file and --flags-file are both {args.flags_file}; name two files')
    if args.results_file:
        check_output(args.results_file, is_record)
    if args.flags_file:
        check_output(args.flags_file, _is_flags)
    if args.state_dir:
        Path(args.state_dir).mkdir(parents=True, exist_ok=True)
        check_output(Path(args.state_dir) / 'state')


def _is_flags(path: Path) -> bool:
    """Whether a file is one of --flags-file."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {'y.npy', 'y_pred.npy', 'clean_correct.npy'} <= set(archive.namelist())


def _write_flags(tensors: dict[str, torch.Tensor], path: str) -> None:
    arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in tensors.items() if value.ndim == 1}
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def _hand_out(args: argparse.Namespace, result: RobustnessResult, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Print the record first, then write the files, each whatever became of the others; what failed."""
    failures = []
    try:
        print(result.table(), result.to_line(), sep='\n', flush=True)
    except OSError as error:
        failures.append(f'cannot print the record: {error.strerror}')
        say(result.to_line())
        _let_go(sys.stdout)
    writers = (
        (args.results_file, is_record, result.to_json),
        (args.flags_file, _is_flags, partial(_write_flags, tensors)),
    )
    for path, is_older, write in writers:
        try:
            if path:
                check_output(path, is_older)
                write(path)
        except OSError as error:
            failures.append(str(error))
    _let_go(sys.stderr)
    return failures


def _let_go(stream: Any) -> None:
    """Give up what a stream cannot write, or the exit would try once more, and fail."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _take_settings(args: argparse.Namespace, record: RobustnessResult) -> None:
    """Measure as the record says."""
    keys = ('split', 'n', 'norm', 'attack', 'batch_size', 'seed', 'eps', 'img_size')
    vars(args).update({key: getattr(record, key) for key in keys})
    if args.dataset is None and record.dataset in DATASETS:  # of folders and files the record has the name alone
        args.dataset = record.dataset
    args.search, args.screen = record.search != 'model', record.screen
    if record.steps is not None:
        args.pgd_steps, args.pgd_step_size, args.pgd_restarts = record.steps, record.step_size, record.restarts


def _differences(old: RobustnessResult, new: RobustnessResult) -> list[str]:
    """What a repeated measurement found otherwise."""
    keys = ('data_sha256', 'clean_acc', 'pgd_acc', 'apgd_acc', 'autoattack_acc', 'per_attack')
    return [
        f'{key} is {getattr(new, key)}, was {getattr(old, key)}'
        for key in keys
        if getattr(new, key) != getattr(old, key)
    ]


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with exit status 2."""
        self.exit(2, f'error: {" ".join(message.split())}\n')


def _parser() -> _Parser:
    """The options; each with its default in the help."""
    parser = _Parser(
        'python -m timm_robust.evaluate',
        description='Clean, PGD and AutoAttack accuracy of a model.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('model', metavar='MODEL', help='registry name (NAME.TAG for trained weights), checkpoint file or folder')
    add('--data-dir', help='folder that holds the data')
    add('--dataset', help='cifar10 if not given; ' + ', '.join(DATASETS[1:]) + ', folder, torch/..., hfds/..., wds/...')
    add('--split', default='test', help=', '.join(SPLITS) + '; of a folder its sub-folder')
    add('--dataset-download', action='store_true', help='let torchvision fetch the data into the folder')
    add(
        '-n',
        type=int,
        help=f'images: the first of the split, of a folder evenly spread; {_DEFAULT_N} or all if not given',
    )
    add('--norm', default='Linf', help=', '.join(NORMS))
    add('--eps', default='8/255', help="radius in pixels on the [0, 1] scale, such as '8/255' or 0.5")
    add('--attack', default='autoattack', choices=ATTACKS, help='the strongest attack to run; PGD always runs')
    add('--steps', dest='pgd_steps', type=int, default=10, metavar='N', help='steps of PGD')
    add('--restarts', dest='pgd_restarts', type=int, default=1, metavar='N', help='random starts of PGD')
    add(
        '--step-size',
        dest='pgd_step_size',
        type=parse_eps,
        metavar='EPS',
        help='step of PGD; 2.5 eps / steps if not given',
    )
    add('--batch-size', type=int, default=250, help="images a batch; AutoAttack's random numbers depend on it")
    add('--seed', type=int, default=0, help='seed of all attacks')
    add('--img-size', type=int, help='resize images to this size; what the model was trained with if not given')
    add('--no-search', dest='search', action='store_false', help='run AutoAttack on the model itself, not on a copy')
    add(
        '--screen',
        choices=SCREENS[1:],
        help='run APGD in this type first; the model confirms what it finds, and the rest is attacked whole',
    )
    add('--state-dir', help="keep AutoAttack's finds there batch by batch; type the same again to go on after a kill")
    add('--no-checks', dest='checks', action='store_false', help='skip the search for signs of masked gradients')
    add('--repeat', metavar='FILE', help='repeat the measurement of this record with its settings, and compare')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='passed to the model')
    add('--results-file', help='write the record there, as JSON')
    add('--flags-file', help='write labels, predictions and flags of each image there, as .npz')
    add('--quiet', action='store_true', help='no progress on stderr')
    return parser


if __name__ == '__main__':
    main()
