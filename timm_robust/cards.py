"""Model cards and the comparison of all releases: text made from the files of model_cards/, never edited by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from .checkpoint import HYPER_PARAMETERS, read_hyper_parameters
from .papers import Paper, extra_data_of, papers_of
from .releases import split_name
from .results import check_types, read_object, read_staged
from .threat_model import LEADERBOARD_EPS

RESULTS, FLAGS = 'results.json', 'flags'
PILOT = 'studies/progressive_resizing/record.json'
_ATTACKS = ('autoattack', 'apgd', 'pgd', 'none')  # the strongest first
_HUB_DATA = {'cifar10': ('uoft-cs/cifar10', 'CIFAR-10'), 'cifar100': ('uoft-cs/cifar100', 'CIFAR-100')}
_RESAMPLES = 10_000


def read_results(folder: Path) -> dict[str, Any]:
    """The record of a staged model: 'model', 'weights', 'training' and 'measurements'.

    Raises:
        FileNotFoundError: if nothing is staged there.
        ValueError: if the record is damaged, or of another model than its folder.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; type: python -m timm_robust.staging stage RUN {folder.name}')
    record = read_staged(path)
    split_name(record['model'])
    if record['model'] != folder.resolve().name:
        raise ValueError(f'{path} is of {record["model"]}; a folder has the name of its model')
    return record


_HYPER = {
    'model': str,
    'dataset': str,
    'norm': str,
    'eps': float | str,
    'loss': str,
    'attack': str,
    'steps': int,
    'beta': float,
    'batch_size': int,
    'sched': str,
    'lr': float,
    'val_size': int,
}


def read_hyper(folder: Path) -> dict[str, Any]:
    """The settings of a staged model's training, those that a card tells of held against their types.

    Raises:
        ValueError: if one is missing or wrong.
    """
    settings = read_hyper_parameters(folder)
    check_types(settings, _HYPER, str(folder / HYPER_PARAMETERS))
    if settings['norm'] not in LEADERBOARD_EPS:
        raise ValueError(f'{folder / HYPER_PARAMETERS}: norm {settings["norm"]!r} is none')
    return settings


def strongest(record: dict[str, Any]) -> dict[str, Any] | None:
    """The measurement with the strongest attack, among equals that on most images; None if there is none."""
    attacked = [item for item in record['measurements'] if item['result']['attack'] != 'none']
    return min(attacked, key=lambda m: (_ATTACKS.index(m['result']['attack']), -m['result']['n']), default=None)


def robust_acc(result: dict[str, Any]) -> float | None:
    """Share of images that resist the strongest attack of a measurement; None where none ran."""
    keys = {'autoattack': 'autoattack_acc', 'apgd': 'apgd_acc', 'pgd': 'pgd_acc'}
    if result['attack'] == 'apgd' and result['apgd_acc'] is None:
        return float(list(result['per_attack'].values())[-1])
    return result[keys[result['attack']]] if result['attack'] in keys else None


def attack_title(result: dict[str, Any]) -> str:
    """What the strongest attack of a measurement is called; the first two of AutoAttack are never called AutoAttack."""
    pgd, apgd = f'PGD-{result.get("steps")}', 'APGD-CE' if result.get('apgd_acc') is None else 'APGD-CE + APGD-T'
    return {'autoattack': 'AutoAttack', 'apgd': apgd, 'pgd': pgd, 'none': 'clean'}[result['attack']]


def model_card(folder: Path) -> str:
    """README.md of a staged model, with the metadata that the Hub reads.

    Args:
        folder: model_cards/<arch>.<tag>, with results.json and train_hparams.yaml.
    """
    record, hyper = read_results(folder), read_hyper(folder)
    name, weights = record['model'], record['weights']
    data_set, papers = name.partition('.')[2].split('_')[-2], papers_of(name, hyper)
    lines = ['---', _metadata(record, hyper, data_set, papers), '---', '', f'# {name}', '', _summary(record, hyper)]
    lines += ['', '## Use', '', '```python', 'import timm', 'import timm_robust  # registers the models', '']
    lines += [f"model = timm.create_model('{name}', pretrained=True).eval()  # images in, logits out", '```']
    lines += ['', _input(folder, hyper), '', '## Results', '']
    lines += _measurements(record)
    if (folder / 'adversarial.png').is_file():
        lines += ['', '![adversarial examples](adversarial.png)']
    lines += ['', '## Training', '', *_training(record, hyper)]
    if (folder / 'training.png').is_file():
        lines += ['', '![course of training](training.png)']
    lines += ['', '## Limits', '', *limits(record)]
    lines += ['', '## Papers', '', *[f'- {who}: {_link(where)}' for who, where in papers]]
    lines += [
        '',
        f'`model.safetensors`: {weights["size"]:,} bytes, {weights["parameters"]:,} parameters, matrices in fp16,',
    ]
    lines += [f'SHA-256 `{weights["sha256"]}`. Licence: Apache-2.0.', '']
    return '\n'.join(lines)


def _input(folder: Path, hyper: dict[str, Any]) -> str:
    """What images the network takes."""
    path = folder / 'config.json'
    config = read_object(path) if path.is_file() else {'pretrained_cfg': {}}
    check_types(config, {'pretrained_cfg': dict[str, Any]}, str(path))
    statistics = {key: config['pretrained_cfg'].get(key) for key in ('mean', 'std')}
    check_types(statistics, dict.fromkeys(statistics, list[float] | None), str(path))
    mean, std = statistics['mean'] or (0,), statistics['std'] or (1,)
    text = 'Images are in [0, 1]. Mean and standard deviation are 0 and 1: do not normalise.'
    if set(mean) != {0} or set(std) != {1}:
        text = f'Images are in [0, 1], then normalised by mean {tuple(mean)} and standard deviation {tuple(std)}.'
    return text + (f' They are resized to {hyper["img_size"]} pixels.' if hyper.get('img_size') else '')


def results_page(cards: Path, recipes: Path | None = None) -> str:
    """RESULTS.md: every released model, the activations compared image by image, and the recipes that have not run.

    Args:
        cards: the folder of staged models.
        recipes: the folder of recipes.
    """
    records = [read_results(path.parent) for path in sorted(cards.glob(f'*/{RESULTS}'))]
    lines = [
        '# Results',
        '',
        'Generated by `python -m timm_robust.staging render` from `*/results.json` and `*/flags/`.',
    ]
    lines += ['Accuracies in percent with one standard error, on the first n images of the test split, for the weights']
    lines += ['exactly as stored; at Linf 8/255 or L2 0.5 where no radius is named.', '']
    lines += ['| model | clean | robust | training | images/s | alpha | beta |', '|---|---|---|---|---|---|---|']
    lines += [_row(record) for record in records] or ['| none yet | | | | | | |']
    notes = dict.fromkeys(n for r in records for n in [*r['training']['notes'], *measurement_notes(r)])
    lines += ['', *[f'- {note}' for note in notes]] if notes else []
    lines += ['', '## Does PSSiLU help?', '', *_question(cards, records)]
    if recipes is not None and (recipes.parent / PILOT).is_file():
        lines += ['', '## Do smaller images first pay?', '', *_stages(read_object(recipes.parent / PILOT))]
    if recipes is not None and recipes.is_dir():
        done = {record['model'] for record in records}
        waiting = [path for path in sorted(recipes.glob('*.yaml')) if path.stem not in done]
        lines += [
            '',
            '## What has not run',
            '',
            'Each with the command that runs it (the head of the file says on what,',
        ] * bool(waiting)
        lines += ['and for how long):', ''] * bool(waiting)
        lines += [f'- `python train/adv_train.py -c train/recipes/{path.name} --data-dir DIR`' for path in waiting]
    return '\n'.join([*lines, ''])


def paired_difference(a: np.ndarray, b: np.ndarray, resamples: int = _RESAMPLES) -> tuple[float, float, float]:
    """Mean of a - b over images, and its 95 % interval by a paired bootstrap (percentiles, seed 0).

    Args:
        a: verdicts [n] of one model, True where it is right under attack.
        b: verdicts [n] of the other on the same images.
        resamples: how often the images are drawn again.

    Raises:
        ValueError: if the two are not of the same images.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f'verdicts on {len(a)} and {len(b)} images cannot be paired; measure both on the same')
    difference = a.astype(float) - b.astype(float)
    values, counts = np.unique(difference, return_counts=True)  # resampling images is drawing from their counts
    draws = np.random.default_rng(0).multinomial(len(a), counts / len(a), size=resamples)
    low, high = np.percentile(draws @ values / len(a), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def _metadata(record: dict[str, Any], hyper: dict[str, Any], data_set: str, papers: list[Paper]) -> str:
    """The YAML at the head of the card."""
    hub_id, pretty = _HUB_DATA.get(data_set, (data_set, data_set))
    results = []
    for item in record['measurements']:
        result = item['result']
        where = {
            'task_type': 'image-classification',
            'task_name': 'Image Classification',
            'dataset_type': hub_id,
            'dataset_name': pretty,
            'dataset_split': result['split'],
            'metric_type': 'accuracy',
        }
        args = {'n': result['n']}
        robust = robust_acc(result)
        shares = {'clean': result['clean_acc']} if robust is None else {attack_title(result): robust}
        for title, share in shares.items():
            if robust is not None:
                args |= {'attack': result['attack'], 'norm': result['norm'], 'eps': result['eps_text']}
            label = f'{title} accuracy, first {result["n"]} images'
            results.append(EvalResult(**where, metric_name=label, metric_value=round(100 * share, 2), metric_args=args))
    extra = extra_data_of(record['model'], hyper)
    tags = ['timm', 'image-classification', 'adversarial-robustness', 'adversarial-training', 'robustbench']
    data = ModelCardData(
        license='apache-2.0',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=tags + [f'arxiv:{where}' for _, where in papers if where[0].isdigit()],
        datasets=[hub_id, *([extra.hub] if extra and extra.hub else [])],
        metrics=['accuracy'],
        model_name=record['model'],
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _summary(record: dict[str, Any], hyper: dict[str, Any]) -> str:
    """What the model is, in two sentences."""
    best, activation = strongest(record), record['training']['activation']
    text = f'{hyper["model"]} trained adversarially on {hyper["dataset"]} against {hyper["norm"]} {hyper["eps"]}.'
    if activation:
        shape = ', '.join(f'{key} {value:.4g}' for key, value in activation.items() if key != 'max_curvature')
        text += f' One activation serves the whole network; it learned {shape}.'
    if best is not None:
        result = best['result']
        text += (
            f' {attack_title(result)} accuracy at {result["eps_text"]} {percent(robust_acc(result), result["n"])} %, '
            f'clean {percent(result["clean_acc"], result["n"])} % (first {result["n"]} {result["split"]} images).'
        )
    return text


def _measurements(record: dict[str, Any]) -> list[str]:
    """The table of measurements, and the command that repeats each."""
    if not record['measurements']:
        return ['Not measured yet.']
    lines = ['| attack | images | clean | robust | hardware, time |', '|---|---|---|---|---|']
    for item in record['measurements']:
        result, robust = item['result'], robust_acc(item['result'])
        clean, share = percent(result['clean_acc'], result['n']), percent(robust, result['n'])
        cost = f'{result["hardware"]}, {hours(result["wall_time_s"])}'
        at = '' if robust is None else f', {result["norm"]} {result["eps_text"]}'
        lines.append(f'| {attack_title(result)}{at} | first {result["n"]} | {clean} | {share} | {cost} |')
    lines += [
        '',
        'Percent, with one standard error of n images. The verdict on every image is in `flags/`. To repeat:',
        '',
    ]
    lines += ['```bash']
    for item in record['measurements']:
        result = item['result']
        threat = f' --norm {result["norm"]} --eps {result["eps_text"]}' if result['attack'] != 'none' else ''
        data = '' if result['dataset'] == 'cifar10' else f' --dataset {result["dataset"]}'
        data += '' if result['split'] == 'test' else f' --split {result["split"]}'
        lines.append(
            f'python -m timm_robust.evaluate {record["model"]} --data-dir DIR{data} --attack {result["attack"]} '
            f'-n {result["n"]}{threat} --batch-size {result["batch_size"]} --seed {result["seed"]}'
        )
    lines.append('```')
    if any(item['result']['attack'] == 'apgd' for item in record['measurements']):
        lines += [
            '',
            'APGD-CE + APGD-T are the first two of the four attacks of AutoAttack: an upper bound of its number.',
        ]
    return lines + [f'\n{note}' for note in measurement_notes(record)]


def measurement_notes(record: dict[str, Any]) -> list[str]:
    """What was noted of the images of its measurements."""
    return list(dict.fromkeys(item['note'] for item in record['measurements'] if item['note']))


def _training(record: dict[str, Any], hyper: dict[str, Any]) -> list[str]:
    """The recipe in words, what it cost, and the command."""
    training = record['training']
    origin = training['origins'][-1] if training['origins'] else {}
    loss = f'{hyper["loss"]} loss' + (f', beta {hyper["beta"]:g}' if hyper['loss'] in ('trades', 'mart') else '')
    steps = f', {hyper["steps"]} steps' if hyper['attack'] in ('pgd', 'apgd') else ''
    extra = extra_data_of(record['model'], hyper)
    lines = [
        f'- {loss}; attack {hyper["attack"]}{steps}, {hyper["norm"]} {hyper["eps"]}; {training["epochs"]} epochs, '
        f'{training["steps"]:,} steps of {hyper["batch_size"]} images; {hyper["sched"]} rate, peak {hyper["lr"]:g}.',
        *[f'- From step {each["step"]:,} on: {changes_text(each["changes"])}.' for each in training.get('changes', [])],
        *([f'- {hyper["extra_fraction"]:.0%} of each batch is extra data: {extra.text}.'] if extra else []),
        f'- {hours(training["seconds"])} on {trained_on(training)}, {training["images_per_s"]:g} images/s; '
        f'versions: {_versions(origin)}; {"last " * (len(training["origins"]) > 1)}commit `{origin.get("commit")}`.',
        f'- Weights of epoch {training["epoch"]} ({training["weights"]}), the best by PGD accuracy on '
        f'{hyper["val_size"]} images held out of the training set; the test set was never looked at.',
        f'- The recipe: `train/recipes/{record["model"]}.yaml`; every setting of this run: `train_hparams.yaml`; its '
        'course: `summary.csv`. To train it again:',
        '',
        '```bash',
        f'python train/adv_train.py -c model_cards/{record["model"]}/train_hparams.yaml --data-dir DIR',
        '```',
    ]
    return lines


def changes_text(changes: dict[str, list[Any]]) -> str:
    """The settings and images that a resumed run changed, in words."""
    return ', '.join(f'{name} {now} instead of {was}' for name, (was, now) in changes.items())


def limits(record: dict[str, Any]) -> list[str]:
    """What the reader must not overlook."""
    lines = [f'- {note}' for note in record['training']['notes']]
    warnings = dict.fromkeys(text for item in record['measurements'] for text in item['result']['warnings'])
    lines += [f'- Evaluation warned: {text}' for text in warnings]
    best = strongest(record)
    if best is not None and best['result']['n'] < 10_000:
        lines.append(f'- Robust accuracy is known from {best["result"]["n"]} images only; mind the standard error.')
    return [*lines, '- Robust against the threat models of the measurements above, and measured against no other.']


def _row(record: dict[str, Any]) -> str:
    """A model's line of RESULTS.md."""
    training, activation = record['training'], record['training']['activation']
    clean = max((m['result'] for m in record['measurements']), key=lambda result: result['n'], default=None)
    cell = '' if clean is None else f'{percent(clean["clean_acc"], clean["n"])} (n {clean["n"]})'
    robust = [
        f'{attack_title(result)}{_at(result)} {percent(robust_acc(result), result["n"])} (n {result["n"]})'
        for result in (item['result'] for item in record['measurements'])
        if result['attack'] != 'none'
    ]
    shape = [f'{activation[key]:.4g}' if key in activation else '' for key in ('alpha', 'beta')]
    return (
        f'| [{record["model"]}]({record["model"]}) | {cell} | {"; ".join(robust)} | {training["epochs"]} epochs, '
        f'{hours(training["seconds"])}, {trained_on(training)} | {training["images_per_s"]:g} | {shape[0]} | '
        f'{shape[1]} |'
    )


def _stages(pilot: dict[str, Any]) -> list[str]:
    """Two runs of equal arithmetic, with progressive resizing and without; what `measure.py` beside PILOT wrote."""
    origin, n = pilot['origin'], pilot['n']
    lines = [
        '`resnet18_pssilu` at half width on CIFAR-10, N-FGSM at Linf 8/255: two runs of equal FLOPs, all else equal,',
        f'one each; clean and PGD-10 accuracy of the last weights on {n} images held out of the training set.',
        f'{origin["hardware"]}, one core a run, shared with other work,',
        f'torch {origin["versions"]["torch"]}, commit `{origin["commit"]}`.',
        'The commands: `train/studies/README.md`.',
        '',
        '| pixels a side = epochs | images seen | hours | clean | PGD-10 |',
        '|---|---|---|---|---|',
    ]
    for arm in pilot['arms']:
        stages = ', '.join(f'{side} = {epochs}' for side, epochs in (arm['stages'] or {32: arm['epochs']}).items())
        clean, robust = percent(arm['clean_acc'], n), percent(arm['pgd_acc'], n)
        lines.append(f'| {stages} | {arm["images"]:,} | {arm["hours"]} | {clean} | {robust} |')
    clean, robust = (
        '{:+.1f} ({:+.1f} to {:+.1f})'.format(*(100 * value for value in pilot['gains'][key]))
        for key in ('clean_correct', 'robust')
    )
    gain = 'Gain of the stages in points, paired over the images, with its 95 % interval'
    return [*lines, '', f'{gain}: clean {clean}, PGD-10 {robust}.']


def _at(result: dict[str, Any]) -> str:
    """The radius of a measurement, where it is not the leaderboard's."""
    return '' if result['eps_text'] == LEADERBOARD_EPS[result['norm']] else f' at {result["norm"]} {result["eps_text"]}'


def _question(cards: Path, records: list[dict[str, Any]]) -> list[str]:
    """PSSiLU against every other activation, at equal recipe and equal images."""
    lines = [
        'The paper reports +4.54 points of AutoAttack accuracy over ReLU for ResNet-18 with 6 million generated images',
        '(Dai, Mahloujifar, Mittal 2021, abstract). We know of no published gain over SiLU, nor without those images.',
        'Below: robust accuracy of PSSiLU minus that of the other, same recipe, same images, one training run each,',
        'and the 95 % interval of a paired bootstrap over images. It does not cover the luck of the training seed.',
        '',
        '| recipe | against | attack | n | PSSiLU | other | difference |',
        '|---|---|---|---|---|---|---|',
    ]
    by_name, rows = {record['model']: record for record in records}, []
    for name, record in by_name.items():
        arch, _, tag = name.partition('.')
        family, _, act = arch.rpartition('_')
        if act != 'pssilu':
            continue
        others = [by_name[other] for other in by_name if other.startswith(f'{family}_') and other != name]
        for other in (record for record in others if record['model'].partition('.')[2] == tag):
            theirs = {item['key']: item['result'] for item in other['measurements']}
            for item in record['measurements']:
                if item['result']['attack'] != 'none' and _alike(item['result'], theirs.get(item['key'])):
                    rows.append(_pair(cards, name, other['model'], item))
    return lines + (rows or ['| none yet | | | | | | |'])


def _alike(result: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether two measurements are of the same images by the same attack."""
    keys = ('attack', 'n', 'data_sha256', 'split', 'norm', 'eps', 'steps', 'restarts', 'batch_size', 'seed')
    return other is not None and all(result.get(key) == other.get(key) for key in keys)


def _pair(cards: Path, name: str, other: str, item: dict[str, Any]) -> str:
    """A line of the comparison, with its verdict."""
    verdicts = []
    for model in (name, other):
        with np.load(cards / model / FLAGS / f'{item["key"]}.npz', allow_pickle=False) as flags:
            verdicts.append(flags['robust'])
    difference, low, high = (100 * value for value in paired_difference(*verdicts))
    found = 'higher' if low > 0 else 'lower' if high < 0 else 'no difference shown'
    a, b = (100 * verdict.mean() for verdict in verdicts)
    return (
        f'| {name.partition(".")[2]} | {other.partition(".")[0]} | {attack_title(item["result"])} | '
        f'{item["result"]["n"]} | {a:.2f} | {b:.2f} | {difference:+.2f} ({low:+.2f} to {high:+.2f}): {found} |'
    )


def percent(share: float | None, n: int) -> str:
    """A fraction in percent with its standard error."""
    if share is None:
        return ''
    return f'{100 * share:.2f} ± {100 * math.sqrt(share * (1 - share) / n):.2f}'


def trained_on(training: dict[str, Any]) -> str:
    """The hardware of every piece of a training, each kind once."""
    return ' and '.join(dict.fromkeys(origin['hardware'] for origin in training['origins'])) or 'unknown hardware'


def hours(seconds: float) -> str:
    """A duration as people say it."""
    for size, unit in ((3600, 'hours'), (60, 'minutes')):
        if seconds >= size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} seconds'


def _versions(origin: dict[str, Any]) -> str:
    return ', '.join(f'{package} {version}' for package, version in origin.get('versions', {}).items() if version)


def _link(where: str) -> str:
    return f'https://arxiv.org/abs/{where}' if where[0].isdigit() else where
