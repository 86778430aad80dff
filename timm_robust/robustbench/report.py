"""Where a model stands among RobustBench's entries, and the folder that submits it.

The published numbers are in robustbench.json, taken from the model_info folder of RobustBench's repository.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision

from ..data import load_dataset
from ..files import atomic_file, atomic_folder, sha256
from ..release import FLAGS, ExtraData, attack_title, extra_data_of, percent, read_hyper, read_results, robust_acc
from ..threat_model import LEADERBOARD_EPS, parse_eps

TABLE = Path(__file__).with_name('published.json')
_MANDATORY = (
    *('link', 'name', 'authors', 'additional_data', 'number_forward_passes', 'dataset', 'venue', 'architecture'),
    *('eps', 'clean_acc', 'reported'),
)
_COLORS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00')
_COLUMNS = ('name', 'architecture', 'clean_acc', 'robust_acc', 'additional_data', 'venue')


def write_entries(model_info: str | Path, commit: str, path: Path = TABLE) -> dict[str, Any]:
    """Write robustbench.json from RobustBench's model_info folder at a commit of its repository.

    Raises:
        FileNotFoundError: if the folder holds no CIFAR-10 entries.
    """
    folder, entries = Path(model_info), {}
    for norm, key in (('Linf', 'autoattack_acc'), ('L2', 'autoattack_acc'), ('corruptions', 'corruptions_acc')):
        files = sorted((folder / 'cifar10' / norm).glob('*.json'))
        if not files:
            raise FileNotFoundError(
                f'{folder / "cifar10" / norm} holds no entry; name the folder model_info of RobustBench'
            )
        rows = []
        for file in files:
            info = json.loads(file.read_text(encoding='utf-8'))
            robust = float(info.get('external') or info[key])  # as the leaderboard ranks them
            row = (
                file.stem,
                info['architecture'],
                float(info['clean_acc']),
                robust,
                info['additional_data'],
                info['venue'],
            )
            rows.append(dict(zip(_COLUMNS, row, strict=True)))
        entries[f'cifar10 {norm}'] = rows
    source = {'repository': 'https://github.com/RobustBench/robustbench', 'commit': commit, 'licence': 'MIT'}
    table = {'source': source, 'entries': entries}
    with atomic_file(path) as file_:
        file_.write((json.dumps(table, indent=1) + '\n').encode())
    return {'entries': {key: len(rows) for key, rows in entries.items()}, **source}


def entries_of(dataset: str, norm: str) -> list[dict[str, Any]]:
    """The published entries of a data set and threat model, the most robust first.

    Raises:
        ValueError: if there are none.
    """
    entries = json.loads(TABLE.read_text(encoding='utf-8'))['entries']
    if f'{dataset} {norm}' not in entries:
        raise ValueError(f'no numbers of RobustBench for {dataset} {norm}; there are {", ".join(entries)}')
    return sorted(entries[f'{dataset} {norm}'], key=lambda entry: -entry['robust_acc'])


def compare(folder: Path, picture: str | Path | None = None, near: int = 5) -> str:
    """A staged model beside RobustBench's entries, as a table; and a plot of clean against robust accuracy.

    Args:
        folder: model_cards/<arch>.<tag>.
        picture: where to save the plot; None for none.
        near: entries to show above and below; those of the same architecture are always shown.

    Raises:
        ValueError: if nothing was measured that the leaderboard measures.
    """
    record, ours = _measured(folder)
    entries, robust = entries_of(ours['dataset'], ours['norm']), 100 * float(robust_acc(ours) or 0)
    rank = sum(entry['robust_acc'] > robust for entry in entries)
    extra = extra_data_of(record['model'], read_hyper(folder))
    size = record['model'].partition('_')[0]  # 'resnet18', 'wrn28'
    lines = ['| place | model | network | clean | AutoAttack | n | extra data |', '|---|---|---|---|---|---|---|']
    for place, entry in enumerate(entries):
        if place == rank:
            lines.append(_our_row(record, ours, rank, extra))
        if abs(place - rank) <= near or _same_size(size, entry['architecture']):
            more = 'yes' if entry['additional_data'] else 'no'
            lines.append(
                f'| {place + 1} | {entry["name"]} | {entry["architecture"]} | {entry["clean_acc"]:.2f} | '
                f'{entry["robust_acc"]:.2f} | 10000 | {more} |'
            )
    if rank == len(entries):
        lines.append(_our_row(record, ours, rank, extra))
    if picture is not None:
        draw([folder], picture)
    notes = [*record['training']['notes'], *(item['note'] for item in record['measurements'] if item['note'])]
    lines += [
        '',
        f'Published: {len(entries)} entries, 10,000 official test images each. Ours: the first {ours["n"]} images,',
    ]
    lines += [f'{attack_title(ours)}, ± one standard error. ' + ' '.join(dict.fromkeys(notes))]
    if extra:
        lines += ['RobustBench counts generated images as no extra data and names them in a footnote.']
    return '\n'.join(lines)


def _measured(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A staged model's record, and its measurement that the leaderboard's compares with."""
    record = read_results(folder)
    results = [item['result'] for item in record['measurements'] if item['result']['attack'] in ('autoattack', 'apgd')]
    if not results:
        raise ValueError(
            f'{record["model"]} has no measurement with AutoAttack or its APGD part; type: '
            f'timm-robust measure {record["model"]} --data-dir DIR --attack apgd -n 1000'
        )
    results = [one for one in results if _at_leaderboard_eps(one)]
    if not results:
        raise ValueError(_other_eps(record))
    return record, min(results, key=lambda result: (result['attack'] != 'autoattack', -result['n']))


def _same_size(size: str, architecture: str) -> bool:
    """Whether an entry's network is of our size: ResNet-18, WRN-28-10."""
    text = architecture.lower().replace('-', '').replace(' ', '')
    return text.endswith(size) if size == 'resnet18' else size.replace('wrn', 'wideresnet') in text


def _our_row(record: dict[str, Any], ours: dict[str, Any], rank: int, extra: ExtraData | None) -> str:
    clean, robust = percent(ours['clean_acc'], ours['n']), percent(robust_acc(ours), ours['n'])
    kind = '' if ours['attack'] == 'autoattack' else ' (APGD-CE + APGD-T)'
    name, more = record['model'], extra.text if extra else 'no'
    start = f'| **{rank + 1}** | **{name}** | {name.partition(".")[0]} | {clean} | {robust}{kind}'
    return f'{start} | {ours["n"]} | {more} |'


def draw(folders: Sequence[Path], path: str | Path) -> None:
    """Clean against robust accuracy: the published entries in grey, staged models with their standard errors.

    Args:
        folders: model_cards/<arch>.<tag>, measured against one threat model on one data set.
        path: the picture; its suffix says which kind.

    Raises:
        ValueError: if they were measured against several, or one as the leaderboard measures was not.
    """
    from matplotlib.figure import Figure

    found = [_measured(folder) for folder in folders]
    threats = {(ours['dataset'], ours['norm'], ours['eps_text']) for _, ours in found}
    if len(threats) != 1:
        raise ValueError(f'one picture shows one threat model, not {sorted(threats)}; name models that share theirs')
    [(dataset, norm, eps)] = threats
    figure = Figure(figsize=(6.4, 4.0), layout='constrained')
    axis = figure.subplots()
    for extra, marker in ((False, 'o'), (True, '^')):
        part = [entry for entry in entries_of(dataset, norm) if bool(entry['additional_data']) == extra]
        label = 'RobustBench, extra data' if extra else 'RobustBench'
        points = [entry['clean_acc'] for entry in part], [entry['robust_acc'] for entry in part]
        axis.plot(*points, marker, color='0.7', markersize=4, label=label)
    for (record, ours), color in zip(found, itertools.cycle(_COLORS), strict=False):
        n, shares = ours['n'], (ours['clean_acc'], float(robust_acc(ours) or 0))
        errors = [100 * (share * (1 - share) / n) ** 0.5 for share in shares]
        label = f'{record["model"]} ({attack_title(ours)}, n {n})'
        x, y = (100 * share for share in shares)
        axis.errorbar([x], [y], xerr=errors[0], yerr=errors[1], fmt='*', color=color, markersize=11, label=label)
    axis.set_xlabel('clean accuracy (%)')
    axis.set_ylabel('AutoAttack accuracy (%)')
    axis.set_title(f'{dataset}, {norm} {eps}', fontsize=10)
    axis.legend(fontsize=7)
    with atomic_file(path) as file:
        figure.savefig(file, format=Path(path).suffix.lstrip('.') or 'png', dpi=150)


def submission(folder: Path, target: str | Path, data_dir: str | Path, info: dict[str, Any]) -> Path:
    """Write a folder that submits a staged model to RobustBench.

    Args:
        folder: model_cards/<arch>.<tag>.
        target: the folder to write.
        data_dir: holds the official CIFAR-10 (cifar-10-batches-py, checked by torchvision's MD5 sums).
        info: 'link', 'name', 'authors' and 'venue' of the paper, and optionally 'footnote' and 'additional_data'
            (RobustBench's true is for real images; generated ones stand in a footnote, which known ones are given).

    Raises:
        ValueError: for a result that is not AutoAttack on all 10,000 official test images, or an info that lacks a key.
    """
    record, target = read_results(folder), Path(target)
    if target.exists():
        raise ValueError(f'{target} exists; name a new folder')
    if missing := [key for key in ('link', 'name', 'authors', 'venue') if not info.get(key)]:
        raise ValueError(f'the paper lacks {", ".join(missing)}; RobustBench asks for each')
    extra = extra_data_of(record['model'], read_hyper(folder))
    footnote = info.get('footnote')
    if extra and not footnote and not info.get('additional_data'):
        if not extra.count:
            raise ValueError(
                f'{record["model"]} was trained on {extra.text} too; write additional_data: true with the paper if '
                'they are real, a footnote that says how many if they are generated'
            )
        footnote = f'It uses additional {extra.count} synthetic images in training.'
    item = next((m for m in record['measurements'] if m['key'] == 'autoattack_10000'), None)
    if item is None:
        there = ', '.join(m['key'] for m in record['measurements']) or 'nothing'
        raise ValueError(
            f'{record["model"]} was measured on {there}; RobustBench takes AutoAttack on all 10,000 test images: '
            f'type timm-robust measure {record["model"]} --data-dir DIR --attack autoattack -n 10000'
        )
    result = item['result']
    if not _at_leaderboard_eps(result):
        raise ValueError(_other_eps(record))
    if result['data_sha256'] != official_sha256(data_dir):
        raise ValueError(
            f'{record["model"]} was not measured on the official CIFAR-10 test images, but on others (JPEG copies?); '
            'measure it on those of https://www.cs.toronto.edu/~kriz/cifar.html'
        )
    model_info = {key: info.get(key) for key in _MANDATORY} | {
        'additional_data': bool(info.get('additional_data', False)),
        'number_forward_passes': 1,
        'dataset': result['dataset'],
        'architecture': info.get('architecture') or record['model'].partition('.')[0],
        'eps': result['eps_text'],
        'clean_acc': f'{100 * result["clean_acc"]:.2f}',
        'reported': f'{100 * result["autoattack_acc"]:.2f}',
        'autoattack_acc': f'{100 * result["autoattack_acc"]:.2f}',
        'unreliable': False,
    }
    model_info |= {'footnote': footnote} if footnote else {}
    with atomic_folder(target) as new:
        where = new / 'model_info' / result['dataset'] / result['norm']
        where.mkdir(parents=True)
        (where / f'{record["model"]}.json').write_text(json.dumps(model_info, indent=2) + '\n')
        (new / 'issue.md').write_text(_issue(record, result, model_info))
        (new / 'zoo_entry.md').write_text(_zoo_entry(record, result))
        (new / 'autoattack.log').write_text(_log(result))
        shutil.copyfile(folder / FLAGS / 'autoattack_10000.npz', new / 'flags.npz')
        shutil.copyfile(folder / 'results.json', new / 'results.json')
        names = sorted(path for path in new.rglob('*') if path.is_file())
        text = ''.join(f'{sha256(path)}  {path.relative_to(new).as_posix()}\n' for path in names)
        (new / 'SHA256SUMS').write_text(text)
    return target


def _at_leaderboard_eps(result: dict[str, Any]) -> bool:
    """Whether a measurement is of the leaderboard's radius; in L2 128/255 counts as 0.5 there."""
    tolerance = 0.003 if result['norm'] == 'L2' else 1e-6
    return abs(parse_eps(result['eps_text']) - parse_eps(LEADERBOARD_EPS[result['norm']])) < tolerance


def _other_eps(record: dict[str, Any]) -> str:
    """What to do with a model that was measured at another radius."""
    there = ', '.join(dict.fromkeys(f'{m["result"]["norm"]} {m["result"]["eps_text"]}' for m in record['measurements']))
    radii = ' and '.join(f'{norm} {eps}' for norm, eps in LEADERBOARD_EPS.items())
    return (
        f'{record["model"]} was measured at {there}, the leaderboard is for {radii}; stage its run again with '
        '--overwrite, then type timm-robust measure NAME --data-dir DIR --eps RADIUS'
    )


def official_sha256(data_dir: str | Path) -> str:
    """ImageData.sha256 of the official test set, from files that pass torchvision's own check.

    Raises:
        FileNotFoundError: if they are not there, or damaged.
    """
    try:
        torchvision.datasets.CIFAR10(str(data_dir), train=False, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f'{data_dir} holds no intact cifar-10-batches-py ({error}); a submission is checked against official files'
        ) from None
    return load_dataset('cifar10', data_dir, 'test').sha256()


def _issue(record: dict[str, Any], result: dict[str, Any], info: dict[str, Any]) -> str:
    """The text of RobustBench's '[New Model]' issue."""
    first = str(info['authors']).split(',')[0].split()[-1]
    extra = 'true' if info['additional_data'] else 'false'
    extra += f' ({info["footnote"]})' if info.get('footnote') else ''
    return '\n'.join(
        [
            f'# [New Model] {first}: {record["model"]}',
            '',
            '### Paper information',
            f'- Paper Title: {info["name"]}',
            f'- Paper URL: {info["link"]}',
            f'- Paper authors: {info["authors"]}',
            '',
            '### Leaderboard claim',
            f'- Architecture: {info["architecture"]}',
            f'- Dataset: {result["dataset"]}',
            f'- Threat model: {result["norm"]}',
            f'- eps: {result["eps_text"]}',
            f'- Clean accuracy: {info["clean_acc"]}%',
            f'- Robust accuracy: {info["autoattack_acc"]}%',
            f'- Additional data: {extra}',
            f'- Evaluation method: AutoAttack (standard), pyautoattack {result["versions"].get("pyautoattack")}, seed '
            f'{result["seed"]}, batch size {result["batch_size"]}; the model confirmed every adversarial image in fp32',
            f'- Checkpoint and code: model.safetensors, SHA-256 {record["weights"]["sha256"]}; timm model '
            f'{record["model"]} of timm-robust, commit {result["commit"]}',
            '',
            '### Model zoo',
            '- [x] I want to add my model to the Model Zoo (optional)',
            '- [x] I use an architecture that is included among those here or in `timm`',
            '- [x] I agree to release my model(s) under the MIT license OR under a custom license (Apache-2.0)',
            '',
        ]
    )


def _zoo_entry(record: dict[str, Any], result: dict[str, Any]) -> str:
    """What a pull request adds: nothing but a registered timm name."""
    arch = record['model'].partition('.')[0]
    alias = f'{arch}_{result["dataset"]}_{result["norm"].lower()}'
    return '\n'.join(
        [
            '# Model zoo',
            '',
            f'RobustBench finds timm models by name. `import timm_robust` registers `{alias}`, so that',
            f"`robustbench.load_model('{arch}')` returns it for {result['dataset']} and {result['norm']}, with its",
            'weights, for pixels in [0, 1]. The architecture is in `timm_robust/models/` of the package; a pull',
            'request adds the JSON of `model_info/`, and the package to the requirements.',
            '',
        ]
    )


def _log(result: dict[str, Any]) -> str:
    """AutoAttack's course as its own log words it."""
    lines = [f'initial accuracy: {result["clean_acc"]:.2%}']
    lines += [f'robust accuracy after {name.upper()}: {share:.2%}' for name, share in result['per_attack'].items()]
    lines += [
        f'max {result["norm"]} perturbation: {result["max_distance"]:.5f}',
        f'robust accuracy: {result["autoattack_acc"]:.2%}',
    ]
    lines += [f'total time {result["wall_time_s"]:.1f} s on {result["hardware"]}', json.dumps(result['versions'])]
    return '\n'.join([*lines, *(f'warning: {text}' for text in result['warnings']), ''])
