"""Measure a model: clean, PGD and AutoAttack accuracy on the first n images of a data set, as one record.

    python -m timm_robust.evaluate MODEL --data-dir DIR -n 1000 --eps 8/255 --attack autoattack

MODEL is a registry name, a checkpoint file or a folder. Progress goes to stderr; stdout gets a table and, as its last
line, the record as JSON. eps is in pixels on the [0, 1] scale, whatever mean and std the model was trained with.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from timm.utils import ParseKwargs
from torch import nn

from .allocator import keep_freed_memory
from .attacks import pgd
from .autoattack import autoattack, predict, recheck, share, undisturbed
from .autoattack_runner import Fp32Logits, device_of, dtype_of, upstream
from .checkpoint import load_model
from .data import DATASETS, SPLITS, ImageData, StreamData, is_stream, load_dataset
from .distributed import World
from .honesty import doubts
from .losses import cross_entropy
from .pixels import pixel_input
from .results import ATTACKS, SCREENS, RobustnessResult, atomic_file, environment, git_commit
from .search import Bf16, search_model
from .threat_model import NORMS, ThreatModel, parse_eps

_DEFAULT_N = 1000
_CHECKED = 50  # images on which signs of a dishonest evaluation are looked for
_VERSIONS = {'autoattack': 'standard', 'apgd': 'apgd'}  # of AutoAttack
_SETTINGS = (
    *('attack', 'n', 'pgd_steps', 'pgd_step_size', 'pgd_restarts', 'batch_size', 'seed', 'split', 'img_size'),
    *('search', 'screen', 'state_dir', 'checks'),
)
Progress = Callable[[str], object]


@dataclass(frozen=True)
class SeededStart(ThreatModel):
    """A threat model whose random start of an image depends on that image's key alone, not on batch or device."""

    keys: tuple[str, ...] = ()

    def random_start(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A random point of the ball around each image, drawn on the CPU from the hash of its key."""
        starts, generator = [], torch.Generator()
        for image, key in zip(x.cpu().split(1), self.keys, strict=True):
            digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
            starts.append(super().random_start(image, generator.manual_seed(int.from_bytes(digest, 'big'))))
        return torch.cat(starts).to(x.device)


def evaluate(
    model: nn.Module,
    data: ImageData,
    threat_model: ThreatModel,
    *,
    attack: str = 'autoattack',
    n: int | None = None,
    pgd_steps: int = 10,
    pgd_step_size: float | None = None,
    pgd_restarts: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    progress: Progress | None = None,
    name: str | None = None,
    split: str = 'test',
    img_size: int | None = None,
    search: bool = True,
    screen: str | None = None,
    state_dir: str | Path | None = None,
    checks: bool = True,
    world: World | None = None,
) -> tuple[RobustnessResult, dict[str, torch.Tensor]]:
    """Measure a model, and leave it as it was. Only adversarial images that pass re-checking count.

    Args:
        model: images -> logits, as timm trains it; normalisation by its pretrained_cfg is added here.
        data: the split to measure on.
        threat_model: norm, radius and bounds.
        attack: 'autoattack' (standard), 'apgd' (its first two attacks), 'pgd' or 'none'. PGD runs unless 'none'.
        n: number of images, the first of the split; None for all.
        pgd_steps: steps of PGD on the cross-entropy.
        pgd_step_size: step in pixels; 2.5 eps / pgd_steps if None.
        pgd_restarts: random starts; an image that falls to one of them is broken.
        batch_size: images a batch. PGD's random starts do not depend on it, AutoAttack's do.
        seed: seed of all attacks.
        progress: called with lines of text.
        name: the model's name in the record; by default what its pretrained_cfg says.
        split: the name of the split in the record.
        img_size: side that images are resized to inside the attacked function, so that eps is in the data's pixels;
            None: what the model was trained with (load_model), else no resizing.
        search: AutoAttack looks for adversarial images on an equal, faster copy, and the model confirms each.
        screen: 'bf16': APGD-CE and APGD-T run in bfloat16 first, and what the model does not confirm is attacked whole.
        state_dir: folder that keeps what each batch of AutoAttack found; a run that was killed goes on from there.
        checks: look for signs that the result is not to be trusted, on the first 50 images; they become warnings.
        world: the processes that share AutoAttack's batches out; each gets the whole result.

    Returns:
        The record; and tensors on the data's device: y, y_pred and clean_correct [n]; of the strongest attack
        robust and y_pred_adv [n] and x_adv [n, C, H, W] in float32; and PGD's own pgd_robust [n].

    Raises:
        ValueError: for an unknown attack, an n that the data does not have, or a model that does not fit the data.
    """
    date, started = datetime.now(timezone.utc).isoformat(timespec='seconds'), time.perf_counter()
    if attack not in ATTACKS:
        raise ValueError(f'attack {attack!r} is unknown; allowed: {", ".join(ATTACKS)}')
    if screen not in SCREENS:
        raise ValueError(f'screen {screen!r} is unknown; allowed: {", ".join(map(str, SCREENS))}')
    for what, count in {'pgd_steps': pgd_steps, 'pgd_restarts': pgd_restarts, 'batch_size': batch_size}.items():
        if count < 1:
            raise ValueError(f'{what} must be at least 1, got {count}')
    if attack in _VERSIONS:
        upstream()  # if it is missing, say so now
    data = data if n is None else data.first(n)
    x, pixels = data.pixels(), pixel_input(model, img_size)
    facts: dict[str, Any] = {'attack': attack, 'seed': seed, 'batch_size': batch_size, 'split': split, 'n': len(x)}
    facts |= {'dtype': str(dtype_of(model)).removeprefix('torch.'), 'dataset': data.name, 'date': date}
    facts['data_sha256'], facts['img_size'] = data.sha256(), img_size
    facts |= {
        'model': name or _name(model),
        'norm': threat_model.norm,
        'eps': threat_model.eps,
        'eps_text': threat_model.eps_text,
    }
    with undisturbed(model):
        logits = Fp32Logits(pixels)
        _check_fit(logits, data)
        tensors = _clean(logits, x, data.labels, batch_size, progress)
        facts['clean_acc'] = share(tensors['clean_correct'])
        if attack != 'none':
            facts |= {'steps': pgd_steps, 'restarts': pgd_restarts}
            facts['step_size'] = 2.5 * threat_model.eps / pgd_steps if pgd_step_size is None else pgd_step_size
            facts |= _pgd(logits, x, tensors, threat_model, facts, progress)
        if attack in _VERSIONS:
            found = search_model(pixels, x[:16], len(x)) if search else None
            settings: dict[str, Any] = {'search': found, 'screen': Bf16(found or pixels) if screen else None}
            settings |= {'state_dir': state_dir, 'world': world}
            facts |= _autoattack(pixels, x, tensors, threat_model, facts, progress, **settings)
            facts |= {'search': 'model' if found is None else 'folded', 'screen': screen}
            facts['processes'] = world.size if world else 1
        if attack != 'none' and checks:
            facts['warnings'] = facts.get('warnings', []) + _doubts(logits, x, data.labels, threat_model, seed)
    if attack != 'none':
        facts |= _distances(x, tensors, threat_model)
    seconds = time.perf_counter() - started
    facts |= {'wall_time_s': seconds, 'images_per_s': len(x) / seconds, 'commit': git_commit(Path(__file__).parent)}
    return RobustnessResult(**facts, **environment(device_of(model, x))), tensors


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
        for file in filter(None, (args.results_file, args.flags_file)):
            if not Path(file).parent.is_dir() or Path(file).is_dir():
                raise FileNotFoundError(
                    f'cannot write {file}; type mkdir -p {Path(file).parent}, and name a file there'
                )
        threat_model = ThreatModel(args.norm, args.eps)
        world = World.join(args.device)
        model = load_model(args.model, device=world.device, **args.model_kwargs)
        data = _read_data(args, model, world).to(world.device)
    except Exception as error:  # whatever fails up to here is input
        parser.error(str(error) or type(error).__name__)
    if timm.is_model(args.model) and '.' not in args.model and not args.model_kwargs.get('pretrained'):
        _print(f'note: {args.model} has random weights; for trained ones name MODEL.TAG, a checkpoint file or a folder')
    settings = {key: value for key, value in vars(args).items() if key in _SETTINGS}
    settings['n'] = min(_DEFAULT_N, len(data)) if args.n is None else args.n
    progress = None if args.quiet or world.rank else _print
    try:
        result, tensors = evaluate(
            model, data, threat_model, name=args.model, progress=progress, world=world, **settings
        )
        world.leave()
        if world.rank:
            return
        if args.results_file:
            result.to_json(args.results_file)
        if args.flags_file:
            arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in tensors.items() if value.ndim == 1}
            with atomic_file(args.flags_file) as file:
                np.savez(file, **arrays)
    except torch.cuda.OutOfMemoryError:
        parser.error(f'out of memory; type --batch-size {max(args.batch_size // 2, 1)}')
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, 'interrupted\n')
    print(result.table(), result.to_line(), sep='\n')
    if record is not None and (differences := _differences(record, result)):
        parser.exit(1, 'not repeated: ' + '; '.join(differences) + '\n')


def _read_data(args: argparse.Namespace, model: nn.Module, world: World) -> ImageData:
    """The images to measure on; of a streamed data set n at the model's size, evenly from first to last."""
    if not is_stream(args.dataset):
        return load_dataset(args.dataset, args.data_dir, args.split, args.dataset_download)
    config = dict(getattr(model, 'pretrained_cfg', None) or {})
    size = args.img_size or config.get('img_size') or config.get('input_size', (3, 224, 224))[-1]
    options = {'num_classes': getattr(model, 'num_classes', None), 'download': args.dataset_download}
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


def _clean(
    logits: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int, progress: Progress | None
) -> dict[str, torch.Tensor]:
    """Labels, predictions and whether they agree, each [n]."""
    pace = _Pace('clean', len(x), progress)
    y_pred = torch.cat([pace(predict(logits, part, batch_size)) for part in x.split(batch_size)])
    return {'y': y, 'y_pred': y_pred, 'clean_correct': y_pred == y}


def _check_fit(logits: nn.Module, data: ImageData) -> None:
    """Refuse a model that does not take these images, or that has other classes."""
    image = data.pixels(slice(0, 1))
    try:
        with torch.no_grad():
            shape = logits(image.to(device_of(logits, image))).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f'the model does not take images {list(image.shape[1:])} of {data.name}: {error}') from error
    if len(shape) != 2:
        raise ValueError(f'the model gives {list(shape)}, not [1, classes], for one image; it is no classifier')
    if shape[1] != data.num_classes:
        raise ValueError(
            f'the model has {shape[1]} outputs, {data.name} has {data.num_classes} classes; use the data it was '
            f'trained for, or give it a new head with num_classes={data.num_classes} (in the shell: --model-kwargs)'
        )


def _pgd(
    logits: nn.Module,
    x: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    threat_model: ThreatModel,
    facts: dict[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    """PGD on the cross-entropy, each restart on the images still standing; adds its verdicts to tensors."""
    robust, x_adv, y_pred_adv = tensors['clean_correct'].clone(), x.clone(), tensors['y_pred'].clone()
    device, steps, step_size, rejected = device_of(logits, x), facts['steps'], facts['step_size'], 0
    for restart in range(facts['restarts']):
        left = robust.nonzero()[:, 0]
        if not len(left):
            break
        pace = _Pace(f'PGD-{steps} start {restart + 1} of {facts["restarts"]}', len(left), progress)
        for part in left.split(facts['batch_size']):
            images, y = x[part].to(device), tensors['y'][part].to(device)
            keys = tuple(f'{facts["seed"]}/{restart}/{index}' for index in part.tolist())
            start = SeededStart(threat_model.norm, threat_model.eps, threat_model.bounds, keys)
            found = pgd(partial(_surrogate, logits, y), images, start, steps=steps, step_size=step_size)
            found, labels, broken = recheck(logits, found, images, y, threat_model, facts['batch_size'])
            rejected += int(((labels != y) & ~broken).sum())
            index = part[broken.to(x.device)]
            robust[index], x_adv[index] = False, found[broken].to(x.device)
            y_pred_adv[index] = labels[broken].to(x.device)
            pace(part)
    tensors |= {'pgd_robust': robust, 'robust': robust, 'x_adv': x_adv, 'y_pred_adv': y_pred_adv}
    return {'pgd_acc': share(robust), 'rejected': rejected}


def _surrogate(logits: nn.Module, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What PGD climbs: the cross-entropy of each image, [B]."""
    return cross_entropy(logits(x), y)


def _autoattack(
    pixels: nn.Module,
    x: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    threat_model: ThreatModel,
    facts: dict[str, Any],
    progress: Progress | None,
    **settings: Any,
) -> dict[str, Any]:
    """AutoAttack, or its first two attacks; its verdicts replace PGD's in tensors. What only PGD broke is a warning."""
    attack, version = facts['attack'], _VERSIONS[facts['attack']]
    settings |= {'batch_size': facts['batch_size'], 'seed': facts['seed'], 'progress': progress}
    result = autoattack(pixels, x, tensors['y'], threat_model, version=version, **settings)
    warnings = list(result.warnings)
    if missed := int((result.robust & ~tensors['pgd_robust']).sum()):
        warnings.append(f'PGD broke {missed} images that {attack} left standing')
    tensors |= {'robust': result.robust, 'x_adv': result.x_adv, 'y_pred_adv': result.y_pred_adv}
    record: dict[str, Any] = {'attack_version': result.version, 'per_attack': result.per_attack, 'warnings': warnings}
    record['apgd_acc'] = [value for name, value in result.per_attack.items() if name.startswith('apgd')][-1]
    record['autoattack_acc'] = share(result.robust) if attack == 'autoattack' else None
    return record | {'rejected': facts['rejected'] + result.rejected}


def _doubts(logits: nn.Module, x: torch.Tensor, y: torch.Tensor, threat_model: ThreatModel, seed: int) -> list[str]:
    """What speaks against trusting the result, looked for on the first images."""
    device = device_of(logits, x)
    return doubts(logits, x[:_CHECKED].to(device), y[:_CHECKED].to(device), threat_model, seed=seed)


def _distances(x: torch.Tensor, tensors: dict[str, torch.Tensor], threat_model: ThreatModel) -> dict[str, float]:
    """Mean and maximum distance of the adversarial images that count."""
    broken = tensors['clean_correct'] & ~tensors['robust']
    if not broken.any():
        return {}
    distance = threat_model.distance(tensors['x_adv'][broken], x[broken])
    return {'mean_distance': distance.mean().item(), 'max_distance': distance.max().item()}


def _name(model: nn.Module) -> str:
    """The model's name in timm, 'arch.tag', or its class."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    names = [config.get('architecture') or type(model).__name__, config.get('tag')]
    return '.'.join(filter(None, names))


class _Pace:
    """Says at most once a second how many images are done, how fast, and how long the rest takes."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self.what, self.total, self.progress, self.done = what, total, progress, 0
        self.started = time.perf_counter()
        self.said = self.started

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        """Note that these images are done, and hand them through."""
        self.done += len(part)
        now = time.perf_counter()
        if self.progress is not None and (now - self.said >= 1 or self.done == self.total):
            self.said = now
            rate = self.done / (now - self.started)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            self.progress(f'{self.what}: {self.done}/{self.total} images, {rate:.3g} images/s, {left} left')
        return part


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


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
