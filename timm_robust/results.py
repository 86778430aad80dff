"""RobustnessResult: the frozen record of one measurement, written and read as JSON, shown as a table.

Accuracies are fractions in [0, 1]; eps and distances are in pixels on the [0, 1] scale; times are seconds. A record
names no path, user or host of the machine that made it.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from .files import write_text
from .provenance import public_name

ATTACKS = ('autoattack', 'apgd', 'pgd', 'none')
NOT_CHECKED = 'not checked for signs of masked gradients (--no-checks)'
"""The warning of a record whose measurement left the search for them out."""
_ACCURACIES = {'clean_acc': 'clean', 'pgd_acc': 'PGD', 'apgd_acc': 'APGD-CE + APGD-T', 'autoattack_acc': 'AutoAttack'}
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t that 97.5 % lie below, for 1, 2, ... degrees of freedom."""


def mean_interval(values: np.ndarray, *, other_images: bool = False) -> tuple[float, float, float]:
    """Mean, and its 95 % interval over trainings: +- t * sd / sqrt(S), of the S trainings' own means.

    The trainings count as normal draws; the images count as they are, unless `other_images`. For a difference give
    that of paired values. One training has no interval (NaN); of more than 21 it is a little too wide.

    Args:
        values: [S, N], one row a training, one column an image that all of them were measured on.
        other_images: the images are draws as well, so that the interval is also one for others: the variance of the
            mean is that of crossed random effects, (T + I - E) / (S N), from the mean squares of trainings, images and
            residuals, but no less than max(T, I) / (S N); its degrees of freedom are Satterthwaite's, S - 1 at least.
            Of equal trainings it leaves 0 out 4 to 8 times in a hundred with S = 3, 4 to 6 with 5 (simulated).

    Raises:
        ValueError: for values of another shape, or none.
    """
    if values.ndim != 2 or not values.size:
        raise ValueError(f'values of shape {list(values.shape)} are not [trainings, images]')
    trainings, images = values.shape
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    mean, around = float(rows.mean()), float('nan')
    if trainings > 1:
        square, free = images * float(rows.var(ddof=1)), trainings - 1.0
        if other_images and images > 1:
            residual = float(((values - rows - columns + mean) ** 2).sum()) / (free * (images - 1))
            parts = np.array([square, trainings * float(columns.var(ddof=1)), residual])
            square = max(parts[0] + parts[1] - residual, *parts[:2])
            spread = (parts**2 / [free, images - 1, free * (images - 1)]).sum()
            free = max(free, square**2 / spread if spread else 0.0)
        around = _T[min(int(free), len(_T)) - 1] * float(square / values.size) ** 0.5
    return mean, mean - around, mean + around


@dataclass(frozen=True)
class RobustnessResult:
    """What was measured, how, on what, and what came out.

    Args:
        model: name of the model; of a path only the last two components are kept.
        dataset: name of the data set.
        split: its part, such as 'test'.
        n: number of images: the first of the split (of a stream those that could be read), or evenly spread ones of a
            folder and of a run's held-out images.
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
        classes: their names, in the order of the outputs; None where they have none but numbers, or are over 100.
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
    classes: list[str] | None = None

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
        write_text(path, json.dumps(asdict(self), indent=2, allow_nan=False) + '\n')

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RobustnessResult:
        """Read a record that to_json wrote.

        Raises:
            ValueError: if the file is no JSON object, lacks a key or has one that is unknown.
        """
        return cls.from_dict(read_object(path), str(path))

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str) -> RobustnessResult:
        """The record that a file holds, every value held against its type.

        Args:
            record: key -> value; those with a default may be missing.
            where: it stands, for the message.

        Raises:
            ValueError: naming the key that is unknown, missing or wrong.
        """
        known = {f.name: f for f in fields(cls)}
        for key in record:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f'; did you mean {near[0]!r}?' if near else f'; allowed: {", ".join(known)}'
                raise ValueError(f'{where}: key {key!r} is unknown{hint}')
        needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        if missing := [key for key in needed if key not in record]:
            raise ValueError(f'{where} lacks {", ".join(missing)}; write it with RobustnessResult.to_json')
        check_types(record, {key: hint for key, hint in get_type_hints(cls).items() if key in record}, where)
        try:
            result = cls(**record)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
        if result.n < 1 or result.norm not in ('Linf', 'L2') or result.eps < 0:
            raise ValueError(f'{where}: no measurement has n {result.n}, norm {result.norm}, eps {result.eps}')
        if result.attack != 'none' and result.robust_acc is None:
            raise ValueError(f'{where} has no accuracy under its attack, {result.attack}')
        return result

    @property
    def robust_acc(self) -> float | None:
        """Share of images that resist the strongest attack; None where none ran."""
        return None if self.attack == 'none' else getattr(self, f'{self.attack}_acc')

    @property
    def attack_title(self) -> str:
        """What the strongest attack is called; the first two of AutoAttack are never called AutoAttack."""
        if self.attack == 'pgd':
            return f'PGD-{self.steps}'
        return 'clean' if self.attack == 'none' else _ACCURACIES[f'{self.attack}_acc']

    def check_verdicts(self, path: Path) -> None:
        """Hold the record against the verdicts on every image, as --flags-file writes them.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: naming what differs.
        """
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing; it holds the verdicts of a measurement; measure again')
        names = ['y', 'y_pred', 'clean_correct']
        if self.attack != 'none':
            names += ['robust', 'pgd_robust']
        try:
            with np.load(path, allow_pickle=False) as arrays:
                flags = {name: np.asarray(arrays[name]).astype(np.int64) for name in names}
        except Exception as error:  # damage ends in errors of NumPy, zipfile, zlib and json
            raise ValueError(f'{path} is damaged ({" ".join(str(error).split())[:200]}); fetch it again') from None
        if any(array.shape != (self.n,) for array in flags.values()):
            raise ValueError(f'{path} is not of {self.n} images; measure again')
        right = flags['clean_correct']
        shares: dict[str, tuple[float | None, Any]] = {'clean_acc': (self.clean_acc, right)}
        if self.attack != 'none':
            shares |= {
                'pgd_acc': (self.pgd_acc, flags['pgd_robust']),
                'accuracy under attack': (self.robust_acc, flags['robust']),
            }
        if not np.array_equal(right, flags['y_pred'] == flags['y']) or any(
            (a > right).any() for _, a in shares.values()
        ):
            raise ValueError(f'{path} contradicts itself: images count as right that the predictions get wrong')
        for name, (share, array) in shares.items():
            if share is None or round(share * self.n, 6) != int(array.sum()):
                raise ValueError(f'{path} has {int(array.sum())} of {self.n} images right, the record {name} {share}')

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


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: if it does not.
    """
    try:
        record = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON: {error}') from None
    if not isinstance(record, dict):
        raise ValueError(f'{path} holds a {type(record).__name__}, not one result; expected a JSON object')
    return record


def check_types(record: dict[str, Any], hints: dict[str, Any], where: str) -> None:
    """Refuse a record out of a file that lacks one of these keys, or has another type of value there.

    Args:
        record: key -> value.
        hints: key -> type, such as `dict[str, float | None]`; numbers must be finite.
        where: it stands, for the message.

    Raises:
        ValueError: naming the key.
    """
    for key, hint in hints.items():
        if key not in record:
            raise ValueError(f'{where} lacks {key}')
        if not _fits(record[key], hint):
            wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
            raise ValueError(f'{where}: {key} is {str(record[key])[:60]!r}, not {wanted}')


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if hint in (int, float):
        allowed = (int, float) if hint is float else (int,)
        return type(value) in allowed and -(2**63) < value < 2**63
    return hint is Any or type(value) is hint


def is_record(path: Path) -> bool:
    """Whether a file is a record of to_json, perhaps of an older version."""
    try:
        record = json.loads(path.read_bytes()) if path.stat().st_size < 1 << 20 else None
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {'model', 'dataset', 'attack', 'clean_acc'} <= record.keys()
