"""The staged models on one HTML page that needs nothing else: table, scatter, and a section a model.

    python -m timm_robust.gallery [--cards DIR] [-o gallery.html]

The page asks for nothing over the network and works from a file; its security policy names its own style and script by
their hash. `#sort=autoattack` behind its address sorts the table by that column on load, `#sort=-autoattack` downwards.
Equal folders give equal bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import yaml

from .cards import (
    RESULTS,
    attack_title,
    hours,
    limits,
    measurement_notes,
    percent,
    read_results,
    robust_acc,
    strongest,
)
from .releases import STAGED
from .results import atomic_file

# key, title, whether the column holds numbers
_COLUMNS = (
    ('model', 'Model', False),
    ('threat', 'Threat model', False),
    ('clean', 'Clean, % (n)', True),
    ('autoattack', 'AutoAttack, else the strongest attack that ran, % (n)', True),
    ('cost', 'Training cost', True),
    ('speed', 'Training images/s', True),
    ('parameters', 'Parameters', True),
    ('alpha', 'alpha', True),
    ('beta', 'beta', True),
)
# of Okabe and Ito's colours, told apart by colour-blind readers, those that show on white and on black
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_MARKERS = {
    'autoattack': 'M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0z',
    'apgd': 'M-5-5h10v10h-10z',
    'pgd': 'M0-6.5l6.5 11h-13z',
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 460, 56, 744, 12, 408
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1f24; --faint: #59636e; --line: #d1d9e0; --link: #0559a8;
  --code: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --text: #e6e9ec; --faint: #a3adb8; --line: #3a424b;
  --link: #7fc1f5; --code: #20252b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); }
a:focus-visible, button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
figure { margin: 1rem 0; }
figcaption, .faint { color: var(--faint); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  font-weight: normal; }
thead th { vertical-align: bottom; font-weight: 600; }
td { white-space: pre; }
.models td:nth-child(5) { white-space: normal; min-width: 12rem; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: left; cursor: pointer; }
button::after { content: " \\2195"; color: var(--faint); }
[aria-sort=ascending] button::after { content: " \\25B2"; color: var(--text); }
[aria-sort=descending] button::after { content: " \\25BC"; color: var(--text); }
pre { background: var(--code); padding: .75rem; overflow-x: auto; overflow-wrap: normal; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
section { border-top: 1px solid var(--line); margin-top: 2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: .5rem 0; }
.legend svg { vertical-align: -2px; }
.plot { display: block; min-width: 47.5rem; width: 100%; max-width: 60rem; font-size: 12px; fill: var(--text); }
.plot .grid { stroke: var(--line); }
.plot .frame { stroke: var(--faint); fill: none; }
.plot .name { font-size: 11px; paint-order: stroke; stroke: var(--ground); stroke-width: 4px; stroke-linejoin: round; }
.mark { stroke: var(--text); stroke-width: .8; }
a:hover .mark, a:focus .mark { stroke-width: 2.5; }
"""
_SCRIPT = """
'use strict';
const table = document.querySelector('table.models');
const heads = table ? [...table.tHead.rows[0].cells] : [];
function sort(key, down) {
  const column = heads.findIndex(head => head.dataset.key === key);
  if (column < 0) return;
  const numbers = heads[column].classList.contains('number');
  const value = row => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const a = value(one), b = value(other);
    if (a === '' || b === '') return (a === '') - (b === '');  // missing values last, whichever way
    const order = numbers ? a - b : a.localeCompare(b, 'en', {numeric: true});
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
  heads.forEach((head, i) => head.setAttribute('aria-sort', i !== column ? 'none' : down ? 'descending' : 'ascending'));
}
function follow() {
  const wish = location.hash.match(/^#sort=(-?)(.+)$/);
  if (wish) sort(wish[2], wish[1] === '-');
}
heads.forEach(head => head.querySelector('button').addEventListener('click', () => {
  const down = head.getAttribute('aria-sort') === 'ascending';
  sort(head.dataset.key, down);
  history.replaceState(null, '', '#sort=' + (down ? '-' : '') + head.dataset.key);
}));
addEventListener('hashchange', follow);
follow();
"""
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>timm-robust: models</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
<main>
<h1>timm-robust: models</h1>
<p>Adversarially robust models for timm, each with what it was measured to withstand, what it cost to train and the two
lines that load it.</p>
$content
</main>
<script>$script</script>
</body>
</html>
""")
_CAPTION = (
    'Accuracies in percent ± one standard error, on the first n images of the test split, for the weights as stored. '
    'Attacks differ in strength: a share that resists PGD says less than an equal one that resists AutoAttack.'
)


@dataclass(frozen=True)
class _Model:
    """A staged folder as the page needs it.

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


def gallery(cards: Path) -> str:
    """The page of all staged models, in the order of their names.

    Args:
        cards: the folder of staged models.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a picture is no PNG.
    """
    if not cards.is_dir():
        raise FileNotFoundError(f'folder {str(cards)!r} does not exist; type: --cards DIR, the folder of staged models')
    models = [_read(path.parent) for path in sorted(cards.glob(f'*/{RESULTS}'))]
    parts = ['<p>No model is staged yet.</p>']
    if models:
        parts = ['<h2>Table</h2>', _table(models), '<h2>Clean against robust accuracy</h2>', _scatter(models)]
        parts += ['<h2>Models</h2>', *[_section(model) for model in models]]
    policy = f"default-src 'none'; img-src data:; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}"
    policy += "; base-uri 'none'; form-action 'none'"
    return _PAGE.substitute(policy=policy, style=_STYLE, script=_SCRIPT, content='\n'.join(parts))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 2 for bad input."""
    parser = argparse.ArgumentParser('python -m timm_robust.gallery', description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--cards', type=Path, default=STAGED, help='folder of staged models')
    parser.add_argument('-o', '--output', type=Path, default=Path('gallery.html'), help='the page')
    args = parser.parse_args(argv)
    try:
        page = gallery(args.cards)
        with atomic_file(args.output) as file:
            file.write(page.encode())
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(args.output)
    return 0


def _read(folder: Path) -> _Model:
    record = read_results(folder)
    hyper = yaml.safe_load((folder / 'train_hparams.yaml').read_text(encoding='utf-8'))
    clean = max((item['result'] for item in record['measurements']), key=lambda result: result['n'], default=None)
    best = strongest(record)
    return _Model(folder, record, f'{hyper["norm"]} {hyper["eps"]}', clean, best and best['result'])


def _source(text: str) -> str:
    """An inline style or script as the security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _table(models: list[_Model]) -> str:
    """The table that sorts: each cell with its text and, as data-value, what it sorts by."""
    heads = []
    for key, title, numbers in _COLUMNS:
        order = 'ascending' if key == 'model' else 'none'
        kind = ' class="number"' if numbers else ''
        heads.append(f'<th scope="col" data-key="{key}"{kind} aria-sort="{order}"><button>{title}</button></th>')
    rows = []
    for model in models:
        cells = [f'<td data-value="{escape(str(value))}">{escape(text)}</td>' for value, text in _cells(model)]
        link = f'<a href="#{quote(model.name)}">{escape(model.name).replace(".", ".<wbr>")}</a>'
        head = f'<th scope="row" data-value="{escape(model.name)}">{link}</th>'
        rows.append(f'<tr>{head}{"".join(cells)}</tr>')
    return '\n'.join(
        [
            f'<p class="faint">{_CAPTION} The titles of the columns sort.</p>',
            '<div class="scroll" role="region" aria-label="Table of models" tabindex="0"><table class="models">',
            f'<thead><tr>{"".join(heads)}</tr></thead>',
            f'<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>',
        ]
    )


def _cells(model: _Model) -> Iterator[tuple[Any, str]]:
    """What a model's row sorts by and shows, column by column after its name; '' is missing."""
    training, clean, attacked = model.record['training'], model.clean, model.attacked
    yield model.threat, model.threat
    yield ('', 'not measured') if clean is None else (clean['clean_acc'], _counted(clean['clean_acc'], clean['n']))
    if attacked is None:
        yield '', 'not measured'
    else:
        robust = robust_acc(attacked)
        yield robust, f'{_counted(robust, attacked["n"])}\n{attack_title(attacked)}'
    hardware = training['origins'][-1]['hardware'] if training['origins'] else 'unknown hardware'
    yield training['seconds'], f'{hours(training["seconds"])}, {training["epochs"]} epochs, {hardware}'
    yield training['images_per_s'], f'{training["images_per_s"]:g}'
    parameters = model.record['weights']['parameters']
    yield parameters, f'{parameters:,}'
    for key in ('alpha', 'beta'):
        value = training['activation'].get(key)
        yield ('', '-') if value is None else (value, f'{value:.4g}')


def _counted(share: float | None, n: int) -> str:
    return f'{percent(share, n)} ({n:,})'


def _error(share: float, n: int) -> float:
    """One standard error of a share of n images."""
    return math.sqrt(share * (1 - share) / n)


def _scatter(models: list[_Model]) -> str:
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


def _section(model: _Model) -> str:
    """A model: how to load it, its numbers, its limits, its pictures."""
    code = 'import timm, timm_robust\n\n# images in [0, 1] in, logits out\n'
    code += f'model = timm.create_model({model.name!r}, pretrained=True).eval()'
    title = escape(model.name).replace('_', '_<wbr>')
    parts = [f'<section id="{escape(model.name)}">', f'<h3>{title}</h3>', f'<pre>{escape(code)}</pre>']
    parts.append(_measured(model))
    notes = [*limits(model.record), *measurement_notes(model.record)]
    items = ''.join(f'<li>{escape(note.removeprefix("- "))}</li>' for note in dict.fromkeys(notes))
    parts += ['<h4>Notes and limits</h4>', f'<ul>{items}</ul>']
    parts += _picture(model.folder / 'training.png', f'Course of training of {model.name}')
    parts += _picture(
        model.folder / 'adversarial.png',
        f'Test images, their adversarial versions and the perturbations that were found for {model.name}',
    )
    return '\n'.join([*parts, '</section>'])


def _measured(model: _Model) -> str:
    """Every measurement of a model."""
    if not model.record['measurements']:
        return '<p>Not measured yet.</p>'
    titles = ('Attack', 'Images', 'Clean, %', 'Robust, %', 'Time, hardware')
    heads = ''.join(f'<th scope="col">{title}</th>' for title in titles)
    rows = []
    for item in model.record['measurements']:
        result = item['result']
        clean, robust = percent(result['clean_acc'], result['n']), percent(robust_acc(result), result['n'])
        cells = [attack_title(result), f'first {result["n"]:,}', clean, robust]
        cells.append(f'{hours(result["wall_time_s"])}, {result["hardware"]}')
        rows.append(f'<tr>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>')
    label = escape(f'Measurements of {model.name}')
    return (
        f'<p>Measured against {escape(model.threat)}:</p>\n'
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f'<thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _picture(path: Path, text: str) -> list[str]:
    """A PNG inside the page, with its size, so that nothing moves when it is decoded; nothing if there is none.

    Raises:
        ValueError: if it is no PNG.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    if not content.startswith(b'\x89PNG\r\n\x1a\n'):
        pointer = ' (a Git LFS pointer; type: git lfs pull)' * content.startswith(b'version https://git-')
        raise ValueError(f'{path} is no PNG{pointer}; draw it again with timm_robust.staging')
    width, height = (int.from_bytes(content[start : start + 4], 'big') for start in (16, 20))
    data = base64.b64encode(content).decode()
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(text)}">'
    return [f'<figure>{image}<figcaption>{escape(text)}.</figcaption></figure>']


if __name__ == '__main__':
    sys.exit(main())
