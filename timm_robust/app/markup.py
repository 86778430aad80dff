"""The pieces of the page as HTML, without a file or an address in it: pictures are inside, as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from ..data import CIFAR10_CLASSES
from .outcome import Outcome
from .pictures import EXAMPLES

_SHOWN = 5
_SMALL = 160  # pixels a side up to which a picture's own are shown as squares
CSS = """
.robust {display: flex; flex-wrap: wrap; gap: 1.5rem}
.robust article {flex: 1 1 24rem; min-width: 0}
.robust h3 {margin: 0 0 .2rem; overflow-wrap: anywhere}
.robust .pictures {display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; margin: .5rem 0}
.robust figure {margin: 0; font-size: .85rem}
.robust img {width: 100%; border: 1px solid #8888; margin: 0}
.robust img.small {image-rendering: pixelated}
.robust table {width: 100%; border-collapse: collapse; font-size: .85rem}
.robust th, .robust td {text-align: left; padding: .1rem .4rem .1rem 0; border: none}
.robust td.bar {width: 36%; white-space: nowrap}
.robust meter {width: calc(100% - 4rem); height: .9rem; vertical-align: middle}
.robust .verdict {font-weight: 600}
.robust .fooled {color: #d55e00}
.robust .resists {color: #009e73}
.robust svg {max-width: 34rem; width: 100%; height: auto}
.refused {border: 2px solid #d55e00; border-radius: .4rem; padding: .8rem; font-weight: 600}
"""
"""Colours of Okabe and Ito, told apart by colour-blind readers; words say the same."""


def data_uri(picture: Image.Image) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    picture.save(file, 'png')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


def example_css() -> str:
    """What shows the choices of the examples, a radio button each, as their pictures."""
    side, sheet = 56, Image.open(EXAMPLES).convert('RGB')
    tile = f'width: {side}px; height: {side}px; background-size: {side * len(CIFAR10_CLASSES)}px {side}px'
    lines = [
        f'#examples label::before {{content: ""; {tile}; background-image: url({data_uri(sheet)}); '
        'image-rendering: pixelated}',
        '#examples label {padding: .3rem .5rem; gap: .5rem; flex: 1 1 8rem}',
    ]
    lines += [
        f'#examples label:nth-of-type({number + 1})::before {{background-position: -{number * side}px 0}}'
        for number in range(len(CIFAR10_CLASSES))
    ]
    return '\n'.join(lines)


def refusal(error: Exception) -> str:
    """What is wrong with what was given."""
    return f'<div class="refused" role="alert">{escape(str(error))}</div>'


def outcomes(found: dict[str, Outcome], method: str, note: str) -> str:
    """The models side by side: the picture before and after the attack, the perturbation, the probabilities."""
    articles = ''.join(_article(title, outcome, method) for title, outcome in found.items())
    return f'<p>{escape(note)}</p><div class="robust">{articles}</div>'


def _article(title: str, found: Outcome, method: str) -> str:
    away = found.classes[found.label]
    source = 'its class' if found.given else 'what it sees in the picture'
    verdict = 'fooled' if found.fooled else 'resists'
    said = f'fooled: takes it for {found.classes[int(found.adversarial.argmax())]}' if found.fooled else 'resists'
    if (seen := int(found.clean.argmax())) != found.label:
        verdict, said = 'fooled', f'wrong before the attack: takes it for {found.classes[seen]}'
    height, width = found.x.shape[-2:]
    perturbation, factor = found.magnified
    moved = f'{found.threat_model}, {method}'
    return (
        f'<article><h3>{escape(title)}</h3><p>Sees {width} x {height} pixels. Attack: {escape(moved)}, away from '
        f'<b>{escape(away)}</b>, {source}.</p><p class="verdict {verdict}">{escape(said)}</p><div class="pictures">'
        + _figure(found.x, 'clean')
        + _figure(found.x_adv, 'adversarial')
        + _figure(perturbation, f'perturbation x {factor:.3g}, grey is none')
        + f'</div>{_table(found)}</article>'
    )


def _figure(image: torch.Tensor, caption: str) -> str:
    small = ' class="small"' if max(image.shape[-2:]) <= _SMALL else ''
    address = data_uri(to_pil_image(image))
    return f'<figure><img{small} src="{address}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _table(found: Outcome) -> str:
    """The likeliest classes before or after the attack, each with both probabilities."""
    order = torch.maximum(found.clean, found.adversarial).argsort(descending=True)[:_SHOWN].tolist()
    rows = [
        f'<tr><th scope="row">{escape(found.classes[index])}</th>'
        + ''.join(f'<td class="bar">{_meter(share[index])}</td>' for share in (found.clean, found.adversarial))
        + '</tr>'
        for index in order
    ]
    head = '<tr><th scope="col">class</th><th scope="col">clean</th><th scope="col">adversarial</th></tr>'
    return f'<table>{head}{"".join(rows)}</table>'


def _meter(share: torch.Tensor) -> str:
    value = float(share)
    return f'<meter min="0" max="1" value="{value:.4f}">{value:.1%}</meter> {value:.1%}'


def curves(found: dict[str, Sequence[tuple[float, int]]], n: int, norm: str, images: str) -> str:
    """Accuracy over eps: a picture with a bar of one standard error at each point, and the numbers as a table."""
    colors = ('#0072b2', '#d55e00', '#009e73', '#cc79a7')
    radii = max(found.values(), key=len)
    widest = max(eps for eps, _ in radii) or 1.0
    lines = [
        f'<p>Accuracy under PGD-10 on {n} images ({escape(images)}), each point with one standard error. PGD-10 is a '
        'weak attack: AutoAttack leaves no more, and mostly less.</p>',
        '<div class="robust"><svg viewBox="0 0 500 300" role="img" aria-label="accuracy over eps">',
    ]
    for share in (0, 25, 50, 75, 100):
        y = 250 - 2.3 * share
        lines += [f'<path d="M50 {y}H490" stroke="#8886"/><text x="44" y="{y + 4}" {_TEXT} text-anchor="end">']
        lines += [f'{share} %</text>']
    for eps, _ in radii:
        lines += [f'<text x="{50 + 430 * eps / widest:.0f}" y="268" {_TEXT} text-anchor="middle">{_radius(eps)}</text>']
    lines += [f'<text x="270" y="290" {_TEXT} text-anchor="middle">eps, {norm}, in 255ths</text>']
    for color, (name, points) in zip(colors, found.items(), strict=False):
        marks = [(50 + 430 * eps / widest, 250 - 230 * right / n, 230 * _error(right, n)) for eps, right in points]
        lines += [f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in marks)}" fill="none" ']
        lines += [f'stroke="{color}" stroke-width="2"><title>{escape(name)}</title></polyline>']
        lines += [
            f'<path d="M{x:.1f} {y - e:.1f}V{y + e:.1f}" stroke="{color}" stroke-width="2"/>' for x, y, e in marks
        ]
    head = ''.join(f'<th scope="col">{_radius(eps)}</th>' for eps, _ in radii)
    lines += [f'</svg><table><tr><th scope="col">eps in 255ths</th>{head}</tr>']
    for color, (name, points) in zip(colors, found.items(), strict=False):
        cells = ''.join(f'<td>{right} of {n}</td>' for _, right in points)
        lines += [f'<tr><th scope="row"><span style="color: {color}">■</span> {escape(name)}</th>{cells}</tr>']
    return ''.join([*lines, '</table></div>'])


_TEXT = 'font-size="12" fill="currentColor"'


def _radius(eps: float) -> str:
    return f'{255 * eps:.3g}'


def _error(right: int, n: int) -> float:
    """One standard error of a share of n images."""
    return math.sqrt(right / n * (1 - right / n) / n)


def records(measured: dict[str, list[dict[str, Any]]]) -> str:
    """What was recorded of models when they were measured: title -> rows of column -> cell."""
    rows = [(title, row) for title, table in measured.items() for row in table]
    if not rows:
        return '<p>No records of measurements are beside these weights.</p>'
    head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in ['model', *rows[0][1]])
    body = ''.join(
        '<tr>' + ''.join(f'<td>{escape(str(cell))}</td>' for cell in [title, *row.values()]) + '</tr>'
        for title, row in rows
    )
    return f'<div class="robust"><table><tr>{head}</tr>{body}</table></div>'
