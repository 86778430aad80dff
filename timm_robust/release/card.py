"""Model cards: text made from the files of model_cards/, never edited by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..attacks import TRAINING_ATTACKS
from ..data import DATASETS, is_named_by_folder, is_stream, same_split
from ..results import RobustnessResult, check_types, read_object
from ..training import HELD_OUT, LOSSES
from ..weights import is_ours
from .papers import Paper, extra_data_of, paper_link, papers_of
from .record import (
    hours,
    measurement_notes,
    percent,
    read_hyper,
    read_results,
    results_of,
    strongest,
    trained_on,
)

LICENSE = 'apache-2.0'
"""Of this project, as the Hub spells it."""
_HUB_LICENSES = {
    *(LICENSE, 'mit', 'bsd-2-clause', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0'),
    *('cc-by-nc-sa-4.0', 'gpl-3.0', 'lgpl-3.0', 'mpl-2.0', 'apple-ascl', 'apple-amlr', 'gemma', 'openrail'),
}
"""Those that the Hub knows by name, of those that are met."""
_HUB_DATA = {'cifar10': ('uoft-cs/cifar10', 'CIFAR-10'), 'cifar100': ('uoft-cs/cifar100', 'CIFAR-100')}


def model_card(folder: Path) -> str:
    """README.md of a staged model, with the metadata that the Hub reads.

    Args:
        folder: model_cards/<arch>.<tag>, with results.json and train_hparams.yaml.
    """
    record, hyper = read_results(folder), read_hyper(folder)
    name, weights = record['model'], record['weights']
    data_set, papers = name.partition('.')[2].split('_')[-2], papers_of(name, hyper)
    config, license_id = _config(folder), read_license(folder)
    arguments = arguments_of(hyper.get('model_kwargs') or {})
    head = _metadata(record, hyper, data_set, papers, license_id)
    lines = ['---', head, '---', '', f'# {name}', '', _summary(record, hyper)]
    lines += ['', '## Use', '', '```python', 'import timm', 'import timm_robust  # registers the models', '']
    lines += [f"model = timm.create_model('{_address(name)}', pretrained=True).eval()  # images in, logits out", '```']
    if not is_ours(name):
        lines += ['', 'USER is the owner of the page that you read this on.']
    if arguments:
        lines += ['', f'It is made with {arguments}, and needs timm 1.0.31 or newer, which reads that in config.json.']
    lines += ['', _input(config, hyper), '', '## Results', '']
    lines += _measurements(record, hyper)
    if (folder / 'adversarial.png').is_file():
        lines += ['', '![adversarial examples](adversarial.png)']
    lines += ['', '## Training', '', *_training(record, hyper)]
    if (folder / 'training.png').is_file():
        lines += ['', '![course of training](training.png)']
    lines += ['', '## Limits', '', *_limits(record, hyper)]
    lines += ['', '## Papers', '', *[f'- {who}: {paper_link(where)}' for who, where in papers]]
    lines += [
        '',
        f'`model.safetensors`: {weights["size"]:,} bytes, {weights["parameters"]:,} parameters, matrices in fp16,',
    ]
    lines += [f'SHA-256 `{weights["sha256"]}`. Licence: {license_id.replace("apache", "Apache")}.', '']
    return '\n'.join(lines)


def _address(name: str) -> str:
    """What timm and the commands call a release."""
    return name if is_ours(name) else f'hf-hub:USER/{name}'


def arguments_of(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a network is made with, beside the statistics of its input, which its pretrained_cfg holds."""
    return {key: value for key, value in model_kwargs.items() if key != 'pretrained_cfg_overlay'}


def start_of(record: dict[str, Any], hyper: dict[str, Any]) -> str | None:
    """The weights that training began from: a release, timm's as the Hub calls them, or a file's name."""
    found: str | None = record['training'].get('start') or hyper.get('initial_checkpoint')
    return found


def _config(folder: Path) -> dict[str, Any]:
    """What a staged config.json says of images and licence."""
    path = folder / 'config.json'
    config = read_object(path)
    check_types(config, {'pretrained_cfg': dict[str, Any]}, str(path))
    found: dict[str, Any] = config['pretrained_cfg']
    kinds = {'mean': list[float] | None, 'std': list[float] | None, 'license': str | None}
    check_types({key: found.get(key) for key in kinds}, kinds, str(path))
    return found


def read_license(folder: Path) -> str:
    """The licence of a staged model, as the Hub spells it."""
    return str(_config(folder).get('license') or LICENSE)


def _input(config: dict[str, Any], hyper: dict[str, Any]) -> str:
    """What images the network takes."""
    mean, std = config.get('mean') or (0,), config.get('std') or (1,)
    text = 'Images are in [0, 1]. Mean and standard deviation are 0 and 1: do not normalise.'
    if set(mean) != {0} or set(std) != {1}:
        text = f'Images are in [0, 1], then normalised by mean {tuple(mean)} and standard deviation {tuple(std)}.'
    return text + (f' They are resized to {hyper["img_size"]} pixels.' if hyper.get('img_size') else '')


def _metadata(
    record: dict[str, Any], hyper: dict[str, Any], data_set: str, papers: list[Paper], license_id: str
) -> str:
    """The YAML at the head of the card."""
    results, trained = [], hyper['dataset'].rpartition('/')[2]
    seen = {trained, *(result.dataset for result in results_of(record))}
    hub_id = _HUB_DATA[data_set][0] if data_set in seen & _HUB_DATA.keys() else None
    for result in (item['result'] for item in record['measurements'] if not item['note']):  # else not that data set
        share, args = result.robust_acc, dict[str, Any](n=result.n)
        kind, pretty = _HUB_DATA.get(result.dataset, (result.dataset, result.dataset))
        if share is None:
            share = result.clean_acc
        else:
            args |= {'attack': result.attack, 'norm': result.norm, 'eps': result.eps_text}
        results.append(
            EvalResult(
                task_type='image-classification',
                task_name='Image Classification',
                dataset_type=kind,
                dataset_name=pretty,
                dataset_split=result.split,
                metric_type='accuracy',
                metric_name=f'{result.attack_title} accuracy, {_which(result)} images',
                metric_value=round(100 * share, 2),
                metric_args=args,
            )
        )
    extra = extra_data_of(record['model'], hyper)
    tags = ['timm', 'image-classification', 'adversarial-robustness', 'adversarial-training', 'robustbench']
    known = license_id in _HUB_LICENSES
    data = ModelCardData(
        license=license_id if known else 'other',
        license_name=None if known else license_id,
        base_model=_base_model(record, hyper),
        library_name='timm',
        pipeline_tag='image-classification',
        tags=tags + [f'arxiv:{where}' for _, where in papers if where[0].isdigit()],
        datasets=[*([hub_id] if hub_id else []), *([extra.hub] if extra and extra.hub else [])],
        metrics=['accuracy'],
        model_name=record['model'],
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _base_model(record: dict[str, Any], hyper: dict[str, Any]) -> str | None:
    """The Hub's name of the weights that training began from; None for random ones, and for a file of somebody's."""
    start = start_of(record, hyper)
    if start is None or is_ours(start):
        return start and f'timm-robust/{start}'
    return None if hyper.get('initial_checkpoint') else f'timm/{start}'


def _summary(record: dict[str, Any], hyper: dict[str, Any]) -> str:
    """What the model is, in two sentences."""
    best, activation = strongest(results_of(record)), record['training']['activation']
    data = record['model'].split('_')[-2] if is_named_by_folder(hyper['dataset']) else hyper['dataset']
    how = f'adversarially on {data} against {hyper["norm"]} {hyper["eps"]}'
    text = f'{hyper["model"]} trained {how if _is_attacked(hyper) else f"on {data} without attacks"}.'
    if activation:
        shape = ', '.join(f'{key} {value:.4g}' for key, value in activation.items() if key != 'max_curvature')
        text += f' One activation serves the whole network; it learned {shape}.'
    if best is not None:
        text += (
            f' {best.attack_title} accuracy at {best.eps_text} {percent(best.robust_acc, best.n)} %, '
            f'clean {percent(best.clean_acc, best.n)} % ({_which(best)} {best.split} images).'
        )
    return text


def _measurements(record: dict[str, Any], hyper: dict[str, Any]) -> list[str]:
    """The table of measurements, and the command that repeats each."""
    results = results_of(record)
    if not results:
        return ['Not measured yet.']
    lines = ['| attack | images | clean | robust | hardware, time |', '|---|---|---|---|---|']
    for item in record['measurements']:
        result, mark = item['result'], '*' if item['note'] else ''
        clean, robust = percent(result.clean_acc, result.n), percent(result.robust_acc, result.n)
        at = '' if result.attack == 'none' else f', {result.norm} {result.eps_text}'
        cost = f'{result.hardware}, {hours(result.wall_time_s)}'
        lines.append(f'| {result.attack_title}{at} | {_which(result)}{mark} | {clean} | {robust} | {cost} |')
    lines += [
        '',
        'Percent, with one standard error of n images. The verdict on every image is in `flags/`. To repeat:',
        '',
    ]
    lines += ['```bash', *[_command(result, hyper) for result in results], '```']
    if any(result.attack == 'apgd' for result in results):
        lines += [
            '',
            'APGD-CE + APGD-T are the first two of the four attacks of AutoAttack: an upper bound of its number.',
        ]
    return lines + [f'\n\\* {note}' for note in measurement_notes(record)]


def _which(result: RobustnessResult) -> str:
    """How many images, and whether they are the first of their split, as those of a folder or a run are not."""
    return f'first {result.n}' if result.dataset in DATASETS and result.split != HELD_OUT else f'{result.n}'


def _command(result: RobustnessResult, hyper: dict[str, Any]) -> str:
    """What repeats a measurement; images that training held out are known to the folder of its run alone."""
    name, held_out = result.model, result.split == HELD_OUT
    words = [f'timm-robust measure {name} --run RUN' if held_out else f'timm-robust evaluate {_address(name)}']
    words.append('--data-dir DIR')
    if not held_out:
        kind = hyper['dataset']  # a folder's own name is none that --dataset takes
        dataset = kind if is_stream(kind) or result.dataset not in DATASETS else result.dataset
        words += [f'--dataset {dataset}'] if dataset != 'cifar10' else []
        words += [f'--split {result.split}'] if result.split != 'test' else []
    words.append(f'--attack {result.attack} -n {result.n}')
    if result.attack != 'none':
        words += [] if held_out else [f'--norm {result.norm}']
        words.append(f'--eps {result.eps_text}')
    return ' '.join([*words, f'--batch-size {result.batch_size} --seed {result.seed}'])


def _limits(record: dict[str, Any], hyper: dict[str, Any]) -> list[str]:
    """What the reader must not overlook."""
    results = results_of(record)
    lines = [f'- {note}' for note in record['training']['notes']]
    if any(result.split == HELD_OUT or same_split(result.split, hyper.get('val_split')) for result in results):
        lines.append('- The images of the table above chose the epoch: what is measured on them is too good.')
    warnings = dict.fromkeys(text for result in results for text in result.warnings)
    lines += [f'- Evaluation warned: {text}' for text in warnings]
    best = strongest(results)
    if best is not None and best.n < 10_000:
        lines.append(f'- {best.attack_title} accuracy is known from {best.n} images only; mind the standard error.')
    attacks = 'the attacks and radii of the table above, and no other' if best else 'no attack'
    return [*lines, f'- Measured against {attacks}.']


def _training(record: dict[str, Any], hyper: dict[str, Any]) -> list[str]:
    """The recipe in words, what it cost, and the command."""
    training = record['training']
    origin = training['origins'][-1] if training['origins'] else {}
    loss = f'{hyper["loss"]} loss' + (f', beta {hyper["beta"]:g}' if 'beta' in LOSSES[hyper['loss']].takes else '')
    steps = f', {hyper["steps"]} steps' if 'steps' in TRAINING_ATTACKS[hyper['attack']].takes else ''
    attack = f'attack {hyper["attack"]}{steps}, {hyper["norm"]} {hyper["eps"]}' if _is_attacked(hyper) else 'no attack'
    versions = ', '.join(f'{package} {version}' for package, version in origin.get('versions', {}).items() if version)
    extra = extra_data_of(record['model'], hyper)
    start = start_of(record, hyper)
    every = f'The recipe: `train/recipes/{record["model"]}.yaml`; every' if is_ours(record['model']) else 'Every'
    return [
        f'- {loss}; {attack}; {training["epochs"]} epochs, '
        f'{training["steps"]:,} steps of {hyper["batch_size"]} images; {hyper["sched"]} rate, peak {hyper["lr"]:g}.',
        *[f'- From step {each["step"]:,} on: {_changes(each["changes"])}.' for each in training.get('changes', [])],
        *([f'- It began from the weights `{start}`.'] if start else []),
        *([f'- {hyper["extra_fraction"]:.0%} of each batch is extra data: {extra.text}.'] if extra else []),
        f'- {hours(training["seconds"])} on {trained_on(training)}, {training["images_per_s"]:g} images/s; '
        f'versions: {versions}; {"last " if len(training["origins"]) > 1 else ""}commit `{origin.get("commit")}`.',
        f'- Weights of epoch {training["epoch"] + 1} of {training["epochs"]} ({training["weights"]}), '
        f'{_chosen_by(hyper)}.',
        f'- {every} setting of this run: `train_hparams.yaml`; its course: `summary.csv`. To train it '
        'again, in the folder of this card:',
        '',
        '```bash',
        'timm-robust train train_hparams.yaml --data-dir DIR',
        '```',
    ]


def _chosen_by(hyper: dict[str, Any]) -> str:
    """How the epoch was chosen, and whether the test set was looked at."""
    size, split, trained = hyper['val_size'], hyper.get('val_split'), hyper.get('train_split', 'train')
    split = None if split == 'auto' else split  # staged before that was found out
    what = f'{size:.0%} of the training images,' if 0 < size < 1 else f'{size:g} images'
    images = f'the images of the split {split}' if split else f'{what} held out of the training set'
    text = f'the best by {"PGD" if _is_attacked(hyper) else "clean"} accuracy on {images}'
    if not (split or size):
        text = 'the last, for nothing was held out'
    if trained == 'test':
        return f'{text}; it was trained on the split {trained}'
    return text if split == 'test' else f'{text}; the test set was never looked at'


def _is_attacked(hyper: dict[str, Any]) -> bool:
    """Whether the images of training were adversarial."""
    return hyper['loss'] != 'clean'


def _changes(changes: dict[str, list[Any]]) -> str:
    """The settings and images that a resumed run changed, in words."""
    return ', '.join(f'{name} {now} instead of {was}' for name, (was, now) in changes.items())
