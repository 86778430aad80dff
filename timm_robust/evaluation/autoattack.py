"""AutoAttack (Croce & Hein 2020, https://arxiv.org/abs/2003.01690) through one door, every find checked again.

The attacks are pyautoattack's, run one at a time on the images that the ones before left standing. Batches and seeds
are those of one run of the library, so the verdicts are the same; in between, each adversarial image must fool the
untouched model from inside the ball. Verdicts depend on seed and batch size: AutoAttack re-seeds per batch.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..attacks import attacked, labels_of
from ..distributed import World
from ..precision import ieee_fp32
from ..threat_model import ThreatModel, check_images
from .batch_store import BatchStore, Found, identity
from .runner import VERSIONS, Fp32Logits, Report, Runner, check_counts, device_of, upstream

_KNOWN_BY = 16  # images whose logits tell a state_dir's model from another


@dataclass(frozen=True, eq=False)
class AutoAttackResult:
    """What AutoAttack left standing. Tensors are on the device of the images.

    Args:
        robust: whether the image is right clean and no adversarial image passed re-checking, [N] of bool.
        x_adv: the adversarial image where one was found, else the image itself, [N, C, H, W] of float32.
        y_pred_adv: the model's label of x_adv, [N].
        clean_correct: whether the model labels the clean image right, [N] of bool.
        per_attack: attack -> share of images still robust after it, in the order they ran.
        warnings: AutoAttack's own warnings, alike ones counted, and departures from its standard settings.
        rejected: adversarial images that an attack claimed and re-checking did not confirm.
        earlier_s: seconds that the batches found in state_dir took when they were run; of several processes, this
            one's share.
        searched: whether the search network was used; not if it labels an image otherwise than the model.
    """

    robust: torch.Tensor
    x_adv: torch.Tensor
    y_pred_adv: torch.Tensor
    clean_correct: torch.Tensor
    per_attack: dict[str, float]
    warnings: list[str]
    rejected: int
    earlier_s: float
    searched: bool


def autoattack(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel,
    *,
    version: str = 'standard',
    batch_size: int = 250,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
    search: nn.Module | None = None,
    state_dir: str | Path | None = None,
    world: World | None = None,
) -> AutoAttackResult:
    """Attack a model with AutoAttack and leave the model, the random numbers and the tracer as they were.

    Args:
        model: images in [0, 1] -> logits. It runs in eval mode, with frozen parameters, on its own device.
        x: images [N, C, H, W] in [0, 1], on any device.
        y: labels [N].
        threat_model: norm and radius; the bounds must be (0, 1).
        version: 'standard', all four attacks, or 'apgd', the first two of them with the same settings.
        batch_size: images a batch.
        seed: seed of every batch of every attack.
        progress: called with a line of text after every batch, and with the time left every 10 s.
        search: an equal but faster network to attack, such as `search_model` makes; the verdicts are the model's: an
            adversarial image that the model does not confirm is looked for again on the model itself.
        state_dir: folder that keeps what each batch found, so that a run that was killed goes on where it was, and
            'standard' where 'apgd' ended. What the model does not confirm anew, and what is damaged, is attacked again.
        world: the processes that share the batches out; each gets the whole result, the same as one process alone.

    Raises:
        ImportError: if pyautoattack is missing.
        ValueError: for an unknown version, wrong images or labels, bounds other than (0, 1), images of a size that
            Square fails at, and a state_dir of another measurement.
    """
    check_autoattack(x, y, threat_model, version, batch_size)
    x = x.detach().float().contiguous()
    y = y.detach().long().to(x.device)
    report, store = Report(progress), None
    world = world or World(x.device)
    with undisturbed(model):
        runner = partial(Runner, x=x, threat_model=threat_model, batch_size=batch_size, seed=seed, report=report)
        plain = runner(model)
        check_images(x, y, plain.num_classes)
        if state_dir is not None:
            facts = {'batch_size': batch_size, 'seed': seed, 'threat_model': str(threat_model), 'eps': threat_model.eps}
            facts |= identity(model, x, y) | {'search': search is not None, 'again': 'fp32'}  # the last: not always so
            logits = _logits(plain.logits, x[:_KNOWN_BY], batch_size).cpu()
            store = BatchStore(state_dir, facts, world.broadcast_object(logits))  # one text for all processes
        y_pred = predict(plain.logits, x, batch_size)
        clean_correct = y_pred == y
        if search is not None and not _labels_alike(search, x, y_pred, batch_size, report):
            search = None
        searcher = plain if search is None else runner(search)
        batches = _Batches(plain, searcher, x, y, threat_model, report, store, world)
        verdicts, per_attack = _Verdicts(clean_correct, x.clone(), y_pred), {'clean': share(clean_correct)}
        plan = plain.plan(version)
        later = sum(plan.values())
        for attack, work in plan.items():
            later -= work
            batches.attack_all(attack, verdicts, work, later)
            per_attack[attack] = share(verdicts.robust)
            report.say(f'{attack}: {per_attack[attack]:.2%} of {len(x)} images still robust')
        plain.checks.check_square_sr(per_attack, logger=report.logger)
    del per_attack['clean']
    return AutoAttackResult(
        robust=verdicts.robust,
        x_adv=verdicts.x_adv,
        y_pred_adv=verdicts.y_pred_adv,
        clean_correct=clean_correct,
        per_attack=per_attack,
        warnings=report.warnings(),
        rejected=verdicts.rejected,
        earlier_s=report.earlier_s,
        searched=search is not None,
    )


def _labels_alike(search: nn.Module, x: torch.Tensor, y_pred: torch.Tensor, batch_size: int, report: Report) -> bool:
    """Whether the search network labels every image as the model does; if not, that is said."""
    differ = int((predict(Fp32Logits(search), x, batch_size) != y_pred).sum())
    if differ:
        report.say(f'the faster copy labels {differ} images otherwise than the model; searching on the model')
    return not differ


@dataclass(eq=False)
class _Verdicts:
    """What is known of every image so far; the tensors are those of `AutoAttackResult`."""

    robust: torch.Tensor
    x_adv: torch.Tensor
    y_pred_adv: torch.Tensor
    rejected: int = 0

    def note(self, part: torch.Tensor, found: Found) -> None:
        """Take in what one attack found in one batch; part is the batch's places in the data."""
        broken = part[found.broken.to(part.device)]
        self.rejected += found.rejected
        self.robust = self.robust.index_fill(0, broken, False)
        self.x_adv[broken] = found.x_adv.to(part.device)
        self.y_pred_adv[broken] = found.labels.to(part.device)


@dataclass(frozen=True, eq=False)
class _Batches:
    """The images, the model that confirms, the copy that is searched, where finds are kept, who helps."""

    plain: Runner
    searcher: Runner
    x: torch.Tensor
    y: torch.Tensor
    threat_model: ThreatModel
    report: Report
    store: BatchStore | None
    world: World

    def attack_all(self, attack: str, verdicts: _Verdicts, work: int, later: int) -> None:
        """An attack on every image that is still robust; its work on one image, and that of those after it."""
        left = verdicts.robust.nonzero()[:, 0]
        if not len(left) or not self.threat_model.eps:  # at eps 0 the ball holds nothing but the image
            return
        parts, world = dict(enumerate(left.split(self.plain.batch_size))), self.world
        mine = {number: part for number, part in parts.items() if number % world.size == world.rank}
        self.report.start(attack, work * sum(map(len, mine.values())), len(left) * later / world.size)
        every = world.gather({number: self.attack(attack, number, part, work) for number, part in mine.items()})
        for number, found in every.items():
            verdicts.note(parts[number], found)
            self.report.messages += found.messages

    def attack(self, attack: str, number: int, part: torch.Tensor, work: int) -> Found:
        """What an attack finds in one batch, now or in the run before."""
        found = self._recall(attack, number, part) if self.store else None
        if found is None:
            found = self._find(attack, self.x[part], self.y[part])
            try:
                if self.store:
                    self.store.save(attack, number, part, found)
            except OSError as error:  # what was found counts all the same
                self.report.say(f'{error}; going on without')
        else:
            self.report.resume(len(part) * work, found.seconds)
        self.report.say(f'{attack}, batch {number + 1}: {len(found.broken)} of {len(part)} images broken')
        return found

    def _recall(self, name: str, number: int, part: torch.Tensor) -> Found | None:
        """What the run before found in a batch, if the model confirms it anew; None where it has to be attacked."""
        assert self.store is not None
        try:
            found = self.store.load(name, number, part, self.x.shape[1:])
            if found is None:
                return None
            images, x, y = self.x[part], self.x[part], self.y[part]
            images[found.broken] = found.x_adv.to(x.device)
            clamped, labels, broken = recheck(self.plain.logits, images, x, y, self.threat_model)
            index = found.broken.to(x.device)
            same = torch.equal(labels[index].cpu(), found.labels) and torch.equal(clamped, images)
            if not (same and broken[index].all()):
                raise ValueError(
                    f'{name}, batch {number + 1}: the model does not confirm what {self.store.folder} holds'
                )
        except ValueError as error:
            self.report.say(f'{error}; attacking this batch again')
            return None
        return found

    def _find(self, attack: str, x: torch.Tensor, y: torch.Tensor) -> Found:
        """One attack on one batch; what the model does not confirm is attacked again, on the model and in fp32.

        The first search is in the precision that the user has, TF32 on a GPU. An image whose clean label is wrong there
        alone counts as found, and would never be attacked.
        """
        started = time.perf_counter()
        messages, self.report.messages = self.report.messages, []
        claims, claimed = self.searcher.run(attack, x, y)
        claims, labels, broken = recheck(self.plain.logits, claims, x, y, self.threat_model)
        broken &= claimed
        again = claimed & ~broken
        if again.any():
            with ieee_fp32():
                more, sure = self.plain.run(attack, x[again], y[again])
            more, names, fell = recheck(self.plain.logits, more, x[again], y[again], self.threat_model)
            claims[again], labels[again] = more, names
            broken[again], claimed[again] = fell & sure, sure
        said, self.report.messages = self.report.messages, messages
        index, rejected = broken.nonzero()[:, 0].cpu(), int((claimed & ~broken).sum())
        seconds = time.perf_counter() - started
        return Found(index, claims[broken].cpu(), labels[broken].cpu(), rejected, said, seconds)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the body with the model in eval mode and its parameters frozen, then put everything back, whatever happened.

    Everything: the model's modes and requires_grad, the random numbers of torch, numpy and Python, and the tracer of
    sys.settrace.
    """
    trace, python_state, numpy_state = sys.gettrace(), random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with attacked(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        sys.settrace(trace)


def predict(model: nn.Module, x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The model's label of each image, [N], on the images' device; each verdict is one, in fp32 without TF32."""
    return labels_of(_logits(model, x, batch_size))


@torch.no_grad()
def _logits(model: nn.Module, x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Logits [N, classes] on the images' device, in fp32 without TF32."""
    device = device_of(model, x)
    with ieee_fp32():
        return torch.cat([model(part.to(device)).to(x.device) for part in x.split(batch_size)])


def recheck(
    model: nn.Module, x_adv: torch.Tensor, x: torch.Tensor, y: torch.Tensor, threat_model: ThreatModel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which images of a batch are broken: the label is wrong, and the image in the ball and the bounds (so no NaN).

    Returns:
        x_adv clamped to the bounds, the model's labels of it [N], and whether each image is broken [N].
    """
    x_adv = x_adv.clamp(*threat_model.bounds)
    labels = predict(model, x_adv, len(x_adv))
    tolerance = 1e-6 * max(1.0, threat_model.eps)  # rounding grows with the radius
    return x_adv, labels, (labels != y) & threat_model.contains(x_adv, x, tolerance)


def share(flags: torch.Tensor) -> float:
    """Share of true flags, exact where a float32 mean is not."""
    return int(flags.sum()) / len(flags)


def check_autoattack(
    x: torch.Tensor, y: torch.Tensor, threat_model: ThreatModel, version: str, batch_size: int
) -> None:
    """Refuse, before any work, what AutoAttack cannot do; the arguments are those of `autoattack`.

    Raises:
        ImportError: if pyautoattack is missing.
        ValueError: saying what is allowed.
    """
    upstream()
    if version not in VERSIONS:
        raise ValueError(f'version {version!r} is unknown; allowed: {", ".join(VERSIONS)}')
    check_counts(batch_size=batch_size)
    if threat_model.bounds != (0.0, 1.0):
        raise ValueError(f'AutoAttack clips to [0, 1], got bounds {threat_model.bounds}; write bounds=(0.0, 1.0)')
    check_images(x, y)
    if not len(x):
        raise ValueError('there are no images to attack')
    height, width = x.shape[2:]
    if version == 'standard' and threat_model.norm == 'L2' and not _tiles(height, width):
        raise ValueError(
            f"Square L2 of pyautoattack fails at images of {height} x {width} pixels; write version='apgd' "
            '(--attack apgd), or take images of another size: 32 x 32 and 224 x 224 work'
        )


def _tiles(height: int, width: int) -> bool:
    """Whether Square L2 finds room for its first windows, of a fifth of the height a side, none cut off at the rim."""
    side = height // 5
    start = (height - 5 * side) // 2
    return side == 1 or (side > 1 and all(start + length // side * side <= length for length in (height, width)))
