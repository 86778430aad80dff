"""The folder that submits a staged model to RobustBench."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torchvision

from ..data import load_dataset
from ..files import atomic_folder
from ..release import FLAGS, extra_data_of, read_hyper, read_results, sums_of
from ..results import RobustnessResult
from .report import at_leaderboard_eps, other_eps


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
    footnote = _footnote(record, folder, info)
    result = _full_measurement(record, data_dir)
    assert result.autoattack_acc is not None  # a record of AutoAttack has it
    accuracy = f'{100 * result.autoattack_acc:.2f}'
    model_info = {
        'link': info['link'],
        'name': info['name'],
        'authors': info['authors'],
        'additional_data': bool(info.get('additional_data', False)),
        'number_forward_passes': 1,
        'dataset': result.dataset,
        'venue': info['venue'],
        'architecture': info.get('architecture') or record['model'].partition('.')[0],
        'eps': result.eps_text,
        'clean_acc': f'{100 * result.clean_acc:.2f}',
        'reported': accuracy,
        'autoattack_acc': accuracy,
        'unreliable': False,
    }
    model_info |= {'footnote': footnote} if footnote else {}
    with atomic_folder(target) as new:
        where = new / 'model_info' / result.dataset / result.norm
        where.mkdir(parents=True)
        (where / f'{record["model"]}.json').write_text(json.dumps(model_info, indent=2) + '\n')
        (new / 'issue.md').write_text(_issue(record, result, model_info))
        (new / 'zoo_entry.md').write_text(_zoo_entry(result))
        (new / 'autoattack.log').write_text(_log(result))
        shutil.copyfile(folder / FLAGS / 'autoattack_10000.npz', new / 'flags.npz')
        shutil.copyfile(folder / 'results.json', new / 'results.json')
        (new / 'SHA256SUMS').write_text(sums_of(new))
    return target


def _footnote(record: dict[str, Any], folder: Path, info: dict[str, Any]) -> Any:
    """The paper's own footnote, else that of known generated images; None where there is nothing to tell."""
    footnote, extra = info.get('footnote'), extra_data_of(record['model'], read_hyper(folder))
    if footnote or not extra or info.get('additional_data'):
        return footnote
    if not extra.count:
        raise ValueError(
            f'{record["model"]} was trained on {extra.text} too; write additional_data: true with the paper if '
            'they are real, a footnote that says how many if they are generated'
        )
    return f'It uses additional {extra.count} synthetic images in training.'


def _full_measurement(record: dict[str, Any], data_dir: str | Path) -> RobustnessResult:
    """The result of AutoAttack on all 10,000 official test images at the leaderboard's radius."""
    measured = {item['key']: item['result'] for item in record['measurements']}
    result: RobustnessResult | None = measured.get('autoattack_10000')
    if result is None:
        there = ', '.join(measured) or 'nothing'
        raise ValueError(
            f'{record["model"]} was measured on {there}; RobustBench takes AutoAttack on all 10,000 test images: '
            f'type timm-robust measure {record["model"]} --data-dir DIR --attack autoattack -n 10000'
        )
    if result.dataset != 'cifar10':
        raise ValueError(
            f'{record["model"]} is of {result.dataset}; a submission is checked against the images of cifar10'
        )
    if not at_leaderboard_eps(result):
        raise ValueError(other_eps(record))
    if result.data_sha256 != official_sha256(data_dir):
        raise ValueError(
            f'{record["model"]} was not measured on the official CIFAR-10 test images, but on others (JPEG copies?); '
            'measure it on those of https://www.cs.toronto.edu/~kriz/cifar.html'
        )
    return result


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


def _issue(record: dict[str, Any], result: RobustnessResult, info: dict[str, Any]) -> str:
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
            f'- Dataset: {result.dataset}',
            f'- Threat model: {result.norm}',
            f'- eps: {result.eps_text}',
            f'- Clean accuracy: {info["clean_acc"]}%',
            f'- Robust accuracy: {info["autoattack_acc"]}%',
            f'- Additional data: {extra}',
            f'- Evaluation method: AutoAttack (standard), pyautoattack {result.versions.get("pyautoattack")}, seed '
            f'{result.seed}, batch size {result.batch_size}; the model confirmed every adversarial image in fp32',
            f'- Checkpoint and code: model.safetensors, SHA-256 {record["weights"]["sha256"]}; timm model '
            f'{record["model"]} of timm-robust, commit {result.commit}',
            '',
            '### Model zoo',
            '- [x] I want to add my model to the Model Zoo (optional)',
            '- [ ] I use an architecture that is included among those here or in `timm`',
            '- [x] I agree to release my model(s) under the MIT license OR under a custom license (Apache-2.0)',
            '',
        ]
    )


def _zoo_entry(result: RobustnessResult) -> str:
    """What a pull request adds: nothing but a registered timm name."""
    short = result.model.removesuffix(f'_{result.dataset}_{result.norm.lower()}')
    return '\n'.join(
        [
            '# Model zoo',
            '',
            f'RobustBench finds timm models by name. `import timm_robust` registers `{result.model}`, so that',
            f"`robustbench.load_model('{short}')` returns it for {result.dataset} and {result.norm}, with its weights,",
            'for pixels in [0, 1]. The architecture is in `timm_robust/models/` of the package; a pull request adds',
            'the JSON of `model_info/`, and the package to the requirements.',
            '',
        ]
    )


def _log(result: RobustnessResult) -> str:
    """AutoAttack's course as its own log words it."""
    lines = [f'initial accuracy: {result.clean_acc:.2%}']
    lines += [f'robust accuracy after {name.upper()}: {share:.2%}' for name, share in result.per_attack.items()]
    lines += [
        f'max {result.norm} perturbation: {result.max_distance:.5f}',
        f'robust accuracy: {result.autoattack_acc:.2%}',
    ]
    lines += [f'total time {result.wall_time_s:.1f} s on {result.hardware}', json.dumps(result.versions)]
    return '\n'.join([*lines, *(f'warning: {text}' for text in result.warnings), ''])
