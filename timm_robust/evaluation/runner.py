"""One attack of pyautoattack at a time, on any model, with its warnings and its progress collected."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..threat_model import ThreatModel

VERSIONS = {'standard': ('apgd-ce', 'apgd-t', 'fab-t', 'square'), 'apgd': ('apgd-ce', 'apgd-t')}
_TARGETS = 9  # target classes of AutoAttack's targeted attacks
_DLR_CLASSES = 4  # the targeted DLR loss divides by z_1 - (z_3 + z_4) / 2, of the logits in falling order
_REPORT_EVERY_S = 10.0


class Runner:
    """The attacks of pyautoattack, with the standard settings, run one at a time on one model."""

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        threat_model: ThreatModel,
        batch_size: int,
        seed: int,
        report: Report,
    ) -> None:
        library = upstream()
        self.checks, self.report, self.batch_size = library.checks, report, batch_size
        self.device = device_of(model, x)
        self.logits = Fp32Logits(model, report.count)
        self.num_classes = self.logits(x[:1].to(self.device)).shape[-1]
        self.targets = min(_TARGETS, self.num_classes - 1)
        norm, eps = threat_model.norm, threat_model.eps
        runner = library.AutoAttack(self.logits, norm=norm, eps=eps, seed=seed, device=self.device, version='standard')
        runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = self.targets
        if self.num_classes < _DLR_CLASSES:
            runner.apgd_targeted.dlr_loss_targeted = partial(_targeted_loss_of_few, runner.apgd_targeted)
        runner.square.random_int = _random_int_on_host
        runner.logger = runner.apgd.logger = runner.apgd_targeted.logger = report.logger
        self.runner = runner

    def plan(self, version: str) -> dict[str, int]:
        """The attacks to run -> the work on an image that survives it, in image forwards (with backward: 3)."""
        classes, targets = self.num_classes, self.targets
        if classes < 2:
            raise ValueError(f'the model has {classes} output; AutoAttack needs logits of at least 2 classes')
        if targets < _TARGETS:
            self.report.messages.append(f'{classes} classes: {targets} target classes instead of {_TARGETS}')
        if classes < _DLR_CLASSES:
            loss = 'the difference of the two logits' if classes == 2 else 'the DLR loss over the third largest logit'
            self.report.messages.append(f'{classes} classes: apgd-t climbs {loss}, for its own needs {_DLR_CLASSES}')
        work = {'apgd-ce': 303, 'apgd-t': 304 * targets, 'fab-t': 403 * targets, 'square': 5000}
        return {attack: work[attack] for attack in VERSIONS[version]}

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


class Report:
    """Collects AutoAttack's warnings, passes its batches on, and estimates the time left from the forwards so far."""

    def __init__(self, progress: Callable[[str], object] | None) -> None:
        self.progress, self.messages = progress, list[str]()
        self.logger = logging.Logger('timm_robust.autoattack')  # unregistered: nobody's handlers and levels change
        self.logger.addFilter(self._take)
        self.all_done, self.earlier_s = 0, 0.0
        self.start('', 0.0, 0.0)
        self.started = self.said = time.perf_counter()

    def start(self, attack: str, plan: float, later: float) -> None:
        """An attack begins; plan is its work in image forwards, later that of those after it, if all images survive."""
        self.attack, self.plan, self.later, self.done = attack, plan, later, 0

    def resume(self, work: int, seconds: float) -> None:
        """A batch was done before, in that time."""
        self.plan -= work
        self.earlier_s += seconds

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
        kinds: dict[str, list[str]] = {}
        for text in self.messages:
            kinds.setdefault(re.sub(r'\d+', '#', text), []).append(text)
        return [alike[0] + (f' ({len(alike)} times)' if len(alike) > 1 else '') for alike in kinds.values()]

    def _take(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno >= logging.WARNING and 'not possible to use' not in text:  # the DLR loss: plan says it
            self.messages.append(text)
            self.say(f'warning: {text}')
        return False


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


def _targeted_loss_of_few(attack: Any, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What APGD-T climbs for 2 and 3 classes, where the targeted DLR loss is undefined: [B] of logits [B, classes].

    z_t - z_y for two, to which the sorted logits add nothing; (z_t - z_y) / (z_1 - z_3) for three, the denominator of
    the DLR loss without target (Croce and Hein 2020, equation 6). Neither vanishes where cross-entropy underflows.
    """
    rows = torch.arange(len(y), device=y.device)
    margin = logits[rows, attack.y_target] - logits[rows, y]
    if logits.shape[1] == 2:
        return margin
    return margin / (logits.amax(1) - logits.amin(1) + 1e-12)


def _random_int_on_host(low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> torch.Tensor:
    """Square's positions, as upstream draws them, but left on the CPU: it slices by them, and would wait for a GPU."""
    return (low + (high - low) * torch.rand(shape)).long()


def check_counts(**counts: int) -> None:
    """Refuse a number of steps, restarts or images that is below 1."""
    for what, count in counts.items():
        if count < 1:
            raise ValueError(f'{what} must be at least 1, got {count}')


def device_of(model: nn.Module, x: torch.Tensor) -> torch.device:
    """The model's device, or that of the images x for a model without parameters."""
    return next((p.device for p in model.parameters()), x.device)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating type that the model takes: that of its first floating parameter, else float32."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def upstream() -> Any:
    """The library behind this module.

    Raises:
        ImportError: if it is missing, with what to type.
    """
    try:
        import pyautoattack.checks
    except ImportError as error:
        raise ImportError("AutoAttack needs pyautoattack; type: pip install 'pyautoattack>=0.2.0'") from error
    return pyautoattack
