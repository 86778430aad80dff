"""Releases in the making: a finished run becomes model_cards/<arch>.<tag>/, is measured as stored, and described.

    python -m timm_robust.staging stage RUN NAME [--note TEXT]
    python -m timm_robust.staging measure NAME --data-dir DIR --attack autoattack -n 200 [--note TEXT]
    python -m timm_robust.staging render

`stage` writes weights, configuration, hyper-parameters and the course of training; `measure` adds one measurement with
the verdict on every image; both and `render` write the card, the check sums, the table of releases and RESULTS.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .allocator import keep_freed_memory
from .cards import FLAGS, RESULTS, model_card, read_hyper, read_results, results_page, strongest
from .checkpoint import BEST, HYPER_PARAMETERS, LAST, load_checkpoint, load_model, read_weights
from .command_line import Parser, command, count, whole_number
from .data import DATASETS, SPLITS, load_dataset
from .distributed import World
from .engine import activation_state
from .model_files import stored, weights_content, write_files
from .plots import adversarial_figure, read_run, run_figure
from .recipe import Recipe
from .releases import STAGED, TABLE, WEIGHTS, Release, read_table, sha256, split_name, write_table
from .results import (
    ATTACKS,
    RobustnessResult,
    atomic_file,
    atomic_folder,
    check_output,
    read_object,
    recover_folder,
    say,
)
from .robustness import evaluate
from .threat_model import ThreatModel, parse_eps

ORGANISATION = 'timm-robust'
"""Where the releases live on the Hub."""
_PRIVATE = (
    *('data_dir', 'dataset_download', 'workers', 'device', 'output', 'experiment', 'resume', 'allow_changes'),
    *(
        'log_interval',
        'save_interval',
        'tensorboard',
        'log_wandb',
        'checkpoint_hist',
        'initial_checkpoint',
    ),
)
"""Settings that tell of the machine, not of the training."""
_PICTURED = 6


def stage(
    run: str | Path, name: str, *, cards: Path = STAGED, notes: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Write model_cards/<name>/ from a finished run: all of it or nothing.

    The weights are those of model_best.pth.tar, averaged ones if the run kept an average. Tensors of two and more
    dimensions are stored in fp16, vectors (biases, batch norm, alpha and beta) in fp32.

    Args:
        run: the folder that training wrote.
        name: '<arch>.<tag>'.
        cards: the folder that gets the folder.
        notes: what limits the weights, for the card.
        overwrite: replace the folder, whatever its weights; its measurements are dropped.

    Raises:
        FileNotFoundError: if the run lacks a file.
        ValueError: if the name does not fit the run, if weights overflow fp16, or if the folder exists with others.
    """
    run, folder = Path(run), cards / name
    arch, tag = split_name(name)
    state, last = load_checkpoint(run / BEST), load_checkpoint(run / LAST)
    recipe = Recipe.from_checkpoint(state)
    if recipe.model != arch or not tag.endswith(f'_{recipe.norm.lower()}'):
        raise ValueError(f'{run} trained {recipe.model} against {recipe.norm}; {name} names another model or norm')
    changed = recipe.model_kwargs or (recipe.act and {'act': recipe.act})
    if changed:
        raise ValueError(f'{run} changed {arch} by {changed}; a release is the network of that name, unchanged')
    model = load_model(run / BEST)
    weights = stored(read_weights(run / BEST))
    closing = state['history'][-1] if state['history'] else {}
    best = {key: closing[key] for key in ('val_clean_acc', 'val_pgd_acc') if key in closing}
    training: dict[str, Any] = {
        'recipe': name,
        'epoch': state['epoch'],
        'weights': 'ema' if state.get('state_dict_ema') is not None else 'last step of the epoch',
        **best,
        'epochs': last['epoch'] + 1,
        'steps': last['step'],
        'images': last['history'][-1]['images'],
        'seconds': round(last['seconds'], 1),
        'images_per_s': round(statistics.median(row['images_per_s'] for row in last['history']), 1),
        'rollbacks': last['rollbacks'],
        'changes': state.get('changes', []),
        'activation': activation_state(model),
        'origins': last['origins'],
        'notes': list(notes),
    }
    origin = training['origins'][-1] if training['origins'] else {'versions': {}}
    provenance = {
        'trained_with': f'timm_robust {origin["versions"].get("timm_robust")}',
        'commit': str(origin.get('commit')),
    }
    content = weights_content(weights, name, **provenance)
    kept: list[dict[str, Any]] = []
    if (folder / WEIGHTS).is_file() and not overwrite:
        if (folder / WEIGHTS).read_bytes() == content:
            kept = read_results(folder)['measurements']
        else:
            raise ValueError(f'{folder} holds other weights; type --overwrite to replace them and their measurements')
    with atomic_folder(folder) as new:
        write_files(new, model, content, tag)
        (new / 'LICENSE').write_text(_license())
        (new / HYPER_PARAMETERS).write_text(_hyper_parameters(recipe))
        shutil.copyfile(run / 'summary.csv', new / 'summary.csv')
        run_figure(new / 'training.png', {name: read_run(run)})
        facts = {'sha256': sha256(new / WEIGHTS), 'size': len(content), 'dtype': 'float16'}
        facts['parameters'] = sum(parameter.numel() for parameter in model.parameters())
        _write_json(new / RESULTS, {'model': name, 'weights': facts, 'training': training, 'measurements': kept})
        if kept and (folder / FLAGS).is_dir():
            shutil.copytree(folder / FLAGS, new / FLAGS)
        if kept and (folder / 'adversarial.png').is_file():
            shutil.copyfile(folder / 'adversarial.png', new / 'adversarial.png')
    return folder


def measure(
    folder: Path,
    data: Any,
    note: str | None = None,
    progress: Any = None,
    device: torch.device | str = 'cpu',
    world: World | None = None,
    eps: float | str | None = None,
    **settings: Any,
) -> None:
    """Measure staged weights exactly as stored, and keep the record and the verdict on every image.

    Args:
        folder: model_cards/<name>.
        data: the split, as load_dataset gives it.
        note: what the reader must know of these images.
        progress: called with lines of text.
        device: where the model runs.
        world: the processes that share AutoAttack's batches out; the first keeps the record.
        eps: radius, such as '8/255'; None: that of the measurements before, or else of training.
        settings: of `evaluate`; the norm is that of training.

    Raises:
        ValueError: for training images, for others than those measured before, and if the weights change meanwhile.
    """
    before = read_results(folder)
    verify(folder, before)
    name, hyper = before['model'], read_hyper(folder)
    there = [item['result']['eps'] for item in before['measurements'] if item['result']['attack'] != 'none']
    threat_model = ThreatModel(hyper['norm'], parse_eps(eps if eps is not None else [*there, hyper['eps']][0]))
    threat_model.check_scale()
    _check_alike(before, data.name, settings.get('split', 'test'), threat_model)
    check_output(folder / RESULTS)
    model = load_model(folder, device=device)
    result, tensors = evaluate(model, data, threat_model, name=name, progress=progress, world=world, **settings)
    if world is not None and world.rank:
        return
    if progress is not None:  # where the disk refuses, the log has it
        progress(result.to_line())
    record = read_results(folder)  # another measurement may have ended meanwhile
    if record['weights'] != before['weights']:
        raise ValueError(f'{folder} got other weights while these were measured; type the same again')
    _check_alike(record, result.dataset, result.split, threat_model)
    key = f'{result.attack}_{result.n}'
    (folder / FLAGS).mkdir(exist_ok=True)
    with atomic_file(folder / FLAGS / f'{key}.npz') as file:
        arrays: dict[str, Any] = {item: value.cpu().numpy() for item, value in tensors.items() if value.ndim == 1}
        np.savez_compressed(file, **arrays)
    measurements = [item for item in record['measurements'] if item['key'] != key]
    measurements.append({'key': key, 'note': note, 'result': asdict(result)})
    record['measurements'] = sorted(measurements, key=lambda item: (item['result']['attack'], item['result']['n']))
    _write_json(folder / RESULTS, record)
    best = strongest(record)
    if best is not None and best['key'] == key:
        x_adv, labels, y = (tensors[item][:_PICTURED].cpu() for item in ('x_adv', 'y_pred_adv', 'y'))
        x = data.pixels(slice(0, len(y))).cpu()
        adversarial_figure(folder / 'adversarial.png', x, y, {name: (x_adv, labels)}, data.classes, threat_model)


def render(
    cards: Path = STAGED, table: Path = TABLE, recipes: Path | None = None, measured: str | None = None
) -> list[Path]:
    """Write every card, every SHA256SUMS, the table of releases and RESULTS.md from what was measured.

    Nothing is written if weights or verdicts are not those of the records, of SHA256SUMS and of the table.

    Args:
        cards: the folder of staged models.
        table: releases.json of the package; repository and commit of known releases stay as long as the weights do.
        recipes: the folder of recipes, of which RESULTS.md lists those that have not run.
        measured: the model that was measured just now, whose verdicts SHA256SUMS does not know yet.

    Returns:
        The folders.

    Raises:
        ValueError, FileNotFoundError: naming what differs.
    """
    folders = sorted(path.parent for path in cards.glob(f'*/{RESULTS}'))
    known = read_table(table) if table.is_file() else {}
    releases = dict(known)  # those without a folder here stay
    for folder in folders:
        record = read_results(folder)
        verify(folder, record)
        _check_sums(folder, record, known.get(record['model']), record['model'] == measured)
    for folder in folders:
        record = read_results(folder)
        name, weights, best = record['model'], record['weights'], strongest(record)
        accuracy = best['result']['autoattack_acc'] if best else None
        old = known.get(name)
        kept = old if old is not None and old.sha256 == weights['sha256'] else None
        releases[name] = Release(
            name,
            weights['sha256'],
            weights['size'],
            accuracy,
            old.repo if old else f'{ORGANISATION}/{name}',
            kept.commit if kept else None,
        )
        _add_robustness(folder, record)
        _write(folder / 'README.md', model_card(folder))
        files = {path: file for path, file in files_of(folder).items() if path != 'SHA256SUMS'}
        _write(folder / 'SHA256SUMS', ''.join(f'{sha256(file)}  {path}\n' for path, file in files.items()))
    write_table(releases, table)
    _write(cards / 'RESULTS.md', results_page(cards, recipes))
    return folders


def files_of(folder: Path) -> dict[str, Path]:
    """Path within a staged folder -> file, sorted; without hidden files, such as what a killed writer leaves."""
    files = (path for path in sorted(folder.rglob('*')) if path.is_file() and not path.name.startswith('.'))
    return {path.relative_to(folder).as_posix(): path for path in files}


_FILES = {
    *(WEIGHTS, RESULTS, HYPER_PARAMETERS, 'config.json', 'README.md', 'LICENSE', 'SHA256SUMS', 'summary.csv'),
    *('training.png', 'adversarial.png'),
}
"""What a release holds, beside the verdicts of its measurements."""


def verify(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a staged folder that holds something else than a release, or other weights and verdicts than its record.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong.
    """
    allowed = _FILES | {f'{FLAGS}/{item["key"]}.npz' for item in record['measurements']}
    for path in folder.rglob('*'):
        if path.is_symlink():
            raise ValueError(f'{path} is a symbolic link; put the file itself there')
    for name in files_of(folder):
        if name not in allowed:
            raise ValueError(f'{folder / name} is no part of a release; take it away')
    weights, path = record['weights'], folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; fetch it again')
    if (found := sha256(path)) != weights['sha256']:
        raise ValueError(
            f'{path} has SHA-256 {found}, {RESULTS} says {weights["sha256"]}; fetch both again, or stage the run again '
            'with --overwrite'
        )
    for item in record['measurements']:
        RobustnessResult(**item['result']).check_verdicts(folder / FLAGS / f'{item["key"]}.npz')


def _check_sums(folder: Path, record: dict[str, Any], known: Release | None, measured: bool) -> None:
    """Refuse weights and verdicts that changed since SHA256SUMS was written; staging takes it away."""
    if not (folder / 'SHA256SUMS').is_file():
        return
    for name, digest in _read_sums(folder).items():
        held = name == WEIGHTS or (name.startswith(f'{FLAGS}/') and not measured)
        if held and (not (folder / name).is_file() or sha256(folder / name) != digest):
            raise ValueError(f'{folder / name} is not the file of SHA256SUMS; fetch it again, or measure again')
    if known is not None and known.sha256 != record['weights']['sha256']:
        raise ValueError(
            f'the table of releases has other weights of {record["model"]}, SHA-256 {known.sha256}; fetch it and '
            f'{folder} again, or stage the run again with --overwrite'
        )


def _read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS, path -> digest."""
    try:
        lines = (folder / 'SHA256SUMS').read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError:
        raise ValueError(f'{folder / "SHA256SUMS"} is damaged; fetch it again') from None
    parts = [line.partition('  ') for line in lines]
    return {name: digest for digest, _, name in parts}


def check(folder: Path) -> None:
    """Refuse a staged folder whose files are not those of its SHA256SUMS, or do not belong together.

    Raises:
        ValueError: naming the first file that is missing, extra or different, or what contradicts the record.
    """
    record, listed = read_results(folder), _read_sums(folder)
    verify(folder, record)
    there = set(files_of(folder)) - {'SHA256SUMS'}
    for name in sorted(there ^ set(listed)):
        what = 'is missing' if name in listed else 'is not listed in SHA256SUMS'
        raise ValueError(f'{folder / name} {what}; type: python -m timm_robust.staging render')
    for name, digest in listed.items():
        if sha256(folder / name) != digest:
            raise ValueError(f'{folder / name} is not the file of SHA256SUMS; fetch it again, or render')
    if _text_of(model_card(folder)) != _text_of((folder / 'README.md').read_text(encoding='utf-8')):
        raise ValueError(f'{folder / "README.md"} does not tell what {RESULTS} holds; render')
    load_model(folder)


def _text_of(card: str) -> str:
    """A card without the metadata at its head, whose form is the business of the Hub's client."""
    return card.split('\n---\n', 1)[-1]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    keep_freed_memory()
    table = args.table or (TABLE if args.cards == STAGED else args.cards.parent / TABLE.name)
    measured = args.name if args.command == 'measure' else None
    for old in args.cards.glob('.*/old'):  # of a command killed between two renames
        recover_folder(args.cards / old.parent.name[1:].rpartition('.')[0])
    if args.command == 'stage':
        stage(args.run, args.name, cards=args.cards, notes=args.note, overwrite=args.overwrite)
    elif args.command == 'measure':
        world = World.join(args.device)
        data = load_dataset(args.dataset, args.data_dir, args.split).to(world.device)
        settings = {key: getattr(args, key) for key in ('attack', 'n', 'batch_size', 'seed', 'split', 'state_dir')}
        settings |= {'device': world.device, 'world': world, 'progress': None if world.rank else say}
        measure(args.cards / args.name, data, ' '.join(args.note) or None, eps=args.eps, **settings)
        world.leave()
        if world.rank:
            return 0
    for folder in render(args.cards, table, args.recipes, measured):
        check(folder)
    return 0


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
    add = commands.add_parser('measure', help='measure staged weights and keep the verdict on every image').add_argument
    add('name', metavar='NAME', help='<arch>.<tag>')
    add('--data-dir', required=True, help='folder that holds the data')
    add('--dataset', default='cifar10', help=', '.join(DATASETS))
    add('--split', default='test', help=', '.join(SPLITS))
    add('-n', type=count, help='number of images, the first of the split; all if not given')
    add('--attack', default='autoattack', choices=ATTACKS, help='the strongest attack to run; PGD always runs')
    add('--batch-size', type=count, default=250, help="images a batch; AutoAttack's random numbers depend on it")
    add('--eps', help='radius, such as 8/255; that of the measurements before, or else of training')
    add('--seed', type=whole_number(0, 2**32 - 1), default=0, metavar='N', help='seed of all attacks')
    add('--state-dir', help="keep AutoAttack's finds there; type the same again to go on after a kill")
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    commands.add_parser('render', help='write cards, check sums, the table of releases and RESULTS.md')
    for one in commands.choices.values():
        one.add_argument('--cards', type=Path, default=STAGED, help='folder of staged models')
        one.add_argument('--table', type=Path, help="table of releases; the package's, or that beside other --cards")
        one.add_argument('--recipes', type=Path, default=STAGED.parent / 'train/recipes', help='folder of recipes')
        one.add_argument('--note', action='append', default=[], help='what the reader of the card must know')
    return parser


def _check_alike(record: dict[str, Any], dataset: str, split: str, threat_model: ThreatModel) -> None:
    """Refuse training images, and another data set, split or radius than those of the measurements before."""
    if split == 'train':
        raise ValueError(f'{record["model"]} was trained on such images; a release is measured with --split test')
    for result in (item['result'] for item in record['measurements']):
        there, wished = f'{result["dataset"]} {result["split"]}', f'{dataset} {split}'
        if result['attack'] != 'none':
            there, wished = f'{there} at {result["norm"]} {result["eps_text"]}', f'{wished} at {threat_model}'
        if there != wished:
            raise ValueError(
                f'{record["model"]} was measured on {there}, and keeps to it, not {wished}; to begin anew, stage '
                'the run again with --overwrite'
            )


def _add_robustness(folder: Path, record: dict[str, Any]) -> None:
    """The robustness block of config.json: what the strongest measurement found."""
    path = folder / 'config.json'
    config, best = read_object(path), strongest(record)
    keys = ('dataset', 'split', 'n', 'norm', 'eps_text', 'attack', 'clean_acc', 'pgd_acc', 'apgd_acc', 'autoattack_acc')
    config['robustness'] = {key: best['result'][key] for key in keys} if best else None
    _write(path, json.dumps(config, indent=2))


def _hyper_parameters(recipe: Recipe) -> str:
    """Every setting of the training, without those that tell of the machine."""
    settings = {key: value for key, value in asdict(recipe).items() if key not in _PRIVATE}
    if settings['extra_data']:
        settings['extra_data'] = Path(settings['extra_data']).name
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _license() -> str:
    """The text of the package's licence."""
    files = metadata.files('timm-robust') or []
    for file in (STAGED.parent / 'LICENSE', *(file.locate() for file in files if file.name == 'LICENSE')):
        if Path(str(file)).is_file():
            return Path(str(file)).read_text()
    raise FileNotFoundError('the LICENSE of timm-robust is missing; install the package again')


def _write_json(path: Path, record: dict[str, Any]) -> None:
    _write(path, json.dumps(record, indent=2, allow_nan=False) + '\n')


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


if __name__ == '__main__':
    sys.exit(main())
