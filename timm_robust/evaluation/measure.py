"""Clean, PGD and AutoAttack accuracy of a model as one record: what `timm-robust evaluate` runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import cross_entropy_of, pgd
from ..data import ImageData
from ..distributed import World
from ..models import trained_classes
from ..pixels import pixel_input
from ..provenance import environment, git_commit
from ..results import ATTACKS, NOT_CHECKED, RobustnessResult
from ..threat_model import ThreatModel, resolved_step_size
from .autoattack import AutoAttackResult, autoattack, check_autoattack, predict, recheck, share, undisturbed
from .runner import Fp32Logits, check_counts, device_of, dtype_of
from .sanity_checks import find_problems
from .search_network import search_model
from .split import default_batch_size, evenly

_CHECKED = 50  # images on which signs of a dishonest evaluation are looked for
_VERSIONS = {'autoattack': 'standard', 'apgd': 'apgd'}  # of AutoAttack
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
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    name: str | None = None,
    split: str = 'test',
    img_size: int | None = None,
    search: bool = True,
    state_dir: str | Path | None = None,
    checks: bool = True,
    world: World | None = None,
) -> tuple[RobustnessResult, dict[str, torch.Tensor]]:
    """Measure a model, and leave it as it was. Only adversarial images that pass re-checking count.

    Args:
        model: images -> logits, as timm trains it; normalisation by its pretrained_cfg is added here.
        data: the split to measure on.
        threat_model: norm and radius; the bounds must be (0, 1).
        attack: 'autoattack' (standard), 'apgd' (its first two attacks), 'pgd' or 'none'. PGD runs unless 'none'.
        n: number of images, the first of the split; None for all.
        pgd_steps: steps of PGD on the cross-entropy.
        pgd_step_size: step in pixels; 2.5 eps / pgd_steps if None, and 2 eps at most.
        pgd_restarts: random starts; an image that falls to one of them is broken.
        batch_size: images a batch; None: 250, or of images above 64 pixels a side as many pixels. PGD's random starts
            do not depend on it, AutoAttack's do.
        seed: seed of all attacks.
        progress: called with lines of text.
        name: the model's name in the record; by default what its pretrained_cfg says.
        split: the name of the split in the record.
        img_size: side that images are resized to inside the attacked function, so that eps is in the data's pixels;
            None: what the model was trained with (load_model), else no resizing.
        search: AutoAttack looks for adversarial images on an equal, faster copy, and the model confirms each.
        state_dir: folder that keeps what each batch of AutoAttack found; a run that was killed goes on from there.
        checks: look for signs that the result is not to be trusted, on 50 of the images; they become warnings, as
            does leaving this out.
        world: the processes that share AutoAttack's batches out; each gets the whole result.

    Returns:
        The record; and tensors on the data's device: y, y_pred and clean_correct [n]; of the strongest attack
        robust and y_pred_adv [n] and x_adv [n, C, H, W] in float32; and PGD's own pgd_robust [n].

    Raises:
        ValueError: for an unknown attack, an n that the data does not have, a model that does not fit the data, or
            data with a class that the model was not trained on, where its classes have names.
    """
    date, started = datetime.now(timezone.utc).isoformat(timespec='seconds'), time.perf_counter()
    batch_size = default_batch_size(data) if batch_size is None else batch_size
    check_counts(pgd_steps=pgd_steps, pgd_restarts=pgd_restarts, batch_size=batch_size)
    _check_settings(attack, threat_model, img_size)
    step_size = resolved_step_size(pgd_step_size, threat_model.eps, pgd_steps, 'pgd_step_size')
    data = data if n is None else data.first(n)
    if classes := trained_classes(model):
        data = data.with_classes(classes)
    x, pixels = data.pixels(), pixel_input(model, img_size)
    if attack in _VERSIONS:
        check_autoattack(x, data.labels, threat_model, _VERSIONS[attack], batch_size)
    facts: dict[str, Any] = {'model': name or _name(model), 'dtype': str(dtype_of(model)).removeprefix('torch.')}
    facts |= {'dataset': data.name, 'split': split, 'n': len(x), 'data_sha256': data.sha256(), 'img_size': img_size}
    facts |= {'norm': threat_model.norm, 'eps': threat_model.eps, 'eps_text': threat_model.eps_text}
    facts |= {'attack': attack, 'seed': seed, 'batch_size': batch_size, 'date': date}
    if data.num_classes <= 100 and data.classes != tuple(map(str, range(data.num_classes))):
        facts['classes'] = list(data.classes)
    with undisturbed(model):
        logits = Fp32Logits(pixels)
        _check_fit(logits, data)
        parts, problems, earlier_s = _paced(x.split(batch_size), 'clean', progress), list[str](), 0.0
        y_pred = torch.cat([predict(logits, part, batch_size) for part in parts])
        tensors = {'y': data.labels, 'y_pred': y_pred, 'clean_correct': y_pred == data.labels}
        facts['clean_acc'] = share(tensors['clean_correct'])
        if attack != 'none':
            facts |= {'steps': pgd_steps, 'step_size': step_size, 'restarts': pgd_restarts}
            settings = {'steps': pgd_steps, 'restarts': pgd_restarts, 'batch_size': batch_size, 'seed': seed}
            facts |= _pgd(logits, x, tensors, threat_model, progress, step_size=step_size, **settings)
            if checks:
                few = evenly(data, min(_CHECKED, len(x))).to(device_of(logits, x))
                images, labels = few.pixels(), few.labels
                problems = find_problems(logits, images, labels, threat_model, seed=seed, batch_size=batch_size)
            else:
                problems = [NOT_CHECKED]
        if attack in _VERSIONS:
            result = autoattack(
                pixels,
                x,
                data.labels,
                threat_model,
                version=_VERSIONS[attack],
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                search=search_model(pixels, x[:16], len(x)) if search else None,
                state_dir=state_dir,
                world=world,
            )
            facts |= _take_in(result, tensors, attack)
            facts |= {'processes': world.size if world else 1, 'rejected': facts['rejected'] + result.rejected}
            earlier_s = result.earlier_s
        facts['warnings'] = [*data.notes, *facts.get('warnings', []), *_without_label(tensors), *problems]
    if attack != 'none':
        facts |= _distances(x, tensors, threat_model)
    seconds = time.perf_counter() - started + earlier_s
    facts |= {'wall_time_s': seconds, 'images_per_s': len(x) / seconds, 'commit': git_commit()}
    return RobustnessResult(**facts, **environment(device_of(model, x))), tensors


def _check_settings(attack: str, threat_model: ThreatModel, img_size: int | None) -> None:
    """Refuse, before any work, what no measurement can mean."""
    if attack not in ATTACKS:
        raise ValueError(f'attack {attack!r} is unknown; allowed: {", ".join(ATTACKS)}')
    if threat_model.bounds != (0.0, 1.0):
        raise ValueError(f'images lie in [0, 1], got bounds {threat_model.bounds}; write bounds=(0.0, 1.0)')
    if img_size is not None and not 8 <= img_size <= 4096:
        raise ValueError(f'img_size {img_size} is no size of an image; allowed: 8 to 4096')


def _check_fit(logits: nn.Module, data: ImageData) -> None:
    """Refuse a model that does not take these images, or that has other classes."""
    image = data.pixels(slice(0, 1))
    try:
        with torch.no_grad():
            shape = logits(image.to(device_of(logits, image))).shape
    except torch.cuda.OutOfMemoryError:  # a RuntimeError too
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f'the model does not take images {list(image.shape[1:])} of {data.name}: {error}') from error
    if data.num_classes < 2:
        raise ValueError(f'{data.name} has one class, so that no answer is wrong; measure on data of several')
    if len(shape) != 2:
        raise ValueError(f'the model gives {list(shape)}, not [1, classes], for one image; it is no classifier')
    if shape[1] != data.num_classes:
        raise ValueError(
            f'the model has {shape[1]} outputs, {data.name} has {data.num_classes} classes; use the data it was '
            f'trained for, or give it a new head with num_classes={data.num_classes} (--num-classes {data.num_classes})'
        )


def _pgd(
    logits: nn.Module,
    x: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    threat_model: ThreatModel,
    progress: Progress | None,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """PGD on the cross-entropy, each restart on the images still standing; adds its verdicts to tensors."""
    robust, x_adv, y_pred_adv = tensors['clean_correct'].clone(), x.clone(), tensors['y_pred'].clone()
    device, rejected = device_of(logits, x), 0
    for restart in range(restarts):
        left = robust.nonzero()[:, 0]
        if not len(left):
            break
        what = f'PGD-{steps} start {restart + 1} of {restarts}'
        for part in _paced(left.split(batch_size), what, progress):
            images, y = x[part].to(device), tensors['y'][part].to(device)
            keys = tuple(f'{seed}/{restart}/{index}' for index in part.tolist())
            start = SeededStart(threat_model.norm, threat_model.eps, threat_model.bounds, keys)
            found = pgd(cross_entropy_of(logits, y), images, start, steps=steps, step_size=step_size)
            found, labels, broken = recheck(logits, found, images, y, threat_model)
            rejected += int(((labels != y) & ~broken).sum())
            index = part[broken.to(x.device)]
            robust[index], x_adv[index] = False, found[broken].to(x.device)
            y_pred_adv[index] = labels[broken].to(x.device)
    tensors |= {'pgd_robust': robust, 'robust': robust, 'x_adv': x_adv, 'y_pred_adv': y_pred_adv}
    return {'pgd_acc': share(robust), 'rejected': rejected}


def _take_in(result: AutoAttackResult, tensors: dict[str, torch.Tensor], attack: str) -> dict[str, Any]:
    """What AutoAttack found, for the record; its verdicts replace those of PGD. What only PGD broke is a warning."""
    warnings = list(result.warnings)
    if missed := int((result.robust & ~tensors['pgd_robust']).sum()):
        warnings.append(f'PGD broke {missed} images that {attack} left standing')
    tensors |= {'robust': result.robust, 'x_adv': result.x_adv, 'y_pred_adv': result.y_pred_adv}
    record: dict[str, Any] = {'attack_version': _VERSIONS[attack], 'per_attack': result.per_attack}
    record |= {'warnings': warnings, 'search': 'folded' if result.searched else 'model'}
    record['apgd_acc'] = result.per_attack.get('apgd-t')
    record['autoattack_acc'] = share(result.robust) if attack == 'autoattack' else None
    return record


def _without_label(tensors: dict[str, torch.Tensor]) -> list[str]:
    """How many images and adversarial images the model has no label for; a line of text each."""
    clean = tensors['y_pred'] < 0
    flags = {'images': clean, 'adversarial images': (tensors.get('y_pred_adv', tensors['y_pred']) < 0) & ~clean}
    counts = {what: int(lost.sum()) for what, lost in flags.items()}
    return [f'the logits of {n} {what} are NaN: they count as wrong' for what, n in counts.items() if n]


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


def _paced(parts: Sequence[torch.Tensor], what: str, progress: Progress | None) -> Iterator[torch.Tensor]:
    """The parts in turn; says at most once a second how many images are done, how fast, and how long the rest takes."""
    total, done = sum(map(len, parts)), 0
    started = said = time.perf_counter()
    for part in parts:
        yield part
        done += len(part)
        now = time.perf_counter()
        if progress is not None and (now - said >= 1 or done == total):
            said, rate = now, done / (now - started)
            left = timedelta(seconds=round((total - done) / rate))
            progress(f'{what}: {done}/{total} images, {rate:.3g} images/s, {left} left')
