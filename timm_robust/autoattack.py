"""AutoAttack (Croce & Hein 2020, https://arxiv.org/abs/2003.01690) through one door, every find checked again.

The attacks are pyautoattack's, run one at a time on the images that the ones before left standing. Batches and seeds
are those of one run of the library, so the verdicts are the same; in between, each adversarial image must fool the
untouched model from inside the ball. Verdicts depend on seed and batch size: AutoAttack re-seeds per batch.
"""

from __future__ import annotations

import logging
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .attacks import attacked
from .autoattack_state import BatchStore, Found, identity
from .threat_model import ThreatModel, check_images

VERSIONS = {'standard': ('apgd-ce', 'apgd-t', 'fab-t', 'square'), 'apgd': ('apgd-ce', 'apgd-t')}
_TARGETS = 9  # target classes of AutoAttack's targeted attacks
_REPORT_EVERY_S = 10.0


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
        wall_time_s: duration in seconds.
        version: 'standard' or 'apgd'.
    """

    robust: torch.Tensor
    x_adv: torch.Tensor
    y_pred_adv: torch.Tensor
    clean_correct: torch.Tensor
    per_attack: dict[str, float]
    warnings: list[str]
    rejected: int
    wall_time_s: float
    version: str


def autoattack(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel,
    *,
    version: str = 'standard',
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[str], object] | None = None,
    search: nn.Module | None = None,
    state_dir: str | Path | None = None,
) -> AutoAttackResult:
    """Attack a model with AutoAttack and leave the model, the random numbers and the tracer as they were.

    Args:
        model: images in [0, 1] -> logits. It runs in eval mode, with frozen parameters.
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat_model: norm and radius; the bounds must be (0, 1).
        version: 'standard', all four attacks, or 'apgd', the first two of them with the same settings.
        batch_size: images a batch.
        seed: seed of every batch of every attack.
        device: where to attack; the model's own device if None. The images may be elsewhere.
        progress: called with a line of text after every batch, and with the time left every 10 s.
        search: an equal but faster network to attack, such as `search_model` makes; the verdicts are the model's: an
            adversarial image that the model does not confirm is looked for again on the model itself.
        state_dir: folder that keeps what each batch found, so that a run that was killed goes on where it was.

    Raises:
        ImportError: if pyautoattack is missing.
        ValueError: for an unknown version, wrong images or labels, bounds other than (0, 1), and a state_dir of
            another measurement or with a damaged file.
    """
    started = time.perf_counter()
    _check(x, y, threat_model, version, batch_size)
    x = x.detach().float().contiguous()
    y = y.detach().long().to(x.device)
    report = _Report(progress)
    store = None
    if state_dir is not None:
        facts = {'version': version, 'batch_size': batch_size, 'seed': seed, 'threat_model': str(threat_model)}
        store = BatchStore(state_dir, facts | identity(model, x, y) | {'search': search is not None})
    with undisturbed(model):
        plain = _Runner(model, x, threat_model, batch_size, seed, device, report)
        check_images(x, y, plain.num_classes)
        y_pred_adv = predict(plain.logits, x, batch_size)
        runner = plain
        if search is not None and torch.equal(predict(Fp32Logits(search), x, batch_size), y_pred_adv):
            runner = _Runner(search, x, threat_model, batch_size, seed, device, report)
        robust = clean_correct = y_pred_adv == y
        x_adv, rejected, per_attack = x.clone(), 0, {'clean': share(robust)}
        plan = plain.plan(version)
        for attack in list(plan):
            left = robust.nonzero()[:, 0]
            if len(left) and threat_model.eps:  # at eps 0 the ball holds nothing but the image
                work = plan.pop(attack)
                report.start(attack, len(left) * work, len(left) * sum(plan.values()))
                parts = left.split(batch_size)
                for number, part in enumerate(parts):
                    found = store.load(attack, number, part) if store else None
                    if found is None:
                        found = _find(runner, plain, attack, x[part], y[part], threat_model, report)
                        if store:
                            store.save(attack, number, part, found)
                    else:
                        report.resume(len(part) * work, found.messages)
                    broken = part[found.broken.to(part.device)]
                    report.say(f'{attack} - {number + 1}/{len(parts)} - {len(broken)} of {len(part)} images broken')
                    rejected += found.rejected
                    robust = robust.index_fill(0, broken, False)
                    x_adv[broken], y_pred_adv[broken] = found.x_adv.to(x.device), found.labels.to(x.device)
            per_attack[attack] = share(robust)
            report.say(f'{attack}: {per_attack[attack]:.2%} of {len(x)} images still robust')
        plain.checks.check_square_sr(per_attack, logger=report.logger)
    del per_attack['clean']
    seconds, warnings = time.perf_counter() - started, report.warnings()
    return AutoAttackResult(robust, x_adv, y_pred_adv, clean_correct, per_attack, warnings, rejected, seconds, version)


def _find(
    runner: _Runner,
    plain: _Runner,
    attack: str,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel,
    report: _Report,
) -> Found:
    """One attack on one batch: on the runner's network, and again on the model for what the model did not confirm."""
    said = len(report.messages)
    claims, claimed = runner.run(attack, x, y)
    claims, labels, broken = recheck(plain.logits, claims, x, y, threat_model, len(x))
    broken &= claimed
    again = claimed & ~broken
    if runner is not plain and again.any():
        more, sure = plain.run(attack, x[again], y[again])
        more, names, fell = recheck(plain.logits, more, x[again], y[again], threat_model, len(x))
        claims[again], labels[again] = more, names
        broken[again], claimed[again] = fell & sure, sure
    index = broken.nonzero()[:, 0].cpu()
    return Found(index, claims[broken], labels[broken], int((claimed & ~broken).sum()), report.messages[said:])


class Fp32Logits(nn.Module):
    """A model as an attack wants it: any floating images in, contiguous float32 logits out, whatever it computes in.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        on_forward: called with each batch of images, to count.
    """

    def __init__(self, model: nn.Module, on_forward: Callable[[torch.Tensor], object] | None = None) -> None:
        """Note the floating type that the model takes."""
        super().__init__()
        self.model, self.on_forward, self.dtype = model, on_forward, dtype_of(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of float32; a fresh tensor, for Square writes into it."""
        if self.on_forward is not None:
            self.on_forward(x)
        output = self.model(x.to(self.dtype).contiguous()).float().clone(memory_format=torch.contiguous_format)
        if x.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
            output = output + 0 * x.flatten(1).sum(1, keepdim=True)  # cut off from the pixels: gradient 0, no crash
        return output


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


@torch.no_grad()
def predict(model: nn.Module, x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The model's label of each image, [N], on the images' device."""
    device = device_of(model, x)
    return torch.cat([model(part.to(device)).argmax(1).to(x.device) for part in x.split(batch_size)])


def recheck(
    model: nn.Module,
    x_adv: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    threat_model: ThreatModel,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which images are broken: the label is wrong, and the image is inside the ball and the bounds (so it is no NaN).

    Returns:
        x_adv clamped to the bounds, the model's labels of it [N], and whether each image is broken [N].
    """
    x_adv = x_adv.clamp(*threat_model.bounds)
    labels = predict(model, x_adv, batch_size)
    tolerance = 1e-6 * max(1.0, threat_model.eps)  # rounding grows with the radius
    return x_adv, labels, (labels != y) & threat_model.contains(x_adv, x, tolerance)


def device_of(model: nn.Module, x: torch.Tensor) -> torch.device:
    """The model's device, or that of the images x for a model without parameters."""
    return next((p.device for p in model.parameters()), x.device)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating type that the model takes: that of its first floating parameter, else float32."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def share(flags: torch.Tensor) -> float:
    """Share of true flags, exact where a float32 mean is not."""
    return int(flags.sum()) / len(flags)


def upstream() -> Any:
    """The library behind this module.

    Raises:
        ImportError: if it is missing, with what to type.
    """
    try:
        import pyautoattack.checks
    except ImportError as error:
        raise ImportError('AutoAttack needs pyautoattack; type: pip install timm-robust[eval]') from error
    return pyautoattack


class _Runner:
    """The attacks of pyautoattack, with the standard settings, run one at a time on one model."""

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        threat_model: ThreatModel,
        batch_size: int,
        seed: int,
        device: torch.device | str | None,
        report: _Report,
    ) -> None:
        library = upstream()
        self.checks, self.report, self.batch_size = library.checks, report, batch_size
        self.device = torch.device(device) if device is not None else device_of(model, x)
        if self.device.type != device_of(model, x.to(self.device)).type:
            raise ValueError(f'the model is not on {self.device}; move it there with model.to({str(self.device)!r})')
        self.logits = Fp32Logits(model, report.count)
        self.num_classes = self.logits(x[:1].to(self.device)).shape[-1]
        self.targets = min(_TARGETS, self.num_classes - 1)
        norm, eps = threat_model.norm, threat_model.eps
        runner = library.AutoAttack(self.logits, norm=norm, eps=eps, seed=seed, device=self.device, version='standard')
        runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = self.targets
        runner.logger = runner.apgd.logger = runner.apgd_targeted.logger = report.logger
        self.runner = runner

    def plan(self, version: str) -> dict[str, int]:
        """The attacks to run -> the work on an image that survives it, in image forwards (with backward: 3)."""
        classes, targets = self.num_classes, self.targets
        if classes < 2:
            raise ValueError(f'the model has {classes} output; AutoAttack needs logits of at least 2 classes')
        if targets < _TARGETS:
            self.report.messages.append(f'{classes} classes: {targets} target classes instead of {_TARGETS}')
        work = {'apgd-ce': 303, 'apgd-t': 304 * targets, 'fab-t': 403 * targets, 'square': 5000}
        plan = {attack: work[attack] for attack in VERSIONS[version]}
        if classes < 4:
            self.report.messages.append(f'{classes} classes: no apgd-t, for its DLR loss needs at least 4')
            del plan['apgd-t']
        return plan

    def run(self, attack: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The images that one attack returns, [N, C, H, W], and which of them it claims to be adversarial, [N]."""
        self.logits(x[: self.batch_size].to(self.device))  # compile now, not under upstream's traced check
        counters = self.checks.funcs  # global; upstream never resets them, so one dynamic model taints the next
        counters.update(dict.fromkeys(counters, 0))
        self.runner.attacks_to_run = [attack]
        try:
            x_adv, labels = self.runner.run_standard_evaluation(x, y, batch_size=self.batch_size)
        finally:
            counters.update(dict.fromkeys(counters, 0))
        return x_adv, labels != y


class _Report:
    """Collects AutoAttack's warnings, passes its batches on, and estimates the time left from the forwards so far."""

    def __init__(self, progress: Callable[[str], object] | None) -> None:
        self.progress, self.messages = progress, list[str]()
        self.logger = logging.Logger('timm_robust.autoattack')  # unregistered: nobody's handlers and levels change
        self.logger.addFilter(self._take)
        self.attack, self.plan, self.later, self.done, self.all_done = '', 0, 0, 0, 0
        self.started = self.said = time.perf_counter()

    def start(self, attack: str, plan: int, later: int) -> None:
        """An attack begins; plan is its work in image forwards, later that of those after it, if all images survive."""
        self.attack, self.plan, self.later, self.done = attack, plan, later, 0

    def resume(self, work: int, messages: list[str]) -> None:
        """A batch was done before; what it said is said again."""
        self.plan -= work
        self.messages += messages

    def count(self, x: torch.Tensor) -> None:
        """Note one forward of a batch."""
        work = len(x) * (3 if x.requires_grad else 1)
        self.done, self.all_done, now = self.done + work, self.all_done + work, time.perf_counter()
        if self.attack and now - self.said > _REPORT_EVERY_S:
            self.said = now
            left = (max(self.plan - self.done, 0) + self.later) * (now - self.started) / self.all_done
            self.say(
                f'{self.attack}: {min(self.done / max(self.plan, 1), 1):.0%}, at most {left / 60:.1f} min left in all'
            )

    def say(self, message: str) -> None:
        """Pass a line on."""
        if self.progress is not None:
            self.progress(message)

    def warnings(self) -> list[str]:
        """The warnings; those that differ only in their numbers once, with their count."""
        kinds = Counter(re.sub(r'\d+', '#', text) for text in self.messages)
        first = {re.sub(r'\d+', '#', text): text for text in reversed(self.messages)}
        return [first[kind] + (f' ({count} times)' if count > 1 else '') for kind, count in kinds.items()]

    def _take(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.messages.append(text)
            self.say(f'warning: {text}')
        return False


def _check(x: torch.Tensor, y: torch.Tensor, threat_model: ThreatModel, version: str, batch_size: int) -> None:
    """Refuse what AutoAttack cannot do."""
    if version not in VERSIONS:
        raise ValueError(f'version {version!r} is unknown; allowed: {", ".join(VERSIONS)}')
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
    if threat_model.bounds != (0.0, 1.0):
        raise ValueError(f'AutoAttack clips to [0, 1], got bounds {threat_model.bounds}; write bounds=(0.0, 1.0)')
    check_images(x, y)
    if not len(x):
        raise ValueError('there are no images to attack')
    if version == 'standard' and threat_model.norm == 'L2' and min(x.shape[2:]) < 5:
        raise ValueError(f"Square L2 needs sides of at least 5 pixels, got {list(x.shape[2:])}; write version='apgd'")
