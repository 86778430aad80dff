"""The released weights: the table of what there is, and the checked file of each.

`<arch>.<tag>` names one set of weights everywhere: in timm's registry, as folder of `model_cards/`, as recipe, and as
repository on the Hub. The table, releases.json, holds the SHA-256 of each file, because nothing on the way from the Hub
checks it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_text
from ..provenance import CHECKOUT, PACKAGE, RECIPES

TABLE = Path(__file__).with_name('releases.json')
STAGED = (CHECKOUT or PACKAGE) / 'model_cards'
"""The released files of a checkout; an installed wheel has those that are not on the Hub yet."""
CARDS = STAGED if CHECKOUT else Path('model_cards')
"""Where releases are made."""
WEIGHTS = 'model.safetensors'
_NAME = re.compile(r'(?P<arch>[a-z0-9_]+)\.(?P<tag>[a-z0-9_]+_[a-z0-9]+_(linf|l2))')


@dataclass(frozen=True)
class Release:
    """One set of released weights.

    Args:
        name: '<arch>.<tag>', the tag '<method>[_<extra data>]_<dataset>_<norm>'.
        sha256: of its model.safetensors.
        size: of that file, in bytes.
        autoattack_acc: share of images that resist AutoAttack, the number that orders the tags; None if not measured.
        repo: its repository on the Hub.
        commit: the commit there that holds this file, 40 hexadecimal digits; None until it is published.

    Raises:
        ValueError: for a name that is not of this form, or a hash or commit that is none.
    """

    name: str
    sha256: str
    size: int
    autoattack_acc: float | None
    repo: str
    commit: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would break later, or reach outside the folder."""
        split_name(self.name)
        if not re.fullmatch('[0-9a-f]{64}', self.sha256):
            raise ValueError(f'{self.name}: sha256 {self.sha256!r} is not 64 hexadecimal digits')
        if self.commit is not None and not re.fullmatch('[0-9a-f]{40}', self.commit):
            raise ValueError(f'{self.name}: commit {self.commit!r} is not 40 hexadecimal digits')

    @property
    def arch(self) -> str:
        """Name of the network in timm's registry."""
        return split_name(self.name)[0]

    @property
    def tag(self) -> str:
        """What the weights are called there."""
        return split_name(self.name)[1]

    @property
    def norm(self) -> str:
        """Norm of the threat model, 'Linf' or 'L2'."""
        return {'linf': 'Linf', 'l2': 'L2'}[self.tag.rpartition('_')[2]]

    def read(self, path: Path) -> bytes:
        """The content of the file there, if it is the released one: the bytes that were checked, whatever comes after.

        Raises:
            ValueError: if it is not, saying how it differs.
        """
        size = path.stat().st_size
        if size != self.size:
            with open(path, 'rb') as file:
                is_pointer = file.read(32).startswith(b'version https://git-')
            pointer = ' (a Git LFS pointer; type: git lfs pull)' if is_pointer else ''
            raise ValueError(f'{path} has {size:,} bytes{pointer}, the released {self.name} {self.size:,}; {_MEND}')
        content = path.read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise ValueError(f'{path} has SHA-256 {found}, the released {self.name} {self.sha256}; {_MEND}')
        return content


_MEND = 'fetch it again, or load it as your own with pretrained_cfg_overlay=dict(file=PATH)'


def split_name(name: str) -> tuple[str, str]:
    """'<arch>.<tag>' in its two parts.

    Raises:
        ValueError: if it is not of this form.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f'{name!r} is no release; it must be <arch>.<method>[_<extra data>]_<dataset>_<norm>, such as '
            'resnet18_pssilu.fgsm_cifar10_linf'
        )
    return match['arch'], match['tag']


def read_table(path: Path = TABLE) -> dict[str, Release]:
    """The table, name -> release.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return {name: Release(name, **entry) for name, entry in json.loads(path.read_text(encoding='utf-8')).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a table of releases: {error}') from None


def table_of(cards: Path) -> Path:
    """The table of a folder of releases: the package's for its own, else the releases.json beside the folder."""
    return TABLE if cards.resolve() == STAGED.resolve() else cards.parent / TABLE.name


def write_table(releases: dict[str, Release], path: Path = TABLE) -> None:
    """Write the table, sorted by name, whole or not at all."""
    entries = {name: {k: v for k, v in asdict(releases[name]).items() if k != 'name'} for name in sorted(releases)}
    write_text(path, json.dumps(entries, indent=2) + '\n')


def is_ours(name: str) -> bool:
    """Whether a release is this project's, which has a recipe of each name; others are known by their page alone."""
    return _NAME.fullmatch(name) is not None and (RECIPES / f'{name}.yaml').is_file()


RELEASES = {name: release for name, release in read_table().items() if is_ours(name)}
"""Name -> release of this project: what somebody stages of their own has other classes, and is loaded by its page."""


def releases_of(arch: str) -> list[Release]:
    """The releases of a network, the default first: Linf before L2, then the most robust."""
    found = [release for release in RELEASES.values() if release.arch == arch]
    return sorted(found, key=lambda release: (release.norm != 'Linf', -(release.autoattack_acc or 0), release.name))


EXTERNAL = {'wrn28_10_pssilu.dai2021_cifar10_linf': ('Dai2021Parameterizing', '1eO-MNXQSAoCuNFjIbdCheprT4Beqo9Zv')}
"""Weights of others, not ours to bundle: name -> entry of RobustBench's zoo, and the id of its file on Google Drive."""


def external_file(name: str) -> Path:
    """The converted weights of others, where the user has fetched them.

    Raises:
        FileNotFoundError: if not, with the command that does.
    """
    path = STAGED / name / WEIGHTS
    if not path.is_file():
        entry, drive_id = EXTERNAL[name]
        raise FileNotFoundError(
            f"{name} is RobustBench's {entry} (Google Drive {drive_id}), which its authors publish; to fetch it and "
            f'convert it type: timm-robust robustbench fetch {entry} {path.parent}'
        )
    return path
