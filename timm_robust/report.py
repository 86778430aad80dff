"""What a trained classifier does: accuracy class by class, what it takes for what, the easiest and hardest images.

    timm-robust report RUN [--data-dir DIR]

looks at the images that the run held out of training, as they are and under PGD at the radius of training; the last
line of the output is the numbers as JSON. The claim to publish is that of `timm-robust evaluate RUN --split held_out`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .command_line import Parser, command, count, say, whole_number
from .data import ImageData
from .evaluation import attack, evenly, fit_channels
from .files import check_output
from .models import BEST, load_checkpoint, load_model
from .pixels import pixel_input
from .plots import report_figure
from .threat_model import ThreatModel
from .training import HELD_OUT, Recipe, held_out_images

_PICTURED = 8


@dataclass(frozen=True, eq=False)
class Report:
    """How a classifier answers, image by image.

    Args:
        y: labels [N].
        y_pred: its labels of the images [N].
        y_pred_adv: its labels of their adversarial images [N].
        x_adv: these images [N, C, H, W] in [0, 1].
        margin: logit of the right class minus the largest other one, under attack [N]; below 0: wrong.
        classes: names of the classes.
    """

    y: torch.Tensor
    y_pred: torch.Tensor
    y_pred_adv: torch.Tensor
    x_adv: torch.Tensor
    margin: torch.Tensor
    classes: tuple[str, ...]

    def confusion(self, attacked: bool) -> torch.Tensor:
        """Images of each class (row) that got each label (column), [classes, classes]."""
        size, predicted = len(self.classes), self.y_pred_adv if attacked else self.y_pred
        return torch.bincount(self.y * size + predicted, minlength=size**2).view(size, size)

    @property
    def robust(self) -> torch.Tensor:
        """Whether an image is right as it is and under attack, [N]."""
        return (self.y_pred == self.y) & (self.y_pred_adv == self.y)

    def extremes(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The n images with the largest and those with the smallest margin, the most extreme first."""
        order = self.margin.argsort(descending=True)
        return order[:n], order.flip(0)[:n]

    def lines(self) -> list[str]:
        """The table: a class a line, the worst under attack first, with what it is most often taken for."""
        counts = self.confusion(False), self.confusion(True)
        rows: list[tuple[float, str, int, float, str]] = []
        for number, name in enumerate(self.classes):
            of_class = self.y == number
            if n := int(of_class.sum()):
                right = float((self.y_pred[of_class] == number).float().mean())
                robust = float(self.robust[of_class].float().mean())
                rows.append((robust, name, n, right, '; '.join(_taken(each, number, self.classes) for each in counts)))
        width = max(len(name) for _, name, *_ in rows)
        lines = [f'{"class":{width}s}  images   clean  robust   most often taken for: as it is; under attack']
        for robust, name, n, right, taken in sorted(rows):
            lines.append(f'{name:{width}s}  {n:6d}  {right:6.1%}  {robust:6.1%}   {taken}')
        total = self.record()
        return [*lines, f'{"all":{width}s}  {total["n"]:6d}  {total["clean_acc"]:6.1%}  {total["pgd_acc"]:6.1%}']

    def record(self) -> dict[str, Any]:
        """The numbers, for a program."""
        return {
            'n': len(self.y),
            'clean_acc': int((self.y_pred == self.y).sum()) / len(self.y),
            'pgd_acc': int(self.robust.sum()) / len(self.y),
            'classes': list(self.classes),
            'confusion': self.confusion(False).tolist(),
            'confusion_adv': self.confusion(True).tolist(),
        }


def _taken(confusion: torch.Tensor, number: int, classes: Sequence[str]) -> str:
    """The wrong class that a class is most often taken for."""
    wrong = confusion[number].clone()
    wrong[number] = 0
    return f'{classes[int(wrong.argmax())]} ({int(wrong.max())})' if wrong.any() else '-'


def examine(
    model: nn.Module, data: ImageData, threat_model: ThreatModel, *, steps: int = 20, batch_size: int = 50
) -> Report:
    """Look at a classifier image by image, as the images are and under PGD.

    Args:
        model: images -> logits, as timm trains it.
        data: images with labels.
        threat_model: norm and radius.
        steps: of PGD.
        batch_size: images a batch.

    Raises:
        ValueError: if logits are NaN, or of another number of classes.
    """
    x, network = data.pixels(), pixel_input(model)
    x_adv = attack(model, x, data.labels, threat_model, steps=steps, batch_size=batch_size)
    with torch.no_grad():
        output, output_adv = (
            torch.cat([network(part).float() for part in images.split(batch_size)]) for images in (x, x_adv)
        )
    if lost := int((output.isnan() | output_adv.isnan()).any(1).sum()):
        raise ValueError(f'the logits of the model are NaN on {lost} of {len(x)} images: its training diverged')
    if output.shape[1] != len(data.classes):
        raise ValueError(f'the model has {output.shape[1]} outputs, {data.name} has {len(data.classes)} classes')
    own = data.labels[:, None]
    others = output_adv.scatter(1, own, -torch.inf).amax(1)
    margin = output_adv.gather(1, own)[:, 0] - others
    return Report(data.labels, output.argmax(1), output_adv.argmax(1), x_adv, margin, data.classes)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, save the picture; 0 if it ended well, 2 for bad input."""
    args = _parser().parse_args(argv)
    path = args.run / BEST if args.run.is_dir() else args.run
    state = load_checkpoint(path)
    model = load_model(path)
    data = evenly(fit_channels(model, held_out_images(path, args.data_dir)), args.n)
    recipe = Recipe.from_checkpoint(state)
    threat_model = ThreatModel(recipe.norm, args.eps or recipe.eps)  # type: ignore[arg-type]
    threat_model.check_scale()
    if not threat_model.eps:
        raise ValueError(f'eps {args.eps!r} leaves the attack no room; allowed: > 0')
    picture = args.output or path.parent / 'report.png'
    check_output(picture)
    say(f'attacking {len(data)} images, PGD-{args.steps}')
    found = examine(model, data, threat_model, steps=args.steps)
    where = f'{len(data)} images of {data.name} that it was not trained on'
    rest = f'--norm {recipe.norm} --eps {args.eps or recipe.eps}'
    rest += f' --data-dir {shlex.quote(args.data_dir)}' if args.data_dir else ''
    print(f'{recipe.model} on {where}, {threat_model}, PGD-{args.steps}\n')
    print(*found.lines(), sep='\n')
    print(f"\nuse it:  model = timm_robust.load_model('{args.run}')  # images in [0, 1]; else as any model of timm")
    print(f'claim:   timm-robust evaluate {args.run} --split {HELD_OUT} --attack autoattack {rest}')
    print(f'picture: {picture}')
    record = {**found.record(), 'model': recipe.model, 'threat_model': str(threat_model), 'steps': args.steps}
    print(json.dumps(record), flush=True)  # before the picture, which a full disk may refuse
    easiest, hardest = found.extremes(min(_PICTURED, len(data)))
    shown = {
        title: (data.pixels(index), found.y[index], found.y_pred[index], found.y_pred_adv[index])
        for title, index in (('hardest: label -> answer, under attack', hardest), ('easiest', easiest))
    }
    report_figure(picture, found.confusion(False), found.confusion(True), shown, data.classes, threat_model)
    return 0


def _parser() -> Parser:
    """The options; each with its default in the help."""
    parser = Parser(
        'python -m timm_robust.report',
        description='What a trained classifier does, class by class.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('run', type=Path, metavar='RUN', help='folder that training wrote, or a checkpoint of it')
    add('--data-dir', help='folder that holds the data now; where it was, if not given')
    add('-n', type=count, help='images, evenly out of those held out; all if not given')
    add('--steps', type=whole_number(1, 10_000), default=20, metavar='N', help='steps of PGD')
    add('--eps', help='radius, such as 4/255; that of training if not given')
    add('-o', '--output', type=Path, metavar='FILE', help='the picture, a PNG; report.png in RUN if not given')
    return parser


if __name__ == '__main__':
    sys.exit(main())
