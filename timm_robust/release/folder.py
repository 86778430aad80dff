"""The folder of a staged model: its files, their check sums, and whether they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import same_split
from ..files import sha256, write_text
from ..models import HYPER_PARAMETERS, load_model
from ..threat_model import ThreatModel
from ..weights import WEIGHTS, Release
from .card import model_card
from .record import FLAGS, RESULTS, read_results, results_of, verdicts_file

ORGANISATION = 'timm-robust'
"""Where the releases live on the Hub."""


def files_of(folder: Path) -> dict[str, Path]:
    """Path within a staged folder -> file, sorted; without hidden files, such as what a killed writer leaves."""
    files = (path for path in sorted(folder.rglob('*')) if path.is_file() and not path.name.startswith('.'))
    return {path.relative_to(folder).as_posix(): path for path in files}


_FILES = {
    *(WEIGHTS, RESULTS, HYPER_PARAMETERS, 'config.json', 'README.md', 'LICENSE', 'SHA256SUMS', 'summary.csv'),
    *('training.png', 'adversarial.png'),
}
"""What a release holds, beside the verdicts of its measurements."""


def verify(folder: Path, record: dict[str, Any], renewed: str | None = None) -> None:
    """Refuse a staged folder that holds something else than a release, or other weights and verdicts than its record.

    Args:
        folder: model_cards/<name>.
        record: of read_results.
        renewed: key of a measurement that is made now. Verdicts are not looked at then: those that were lost or damaged
            are measured again one after the other.

    Raises:
        ValueError, FileNotFoundError: naming what is wrong.
    """
    results = results_of(record)
    allowed = _FILES | {verdicts_file(Path(), result).as_posix() for result in results}
    if renewed:
        allowed.add(f'{FLAGS}/{renewed}.npz')
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
    for result in results if renewed is None else ():
        result.check_verdicts(verdicts_file(folder, result))


def check_sums(folder: Path, record: dict[str, Any], known: Release | None) -> None:
    """Refuse weights and verdicts that changed since SHA256SUMS was written; staging takes it away."""
    if not (folder / 'SHA256SUMS').is_file():
        return
    for name, digest in _read_sums(folder).items():
        held = name == WEIGHTS or name.startswith(f'{FLAGS}/')
        if held and (not (folder / name).is_file() or sha256(folder / name) != digest):
            raise ValueError(f'{folder / name} is not the file of SHA256SUMS; fetch it again, or measure again')
    if known is not None and known.sha256 != record['weights']['sha256']:
        raise ValueError(
            f'the table of releases has other weights of {record["model"]}, SHA-256 {known.sha256}; fetch it and '
            f'{folder} again, or stage the run again with --overwrite'
        )


def sums_of(folder: Path) -> str:
    """What SHA256SUMS says of a folder: digest and path of every other file."""
    files = files_of(folder).items()
    return ''.join(f'{sha256(file)}  {path}\n' for path, file in files if path != 'SHA256SUMS')


def forget_sum(folder: Path, name: str) -> None:
    """Take a file that changed out of SHA256SUMS."""
    path = folder / 'SHA256SUMS'
    if path.is_file() and name in (listed := _read_sums(folder)):
        del listed[name]
        write_text(path, ''.join(f'{digest}  {other}\n' for other, digest in listed.items()))


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
        raise ValueError(f'{folder / name} {what}; type: timm-robust render')
    for name, digest in listed.items():
        if sha256(folder / name) != digest:
            raise ValueError(f'{folder / name} is not the file of SHA256SUMS; fetch it again, or render')
    if _text_of(model_card(folder)) != _text_of((folder / 'README.md').read_text(encoding='utf-8')):
        raise ValueError(f'{folder / "README.md"} does not tell what {RESULTS} holds; render')
    load_model(folder)


def _text_of(card: str) -> str:
    """A card without the metadata at its head, whose form is the business of the Hub's client."""
    return card.split('\n---\n', 1)[-1]


def check_alike(
    record: dict[str, Any], hyper: dict[str, Any], dataset: str, split: str, threat_model: ThreatModel
) -> None:
    """Refuse training images, and another data set, split or radius than those of the measurements before."""
    if same_split(split, hyper.get('train_split', 'train')):
        raise ValueError(f'{record["model"]} was trained on the images of {split}; measure it on others: --split SPLIT')
    for result in results_of(record):
        there, wished = f'{result.dataset} {result.split}', f'{dataset} {split}'
        if result.attack != 'none':
            there, wished = f'{there} at {result.norm} {result.eps_text}', f'{wished} at {threat_model}'
        if there != wished:
            raise ValueError(
                f'{record["model"]} was measured on {there}, and keeps to it, not {wished}; to begin anew, stage '
                'the run again with --overwrite'
            )
