"""The scatter of the gallery: staged models by clean and robust accuracy, as an SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .cards import attack_title, percent, read_results, robust_acc, strongest
from .checkpoint import read_hyper_parameters

# of Okabe and Ito's colours, told apart by colour-blind readers, those that show on white and on black
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_MARKERS = {
    'autoattack': 'M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0z',
    'apgd': 'M-5-5h10v10h-10z',
    'pgd': 'M0-6.5l6.5 11h-13z',
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 460, 56, 744, 12, 408


@dataclass(frozen=True)
class StagedModel:
    """A staged folder as the gallery needs it.

    Args:
        folder: where it lies.
        record: its results.json.
        threat: norm and eps that it was trained and measured against.
        clean: the measurement's result on most images; None if nothing was measured.
        attacked: the result of the strongest attack; None if none ran.
    """

    folder: Path
    record: dict[str, Any]
    threat: str
    clean: dict[str, Any] | None
    attacked: dict[str, Any] | None

    @property
    def name(self) -> str:
        """'<arch>.<tag>'."""
        return str(self.record['model'])

    @classmethod
    def read(cls, folder: Path) -> StagedModel:
        """What lies in the folder."""
        record = read_results(folder)
        hyper = read_hyper_parameters(folder)
        clean = max((item['result'] for item in record['measurements']), key=lambda result: result['n'], default=None)
        best = strongest(record)
        return cls(folder, record, f'{hyper["norm"]} {hyper["eps"]}', clean, best and best['result'])


def scatter(models: list[StagedModel]) -> str:
    """Clean against robust accuracy: a colour a threat model, a marker an attack, bars of one standard error."""
    shown = [(model, model.clean, model.attacked) for model in models if model.clean and model.attacked]
    if not shown:
        return '<p>No model was attacked yet.</p>'
    threats = sorted({model.threat for model, _, _ in shown})
    colours = {threat: _COLOURS[i % len(_COLOURS)] for i, threat in enumerate(threats)}
    points = []
    for _, clean, attacked in shown:
        x, y = clean['clean_acc'], robust_acc(attacked) or 0.0
        points.append((100 * x, 100 * _error(x, clean['n']), 100 * y, 100 * _error(y, attacked['n'])))
    ticks_x = _ticks([edge for x, dx, _, _ in points for edge in (x - dx, x + dx)])
    ticks_y = _ticks([edge for _, _, y, dy in points for edge in (y - dy, y + dy)])
    scale_x = (_RIGHT - _LEFT) / (ticks_x[-1] - ticks_x[0])
    scale_y = (_BOTTOM - _TOP) / (ticks_y[-1] - ticks_y[0])
    places = [(_LEFT + (x - ticks_x[0]) * scale_x, _BOTTOM - (y - ticks_y[0]) * scale_y) for x, _, y, _ in points]
    labels = _labels(places, [model.name for model, _, _ in shown])
    bars, marks = [], []
    for (model, clean, attacked), (_, dx, _, dy), (x, y) in zip(shown, points, places, strict=True):
        said = f'{model.name}, {model.threat}: clean {percent(clean["clean_acc"], clean["n"])} % of {clean["n"]:,}, '
        said += f'{attack_title(attacked)} {percent(robust_acc(attacked), attacked["n"])} % of {attacked["n"]:,}'
        colour, ex, ey = colours[model.threat], dx * scale_x, dy * scale_y
        bar = f'M{x - ex:.1f} {y:.1f}H{x + ex:.1f}M{x:.1f} {y - ey:.1f}V{y + ey:.1f}'
        bars.append(f'<path d="{bar}" stroke="{colour}"/>')
        marks.append(
            f'<a href="#{quote(model.name)}"><title>{escape(said)}</title>'
            f'<path class="mark" fill="{colour}" transform="translate({x:.1f} {y:.1f})" '
            f'd="{_MARKERS[attacked["attack"]]}"/></a>'
        )
    markers = {attack_title(attacked): _MARKERS[attacked['attack']] for _, _, attacked in shown}
    left_out = f'Not shown, for want of an attack: {len(models) - len(shown)} of {len(models)}.'
    return '\n'.join(
        [
            '<figure>',
            _legend(markers, {threat: colours[threat] for threat in threats}),
            '<div class="scroll" role="region" aria-label="Scatter of models" tabindex="0">',
            f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="Scatter">',
            _axes(ticks_x, ticks_y, scale_x, scale_y),
            *[*bars, *labels, *marks],
            '</svg></div>',
            '<figcaption>Bars: one standard error. Clean accuracy is that on the most images that were measured. '
            f'The axes need not begin at 0. {left_out * (len(models) > len(shown))}</figcaption>',
            '</figure>',
        ]
    )


def _ticks(values: list[float]) -> list[int]:
    """Round percentages from below the least value to above the largest, at most ten."""
    low, high = max(0.0, min(values) - 2), min(100.0, max(values) + 2)
    step = next((step for step in (1, 2, 5, 10) if (high - low) / step <= 8), 20)
    return list(range(math.floor(low / step) * step, math.ceil(high / step) * step + 1, step))


def _axes(ticks_x: list[int], ticks_y: list[int], scale_x: float, scale_y: float) -> str:
    """Grid, frame, ticks and titles of the scatter."""
    parts = []
    for tick in ticks_x:
        x = _LEFT + (tick - ticks_x[0]) * scale_x
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{tick}</text>')
    for tick in ticks_y:
        y = _BOTTOM - (tick - ticks_y[0]) * scale_y
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    parts.append(f'<path class="frame" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>')
    middle_x, middle_y = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    parts.append(f'<text x="{middle_x:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">clean accuracy (%)</text>')
    turned = f'transform="translate(16 {middle_y:.0f}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">robust accuracy (%)</text>')
    return '\n'.join(parts)


def _labels(places: list[tuple[float, float]], names: list[str]) -> list[str]:
    """A label beside each point, moved up or down to where it hides no other, and lines from those that are far."""
    taken = [(x - 8, y - 7, x + 8, y + 7) for x, y in places]
    shifts = sorted(range(-392, 393, 14), key=lambda shift: (abs(shift), shift))
    lines, labels = [], []
    for (x, y), name in zip(places, names, strict=True):
        width = 6.8 * len(name)  # a wide sans-serif at 11 px
        boxes = [
            (left, y + shift - 7, left + width, y + shift + 7) for shift in shifts for left in (x + 12, x - 12 - width)
        ]
        inside = [box for box in boxes if box[0] > _LEFT and box[2] < _WIDTH and box[1] > _TOP and box[3] < _BOTTOM]
        free = [
            box
            for box in inside
            if not any(box[0] < c and a < box[2] and box[1] < d and b < box[3] for a, b, c, d in taken)
        ]
        left, top, right, _ = box = (free or inside or boxes)[0]
        taken.append(box)
        edge, anchor = (left, 'start') if left > x else (right, 'end')
        if abs(top + 7 - y) > 14:
            lines.append(f'<path class="frame" d="M{x:.1f} {y:.1f}L{edge:.1f} {top + 7:.1f}"/>')
        at = f'x="{edge:.1f}" y="{top + 11:.1f}" text-anchor="{anchor}"'
        labels.append(f'<text class="name" {at} aria-hidden="true">{escape(name)}</text>')
    return [*lines, *labels]


def _legend(markers: dict[str, str], colours: dict[str, str]) -> str:
    """What shapes and colours stand for."""
    entries = [(text, shape, 'none') for text, shape in sorted(markers.items())]
    entries += [(text, 'M-7-3h14v6h-14z', colour) for text, colour in colours.items()]
    icons = [
        f'<li><svg width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true"><path class="mark" fill="{fill}" '
        f'd="{shape}"/></svg> {escape(text)}</li>'
        for text, shape, fill in entries
    ]
    return f'<ul class="legend">{"".join(icons)}</ul>'


def _error(share: float, n: int) -> float:
    """One standard error of a share of n images."""
    return math.sqrt(share * (1 - share) / n)
