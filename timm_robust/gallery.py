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
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from .cards import (
    RESULTS,
    attack_title,
    hours,
    limits,
    measurement_notes,
    percent,
    robust_acc,
    trained_on,
)
from .gallery_chart import StagedModel, scatter
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
    models = [StagedModel.read(path.parent) for path in sorted(cards.glob(f'*/{RESULTS}'))]
    parts = ['<p>No model is staged yet.</p>']
    if models:
        parts = ['<h2>Table</h2>', _table(models), '<h2>Clean against robust accuracy</h2>', scatter(models)]
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


def _source(text: str) -> str:
    """An inline style or script as the security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _table(models: list[StagedModel]) -> str:
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


def _cells(model: StagedModel) -> Iterator[tuple[Any, str]]:
    """What a model's row sorts by and shows, column by column after its name; '' is missing."""
    training, clean, attacked = model.record['training'], model.clean, model.attacked
    yield model.threat, model.threat
    yield ('', 'not measured') if clean is None else (clean['clean_acc'], _counted(clean['clean_acc'], clean['n']))
    if attacked is None:
        yield '', 'not measured'
    else:
        robust = robust_acc(attacked)
        yield robust, f'{_counted(robust, attacked["n"])}\n{attack_title(attacked)}'
    yield training['seconds'], f'{hours(training["seconds"])}, {training["epochs"]} epochs, {trained_on(training)}'
    yield training['images_per_s'], f'{training["images_per_s"]:g}'
    parameters = model.record['weights']['parameters']
    yield parameters, f'{parameters:,}'
    for key in ('alpha', 'beta'):
        value = training['activation'].get(key)
        yield ('', '-') if value is None else (value, f'{value:.4g}')


def _counted(share: float | None, n: int) -> str:
    return f'{percent(share, n)} ({n:,})'


def _section(model: StagedModel) -> str:
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


def _measured(model: StagedModel) -> str:
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
