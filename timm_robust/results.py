"""RobustnessResult: the frozen record of one measurement, written and read as JSON, shown as a table.

Accuracies are fractions in [0, 1]; eps and distances are in pixels on the [0, 1] scale; times are seconds. A record
names no path, user or host of the machine that made it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

ATTACKS = ('autoattack', 'apgd', 'pgd', 'none')
SCREENS = (None, 'bf16')
_ACCURACIES = {'clean_acc': 'clean', 'pgd_acc': 'PGD', 'apgd_acc': 'APGD-CE + APGD-T', 'autoattack_acc': 'AutoAttack'}


@dataclass(frozen=True)
class RobustnessResult:
    """What was measured, how, on what, and what came out.

    Args:
        model: name of the model; of a path only the last two components are kept.
        dataset: name of the data set.
        split: its part, such as 'test'.
        n: number of images, the first n of the split.
        norm: 'Linf' or 'L2'.
        eps: radius in pixels on the [0, 1] scale.
        eps_text: the radius as the field writes it, '8/255'.
        attack: the strongest attack that ran: 'autoattack', 'apgd' (its first two attacks), 'pgd' or 'none'.
        clean_acc: share of images with the right label.
        seed: seed of every attack.
        batch_size: batch size; AutoAttack's random numbers depend on it.
        dtype: type the model computes in.
        wall_time_s: duration of the whole measurement, with what an AutoAttack that was killed had done before.
        images_per_s: n / wall_time_s.
        hardware: CPU or GPU model, and CPU cores.
        versions: package -> version.
        commit: git commit of the code, with '+dirty' where it was changed; None outside a checkout.
        date: start, UTC, ISO 8601.
        data_sha256: SHA-256 of the n images (bytes of [n, C, H, W]) and their labels (int64); None if not known.
        img_size: side that images were resized to inside the attacked function, if asked for; None: the model's own.
        attack_version: version of AutoAttack, 'standard' or 'apgd'; None without it.
        search: what AutoAttack searched on: 'model', or 'folded', an equal copy with batch norm folded into the
            convolutions, every find confirmed by the model; None without it.
        screen: 'bf16' if APGD ran in that type first, every find confirmed by the model; None if not.
        processes: processes that shared AutoAttack's batches out.
        steps: steps of PGD; None without it.
        step_size: its step in pixels; None without it.
        restarts: its number of random starts; None without it.
        pgd_acc: share still right under PGD; None where it did not run.
        apgd_acc: share still right after APGD-CE and APGD-T; None where they did not run.
        autoattack_acc: share still right after standard AutoAttack; None where it did not run.
        per_attack: attack of AutoAttack -> share still right after it, in the order they ran.
        warnings: what AutoAttack warned of, and what else limits the claim.
        rejected: adversarial images that failed re-checking, and so did not count.
        mean_distance: mean distance of the adversarial images that count; None if there is none.
        max_distance: the largest of these distances.
    """

    model: str
    dataset: str
    split: str
    n: int
    norm: str
    eps: float
    eps_text: str
    attack: str
    clean_acc: float
    seed: int
    batch_size: int
    dtype: str
    wall_time_s: float
    images_per_s: float
    hardware: str
    versions: dict[str, str | None]
    commit: str | None
    date: str
    data_sha256: str | None = None
    img_size: int | None = None
    attack_version: str | None = None
    search: str | None = None
    screen: str | None = None
    processes: int = 1
    steps: int | None = None
    step_size: float | None = None
    restarts: int | None = None
    pgd_acc: float | None = None
    apgd_acc: float | None = None
    autoattack_acc: float | None = None
    per_attack: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rejected: int = 0
    mean_distance: float | None = None
    max_distance: float | None = None

    def __post_init__(self) -> None:
        """Keep machine paths out, and refuse values that cannot be."""
        object.__setattr__(self, 'model', public_name(self.model))
        if self.attack not in ATTACKS:
            raise ValueError(f'attack {self.attack!r} is unknown; allowed: {", ".join(ATTACKS)}')
        shares = {name: getattr(self, name) for name in _ACCURACIES} | self.per_attack
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f'{name} must be a fraction in [0, 1], got {share!r}; divide a percentage by 100')

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the record; the file is either the old one or the whole new one, never a part."""
        with atomic_file(path) as file:
            file.write((json.dumps(asdict(self), indent=2, allow_nan=False) + '\n').encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RobustnessResult:
        """Read a record that to_json wrote.

        Raises:
            ValueError: if the file is no JSON object, lacks a key or has one that is unknown.
        """
        try:
            record = json.loads(Path(path).read_text(encoding='utf-8'))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f'{path} is not JSON: {error}') from None
        if not isinstance(record, dict):
            raise ValueError(f'{path} holds a {type(record).__name__}, not one result; expected a JSON object')
        known = [f.name for f in fields(cls)]
        for key in record:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f'; did you mean {near[0]!r}?' if near else f'; allowed: {", ".join(known)}'
                raise ValueError(f'{path}: key {key!r} is unknown{hint}')
        if missing := [key for key in known if key not in record]:
            raise ValueError(f'{path} lacks {", ".join(missing)}; write it with RobustnessResult.to_json')
        return cls(**record)

    def to_line(self) -> str:
        """The record as JSON on one line, for logs and pipes."""
        return json.dumps(asdict(self), allow_nan=False)

    def table(self) -> str:
        """The record as aligned text for a terminal, accuracies in percent."""
        rows = [('model', self.model), ('data', f'{self.dataset} {self.split}, {self.n} images')]
        rows.append(('threat model', f'{self.norm} {self.eps_text}'))
        for name, label in _ACCURACIES.items():
            if (share := getattr(self, name)) is not None:
                if name == 'pgd_acc':
                    label = f'PGD-{self.steps}' + (f' x {self.restarts}' if self.restarts != 1 else '')
                rows.append((label, f'{100 * share:6.2f} %  ({round(share * self.n)} of {self.n})'))
        rows += [(f'  after {name}', f'{100 * share:6.2f} %') for name, share in self.per_attack.items()]
        if self.mean_distance is not None:
            rows.append(('distance', f'mean {self.mean_distance:.4g}, max {self.max_distance:.4g}'))
        rows += [('rejected', f'{self.rejected} adversarial images failed re-checking')] if self.rejected else []
        rows.append(('run', f'seed {self.seed}, batch size {self.batch_size}, {self.dtype}, {self.hardware}'))
        rows.append(('time', f'{self.wall_time_s:.1f} s, {self.images_per_s:.3g} images/s'))
        rows += [('warning', text) for text in self.warnings]
        width = max(len(label) for label, _ in rows)
        return '\n'.join(f'{label:<{width}}  {text}' for label, text in rows)


def public_name(spec: str) -> str:
    """A model's name without the machine's paths: 'a/b/run/best.pth' -> 'run/best.pth'; 'hf-hub:org/repo' stays."""
    prefix, colon, rest = spec.rpartition(':')
    path = Path(rest)
    parts = [part for part in path.parts if part not in (path.anchor, '.', '..', '~')]
    if path.expanduser().parent == Path.home():
        parts = parts[-1:]
    return prefix + colon + '/'.join(parts[-2:])


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file beside path that takes its place when the body ends, and vanishes if it fails.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the disk refuses (full, read-only), naming the file.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f'folder {str(target.parent)!r} does not exist; type: mkdir -p {target.parent}')
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f'.{target.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write that failed does not know its file
            free = shutil.disk_usage(target.parent).free
            raise OSError(f'cannot write {target}: {error}; {free:,} bytes are free') from error
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside path that takes its place when the body ends, and vanishes if it fails."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as temporary:
        new = Path(temporary) / 'new'
        new.mkdir()
        yield new
        if target.exists():
            target.rename(Path(temporary) / 'old')
        new.rename(target)


def environment(device: str | torch.device = 'cpu') -> dict[str, Any]:
    """What a measurement on device runs on: 'hardware', a text, and 'versions', package -> version or None."""
    device = torch.device(device)
    affinity = getattr(os, 'sched_getaffinity', None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    name = torch.cuda.get_device_name(device) + ', ' if device.type == 'cuda' else f'{_cpu_name()}, '
    versions: dict[str, str | None] = {'python': platform.python_version(), 'torch': str(torch.__version__)}
    for package in ('timm', 'timm_robust', 'pyautoattack'):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = getattr(sys.modules.get(package), '__version__', None)  # run from a checkout
    return {'hardware': f'{name}{cores} CPU core{"s" * (cores != 1)}', 'versions': versions}


def git_commit(folder: str | os.PathLike[str]) -> str | None:
    """The git commit of the code in folder, with '+dirty' if files there changed; None if git does not track it."""
    git = ['git', '--no-optional-locks', '-C', os.fspath(folder)]
    try:
        tracked = subprocess.run([*git, 'ls-files'], capture_output=True, text=True, timeout=30)
        commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=30)
        status = subprocess.run([*git, 'status', '--porcelain', '.'], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode or not tracked.stdout.strip():
        return None
    return commit.stdout.strip() + ('+dirty' if status.stdout.strip() else '')


def _cpu_name() -> str:
    """The CPU's model name as Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        if found := re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE):
            return found.group(1).strip()
    return platform.processor() or platform.machine()
