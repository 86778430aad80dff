"""Measure a model: clean, PGD and AutoAttack accuracy on the first n images of a data set, as one record.

    timm-robust evaluate MODEL --data-dir DIR -n 1000 --eps 8/255 --attack autoattack

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
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from .command_line import KeyValue, Parser, command, count, keep_freed_memory, say, whole_number
from .data import DATASETS, SPLITS, ImageData, is_stream
from .distributed import World
from .evaluation import DEFAULT_N, default_batch_size, evaluate, evenly, fit_channels, read_split
from .files import atomic_file, check_output
from .models import BEST, check_model_kwargs, load_model, trained_for
from .results import ATTACKS, NOT_CHECKED, RobustnessResult, is_record
from .threat_model import LEADERBOARD_EPS, MAX_CLASSES, NORMS, ThreatModel, parse_eps
from .training import HELD_OUT, held_out_images

_SETTINGS = (
    *('attack', 'pgd_steps', 'pgd_step_size', 'pgd_restarts', 'batch_size', 'seed', 'split', 'img_size'),
    *('search', 'state_dir', 'checks'),
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 1 if a record was not repeated, 2 for bad input."""
    import timm_robust  # noqa: F401  (registers the models)

    args = _parser().parse_args(argv)
    keep_freed_memory()
    record = RobustnessResult.from_json(args.repeat) if args.repeat else None
    if record is not None:
        _take_settings(args, record, argv)
    ThreatModel(args.norm or 'L2', args.eps or 1.0)  # what is typed is refused before anything is loaded
    _check_files(args)
    options = _model_options(args)
    world = World.join(args.device)
    model = load_model(args.model, checkpoint=args.checkpoint, device=world.device, **options)
    threat_model = _threat_model(args, model)
    fetches = args.dataset_download or not is_stream(args.dataset or 'cifar10')  # or unpacks an archive
    with world.in_turn(fetches):
        data = _read_data(args, model, world).to(world.device)
    for note in _notes(args, threat_model, model, data) if not world.rank else ():
        say(f'note: {note}')
    settings = {key: value for key, value in vars(args).items() if key in _SETTINGS}
    progress = None if args.quiet or world.rank else say
    try:
        result, tensors = evaluate(
            model, data, threat_model, name=args.model, progress=progress, world=world, **settings
        )
        world.leave()
    except torch.cuda.OutOfMemoryError:
        size = args.batch_size or default_batch_size(data)
        raise MemoryError(f'out of memory; type --batch-size {max(size // 2, 1)}') from None
    if world.rank:
        return 0
    if failures := _hand_out(args, result, tensors):
        raise OSError('; '.join(failures))
    if record is not None and (differences := _differences(record, result)):
        say('not repeated: ' + '; '.join(differences))
        return 1
    return 0


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of load_model."""
    options = dict(args.model_kwargs)
    if not isinstance(options.get('pretrained', False), bool):
        raise ValueError(f'pretrained={options["pretrained"]} is neither True nor False')
    check_model_kwargs({key: value for key, value in options.items() if key != 'pretrained'}, '--model-kwargs')
    options |= {key: getattr(args, key) for key in ('num_classes', 'in_chans') if getattr(args, key) is not None}
    classes = options.get('num_classes')
    if classes is not None and not (type(classes) is int and 2 <= classes <= MAX_CLASSES):
        raise ValueError(f'num_classes {classes} is not allowed; allowed: whole numbers, 2 to {MAX_CLASSES}')
    if statistics := {key: tuple(getattr(args, key)) for key in ('mean', 'std') if getattr(args, key)}:
        options['pretrained_cfg_overlay'] = {**options.get('pretrained_cfg_overlay', {}), **statistics}
    return options


def _threat_model(args: argparse.Namespace, model: nn.Module) -> ThreatModel:
    """Norm and radius as typed; else those that the model was trained for; else the leaderboard's."""
    trained = trained_for(model) or ThreatModel()
    norm = args.norm or trained.norm
    eps: Any = args.eps
    if eps is None:
        eps = trained.eps if norm == trained.norm else LEADERBOARD_EPS[norm]
    threat_model = ThreatModel(norm, eps)
    threat_model.check_scale()
    if args.attack != 'none' and not threat_model.eps:
        raise ValueError(f'eps {eps!r} leaves the attack no room; allowed: > 0, or --attack none for clean accuracy')
    return threat_model


def _notes(args: argparse.Namespace, threat_model: ThreatModel, model: nn.Module, data: ImageData) -> list[str]:
    """What may be meant, but rarely is; a line of text each."""
    found, side = [], max(data.images.shape[-2:])
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('img_size')
    if args.checkpoint and args.img_size is None and size not in (None, side):
        found.append(f'images of {side} pixels are resized to {size}, the size of {args.model}; --img-size {side}: not')
    if (
        timm.is_model(args.model)
        and '.' not in args.model
        and not (args.checkpoint or args.model_kwargs.get('pretrained'))
    ):
        found.append(f'{args.model} has random weights; for trained ones name MODEL.TAG, a checkpoint file or a folder')
    if args.attack != 'none':
        found += threat_model.find_problems()
        norm = args.norm or 'Linf'
        if threat_model.norm != norm or (args.eps is None and threat_model.eps != parse_eps(LEADERBOARD_EPS[norm])):
            found.append(f'the attacks have {threat_model}, as in training; --norm and --eps set others')
    if args.split == 'train':
        found.append('these are images of the training split; robustness is claimed on others (--split test)')
    if args.state_dir and args.attack not in ('autoattack', 'apgd'):
        found.append('--state-dir goes with --attack autoattack or apgd, and does nothing here')
    return found


def _read_data(args: argparse.Namespace, model: nn.Module, world: World) -> ImageData:
    """The images to measure on, as many as asked for."""
    if args.split != HELD_OUT:
        dataset = args.dataset or 'cifar10'
        options: dict[str, Any] = {'n': args.n, 'img_size': args.img_size, 'download': args.dataset_download}
        data = read_split(model, dataset, args.data_dir, args.split, processes=world.size, **options)
        if is_stream(dataset):  # n of them already, less what could not be read
            return data
        return data.first(min(DEFAULT_N, len(data)) if args.n is None else args.n)
    path = Path(args.model)
    if not path.exists():
        raise ValueError(f'--split {HELD_OUT} goes with the folder or the checkpoint of a run, not with {args.model!r}')
    if args.dataset is not None:
        raise ValueError(f'--split {HELD_OUT} is of the data of the run; leave --dataset {args.dataset} out')
    data = held_out_images(path / BEST if path.is_dir() else path, args.data_dir)
    return evenly(fit_channels(model, data), min(DEFAULT_N, len(data)) if args.n is None else args.n)


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


def _take_settings(args: argparse.Namespace, record: RobustnessResult, argv: Sequence[str] | None) -> None:
    """Measure as the record says."""
    keys = ('split', 'n', 'norm', 'attack', 'batch_size', 'seed', 'eps', 'img_size')
    settings = {key: getattr(record, key) for key in keys} | {'search': record.search != 'model'}
    if record.steps is not None:
        settings |= {f'pgd_{key}': getattr(record, key) for key in ('steps', 'step_size', 'restarts')}
    typed = _parser().parse_args(argv, argparse.Namespace(**dict.fromkeys(settings)))  # None: not typed
    for key, theirs in settings.items():
        given = getattr(typed, key)
        if given is not None and (parse_eps(given) if key == 'eps' else given) != theirs:
            raise ValueError(f'--repeat takes the settings of the record, which has {key} {theirs}, not {given}')
    vars(args).update(settings)
    named = record.dataset in DATASETS and record.split != HELD_OUT  # a folder has a name of its own, a run its data
    if args.dataset is None and named:
        args.dataset = record.dataset
    if args.dataset is None and record.split != HELD_OUT:
        raise ValueError(
            f'the record is of the folder {record.dataset}; type what it holds, --dataset KIND --data-dir DIR'
        )
    args.checks &= NOT_CHECKED not in record.warnings


def _differences(old: RobustnessResult, new: RobustnessResult) -> list[str]:
    """What a repeated measurement found otherwise."""
    keys = ('data_sha256', 'clean_acc', 'pgd_acc', 'apgd_acc', 'autoattack_acc', 'per_attack')
    return [
        f'{key} is {getattr(new, key)}, was {getattr(old, key)}'
        for key in keys
        if getattr(new, key) != getattr(old, key)
    ]


def _parser() -> Parser:
    """The options; each with its default in the help."""
    parser = Parser(
        'python -m timm_robust.evaluate',
        description='Clean, PGD and AutoAttack accuracy of a model.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(search=True, checks=True)
    add = parser.add_argument
    add('model', metavar='MODEL', help='registry name (NAME.TAG for trained weights), checkpoint file or folder')
    add('--checkpoint', metavar='FILE', help="weights for the registry name MODEL, of timm's train.py, or cleaned")
    add('--num-classes', type=whole_number(2, MAX_CLASSES), metavar='N', help="classes; the checkpoint's if not given")
    add('--in-chans', type=whole_number(1, 64), metavar='N', help="channels of the images; the model's if not given")
    add('--mean', type=float, nargs='+', metavar='X', help="mean of each channel, on [0, 1]; the model's if not given")
    add('--std', type=float, nargs='+', metavar='X', help="standard deviation of each; the model's if not given")
    add('--data-dir', help='folder that holds the data')
    add('--dataset', help='cifar10 if not given; ' + ', '.join(DATASETS) + ', folder, torch/..., hfds/..., wds/...')
    add(
        '--split',
        default='test',
        help=', '.join(SPLITS) + f'; of a folder its sub-folder; {HELD_OUT}: of MODEL, a run, what it validated on',
    )
    add('--dataset-download', action='store_true', help='let torchvision fetch the data into the folder')
    add(
        '-n',
        type=count,
        help=f'images: the first of the split, of a folder evenly spread; {DEFAULT_N} or all if not given',
    )
    add('--norm', help=', '.join(NORMS) + '; that of training, for a run of ours, or Linf if not given')
    add(
        '--eps',
        help="radius in pixels on the [0, 1] scale, such as '8/255' or 0.5; that of training, for a run of ours, or "
        '8/255 for Linf and 0.5 for L2 if not given',
    )
    add(
        '--attack',
        default='autoattack',
        choices=ATTACKS,
        help='the strongest attack to run, after PGD; none: clean accuracy',
    )
    add('--steps', dest='pgd_steps', type=whole_number(1, 10_000), default=10, metavar='N', help='steps of PGD')
    add('--restarts', dest='pgd_restarts', type=count, default=1, metavar='N', help='random starts of PGD')
    add(
        '--step-size',
        dest='pgd_step_size',
        type=parse_eps,
        metavar='EPS',
        help='step of PGD; 2.5 eps / steps if not given, and 2 eps at most',
    )
    add(
        '--batch-size',
        type=count,
        help="images a batch; AutoAttack's random numbers depend on it (default: 250, fewer above 64 pixels a side)",
    )
    add('--seed', type=whole_number(0, 2**32 - 1), default=0, metavar='N', help='seed of all attacks')
    add(
        '--img-size',
        type=whole_number(8, 4096),
        metavar='N',
        help='resize images to this size; what the model was trained with if not given',
    )
    add(
        '--no-search',
        dest='search',
        action='store_false',
        default=argparse.SUPPRESS,
        help='run AutoAttack on the model itself, not on a copy',
    )
    add('--state-dir', help="keep AutoAttack's finds there batch by batch; type the same again to go on after a kill")
    add(
        '--no-checks',
        dest='checks',
        action='store_false',
        default=argparse.SUPPRESS,
        help='skip the search for signs of masked gradients',
    )
    add('--repeat', metavar='FILE', help='repeat the measurement of this record with its settings, and compare')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    add('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='KEY=VALUE', help='passed to the model')
    add('--results-file', help='write the record there, as JSON')
    add('--flags-file', help='write labels, predictions and flags of each image there, as .npz')
    add('--quiet', action='store_true', help='no progress on stderr')
    return parser


if __name__ == '__main__':
    sys.exit(main())
