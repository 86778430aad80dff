"""One picture, one model, one attack: what the page shows, computed without the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..attacks import apgd, attacked, cross_entropy_of, fgsm, labels_of
from ..data import ImageData
from ..evaluation import attack
from ..models import trained_classes
from ..pixels import pixel_input
from ..threat_model import ThreatModel
from .pictures import as_input, classes_of, input_size

ATTACKS: dict[str, dict[str, Any]] = {
    'PGD, 10 steps': {'steps': 10},
    'PGD, 40 steps': {'steps': 40},
    'FGSM, 1 step': {'climb': fgsm},
    'Auto-PGD, 20 steps': {'climb': partial(apgd, steps=20)},
}
"""Attack by its title: steps of `timm_robust.attack`, or a climb of the cross-entropy."""
RADII = (1, 2, 4, 6, 8, 12, 16)
"""Of the curve, in 255ths for Linf; for L2 sixteen times as much, so that the usual 8/255 and 0.5 are in it."""


@dataclass(frozen=True)
class Outcome:
    """A model before and after an attack.

    Args:
        x: the picture as the model sees it [C, H, W] in [0, 1].
        x_adv: the adversarial picture.
        clean: probability of each class, of x [K].
        adversarial: the same, of x_adv.
        label: index of the class that the attack leads away from.
        given: whether the visitor named that class; else it is what the model sees in x.
        classes: names of the classes [K].
        threat_model: norm and radius.
    """

    x: torch.Tensor
    x_adv: torch.Tensor
    clean: torch.Tensor
    adversarial: torch.Tensor
    label: int
    given: bool
    classes: tuple[str, ...]
    threat_model: ThreatModel

    @property
    def fooled(self) -> bool:
        """Whether the adversarial picture is not taken for its class."""
        return int(self.adversarial.argmax()) != self.label

    @property
    def magnified(self) -> tuple[torch.Tensor, float]:
        """The perturbation on grey [C, H, W], and the factor: what changes most is black or white."""
        delta = self.x_adv - self.x
        largest = self.threat_model.eps if self.threat_model.norm == 'Linf' else float(delta.abs().max())
        factor = 0.5 / max(largest, 1e-6)
        return (0.5 + factor * delta).clamp(0, 1), factor


def compare(
    model: nn.Module, picture: Image.Image, threat_model: ThreatModel, method: str, label: str | None = None
) -> Outcome:
    """Attack a picture on a model.

    Args:
        model: as load_model gives it.
        picture: in RGB, of any size.
        threat_model: norm and radius in pixels on [0, 1].
        method: a key of ATTACKS.
        label: name of the class in the picture; None, or one that the model does not know: what the model sees in it.

    Raises:
        ValueError: for another method, or a radius that is refused.
    """
    if method not in ATTACKS:
        raise ValueError(f'attack {method!r} is unknown; allowed: {", ".join(ATTACKS)}')
    threat_model.check_scale()
    network, classes, x = pixel_input(model), classes_of(model), as_input(picture, model)
    clean = _probabilities(network, x)
    given = label in classes
    y = torch.tensor([classes.index(label) if given else int(clean.argmax())])
    if climb := ATTACKS[method].get('climb'):
        with attacked(network):  # seeded, so that each answer is the same
            x_adv = climb(cross_entropy_of(network, y), x, threat_model, generator=torch.Generator().manual_seed(0))
    else:
        x_adv = attack(model, x, y, threat_model, **ATTACKS[method])
    return Outcome(x[0], x_adv[0], clean, _probabilities(network, x_adv), int(y), given, classes, threat_model)


def _probabilities(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = network(x).float().softmax(1)[0]
    if found.isnan().any():
        raise ValueError('the logits of the model are NaN on this picture: its weights may be damaged')
    return found


def accuracy_curve(model: nn.Module, data: ImageData, norm: str) -> Iterator[list[tuple[float, int]]]:
    """Images that resist PGD-10 at each radius, from 0 up: (eps, how many), one point more each time.

    An image that falls at a radius is in every larger ball too, so it is not attacked again; a wrong answer without an
    attack counts as fallen at 0.

    Args:
        model: as load_model gives it.
        data: the images; n of them.
        norm: of the perturbation.

    Raises:
        ValueError: for images that do not fit the model, or of classes that it does not know.
    """
    if classes := trained_classes(model):
        data = data.with_classes(classes)
    if data.num_classes != len(classes_of(model)):
        raise ValueError(f'{data.name} has {data.num_classes} classes, this model {len(classes_of(model))}')
    data = data.with_channels(input_size(model)[0])
    network, x, y = pixel_input(model), data.pixels(), data.labels
    right = _right(network, x, y)
    points = [(0.0, int(right.sum()))]
    yield list(points)
    for radius in RADII:
        eps = (radius if norm == 'Linf' else 16 * radius) / 255
        x, y = x[right], y[right]
        right = _right(network, attack(model, x, y, ThreatModel(norm, eps)), y) if len(x) else right[right]
        points.append((eps, int(right.sum())))
        yield list(points)


def _right(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([labels_of(network(part)) for part in x.split(250)]) == y
