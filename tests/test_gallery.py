import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image
from records import complete

from timm_robust.cards import read_results, robust_acc, strongest
from timm_robust.gallery import gallery, main

SEEN = {'AutoAttack': 'autoattack', 'APGD-CE + APGD-T': 'apgd', 'PGD-10': 'pgd'}
COLUMNS = ['model', 'threat', 'clean', 'autoattack', 'cost', 'speed', 'parameters', 'alpha', 'beta']
EMPTY = {'meta', 'link', 'img', 'wbr', 'br', 'input', 'hr'}


class Page(HTMLParser):
    """The page's elements, its table of models and its text; fails where a tag does not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.text, self.cell = [], [], [], '', None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in EMPTY:
            self.open.append((tag, attrs))
        if tag == 'tr' and ('table', {'class': 'models'}) in self.open and ('tbody', {}) in self.open:
            self.rows.append([])
        if 'data-value' in attrs:
            self.rows[-1].append([attrs['data-value'], ''])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if any('data-value' in attrs for _, attrs in self.open):
            self.rows[-1][-1][1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def column(self, key):
        return [row[COLUMNS.index(key)] for row in self.rows]


def measurement(attack, n, clean, robust=None, **changes):
    accuracies = {f'{name}_acc': robust if name == attack else None for name in ('pgd', 'apgd', 'autoattack')}
    result = {'attack': attack, 'n': n, 'clean_acc': clean, 'wall_time_s': 90.0, 'hardware': 'abacus', 'warnings': []}
    note = changes.pop('note', None)
    result |= accuracies | {'steps': 10} | changes
    return {'key': f'{attack}_{n}', 'note': note, 'result': result}


def stage(cards, name, *measurements, picture=True, notes=(), threat=('Linf', '8/255'), hours=2.0, **activation):
    """A staged folder without weights."""
    folder = cards / name
    folder.mkdir(parents=True)
    origins = [{'hardware': 'abacus, 2 beads', 'versions': {'torch': '9'}, 'commit': 'abc'}]
    training = {
        'epochs': 3,
        'seconds': 3600 * hours,
        'images_per_s': 99.5,
        'activation': activation,
        'origins': origins,
    }
    record = {'model': name, 'weights': {'parameters': 11_173_964}, 'training': training | {'notes': list(notes)}}
    (folder / 'results.json').write_text(json.dumps(complete(record | {'measurements': list(measurements)})))
    (folder / 'train_hparams.yaml').write_text(yaml.safe_dump({'norm': threat[0], 'eps': threat[1]}))
    if picture:
        Image.linear_gradient('L').resize((120, 40)).save(folder / 'training.png')
        Image.radial_gradient('L').resize((60, 90)).save(folder / 'adversarial.png')
    return folder


@pytest.fixture
def cards(tmp_path):
    """Three models: one under AutoAttack, one under PGD alone with the lower clean accuracy, one never measured."""
    cards = tmp_path / 'cards'
    aa = [measurement('none', 10_000, 0.8125), measurement('pgd', 1000, 0.82, 0.55)]
    aa += [measurement('autoattack', 200, 0.83, 0.495, note='The first 200 only.')]
    stage(cards, 'net_pssilu.at_cifar10_linf', *aa, hours=2, alpha=1.25, beta=1e-4)
    pgd = [measurement('pgd', 1000, 0.7512, 0.0912)]
    stage(cards, 'net_relu.at_cifar10_linf', *pgd, picture=False, hours=10.5, notes=['Handicapped.'])
    stage(cards, 'net_silu.at_cifar10_l2', threat=('L2', 0.5), picture=False, hours=0.01)
    return cards


def many(cards, count):
    """That many models, their accuracies in a heap."""
    for i in range(count):
        act, attack = ('pssilu', 'relu', 'silu')[i % 3], ('autoattack', 'pgd', 'apgd')[i // 3 % 3]
        clean, robust = 0.76 + 0.12 * (i * 7 % count) / count, 0.40 + 0.15 * (i * 11 % count) / count
        threat = ('L2', '128/255') if i % 4 == 3 else ('Linf', '8/255')
        name = f'resnet18_{act}.at_run{i}_cifar10_{threat[0].lower()}'
        found = [measurement('none', 10_000, clean), measurement(attack, 500, clean, robust)]
        stage(cards, name, *found, threat=threat, picture=i < 2, alpha=1.0 + i / 10, beta=1e-8)
    return cards


def test_the_numbers_are_those_of_the_records(cards):
    page = Page(gallery(cards))
    assert [value for value, _ in page.column('model')] == sorted(path.name for path in cards.iterdir())
    assert [attrs['data-key'] for attrs in page.all('th') if 'data-key' in attrs] == COLUMNS
    for row in page.rows:
        cells = dict(zip(COLUMNS, row, strict=True))
        record = read_results(cards / cells['model'][0])
        best, training = strongest(record), record['training']
        assert float(cells['cost'][0]) == training['seconds'] and 'abacus, 2 beads' in cells['cost'][1]
        assert float(cells['speed'][1]) == training['images_per_s']
        assert int(cells['parameters'][1].replace(',', '')) == record['weights']['parameters']
        if best is not None:
            assert float(cells['autoattack'][0]) == robust_acc(best['result'])
            share, error, n, attack = re.fullmatch(r'(\S+) ± (\S+) \((\S+)\)\n(.+)', cells['autoattack'][1]).groups()
            assert SEEN[attack] == best['result']['attack'] and int(n.replace(',', '')) == best['result']['n']
            p = robust_acc(best['result'])
            assert float(share) == pytest.approx(100 * p, abs=0.005)
            assert float(error) == pytest.approx(100 * math.sqrt(p * (1 - p) / best['result']['n']), abs=0.005)
    assert page.column('clean')[0] == ['0.8125', '81.25 ± 0.39 (10,000)']  # of the most images
    assert page.column('alpha')[0] == ['1.25', '1.25'] and page.column('beta')[0] == ['0.0001', '0.0001']
    assert [text for _, text in page.column('threat')] == ['Linf 8/255', 'Linf 8/255', 'L2 0.5']


def test_what_is_missing_is_said_and_sorts_last(cards):
    page = Page(gallery(cards))
    for key, text in {'clean': 'not measured', 'autoattack': 'not measured', 'alpha': '-', 'beta': '-'}.items():
        assert page.column(key)[2] == ['', text]
    assert 'Not measured yet.' in page.text and 'Not shown, for want of an attack: 1 of 3.' in page.text
    assert 'Handicapped.' in page.text and 'The first 200 only.' in page.text
    shutil.rmtree(cards / 'net_pssilu.at_cifar10_linf')
    shutil.rmtree(cards / 'net_relu.at_cifar10_linf')
    page = Page(gallery(cards))
    assert 'No model was attacked yet.' in page.text and len(page.rows) == 1


def test_attacks_are_named_as_what_they_are(tmp_path):
    stage(tmp_path, 'a.at_cifar10_linf', measurement('apgd', 50, 0.8, 0.4), measurement('pgd', 50, 0.8, 0.5))
    stage(tmp_path, 'b.at_cifar10_linf', measurement('pgd', 50, 0.8, 0.5, steps=20))
    page = Page(gallery(tmp_path))
    assert [text.partition('\n')[2] for _, text in page.column('autoattack')] == ['APGD-CE + APGD-T', 'PGD-20']


def test_no_model_is_said(tmp_path):
    page = Page(gallery(tmp_path))
    assert 'No model is staged yet.' in page.text and not page.all('table') and not page.all('svg')


def test_text_from_files_stays_text(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">\' $style & </style>'
    found = [measurement('pgd', 100, 0.8, 0.5, hardware=evil, warnings=[evil], note=evil + '3')]
    folder = stage(tmp_path, 'net.at_cifar10_linf', *found, notes=[evil], threat=('Linf', evil))
    record = read_results(folder)
    record['training']['origins'][0]['hardware'] = evil
    (folder / 'results.json').write_text(json.dumps(record))
    text = gallery(tmp_path)
    page = Page(text)
    assert len(page.all('script')) == 1 and len(page.all('style')) == 1 and len(page.all('img')) == 2
    assert not any(name.startswith('on') for _, attrs in page.elements for name in attrs)
    assert text.count('<script') == 1 and page.text.count(evil) >= 8
    assert page.column('model')[0] == [record['model']] * 2
    assert all(attrs['href'][1:].isascii() for attrs in page.all('a'))


@pytest.mark.parametrize('count', [0, 1, 30])
def test_the_page_asks_for_nothing_and_is_the_same_each_time(tmp_path, count):
    tmp_path = many(tmp_path, count)
    text = gallery(tmp_path)
    assert gallery(tmp_path) == text and str(tmp_path) not in text
    page = Page(text)
    for tag, attrs in page.elements:
        assert tag not in ('iframe', 'object', 'embed', 'base', 'form') and 'style' not in attrs
        for key in ('src', 'href', 'srcset', 'xlink:href', 'action', 'data'):
            allowed = ('#', 'https://') if tag == 'a' else ('data:',)
            assert key not in attrs or attrs[key].startswith(allowed), (tag, attrs[key][:80])
    assert '@import' not in text and 'url(' not in text and 'http' not in text.replace('http-equiv', '')
    policy = page.all('meta')[1]
    assert policy['http-equiv'] == 'Content-Security-Policy' and policy['content'].startswith("default-src 'none'; ")
    assert 'unsafe' not in policy['content'] and len(page.rows) == count
    targets = {attrs['id'] for attrs in page.all('section')}
    assert {attrs['href'][1:] for attrs in page.all('a')} == targets and len(targets) == count


def test_the_scatter_stands_on_its_scale(cards):
    text = gallery(cards)
    titles = re.findall(r'<a href[^>]*><title>([^<]*)</title>', text)
    assert titles[0] == (
        'net_pssilu.at_cifar10_linf, Linf 8/255: clean 81.25 ± 0.39 % of 10,000, AutoAttack 49.50 ± 3.54 % of 200'
    )
    assert len(titles) == 2 and 'PGD-10 9.12 ± 0.91 % of 1,000' in titles[1]
    grid = {}
    for x, y, anchor, tick in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(\d+)</text>', text):
        grid.setdefault(anchor, []).append((float(tick), float(x) if anchor == 'middle' else float(y) - 4))
    read = {anchor: lambda at, a=ends[0], b=ends[-1]: a[0] + (at - a[1]) * (b[0] - a[0]) / (b[1] - a[1])
            for anchor, ends in grid.items()}  # fmt: skip
    marks = re.findall(r'<path class="mark" fill="(\S+)" transform="translate\((\S+) (\S+)\)" d="([^"]+)"', text)
    places = [(read['middle'](float(x)), read['end'](float(y))) for _, x, y, _ in marks]
    assert places == [pytest.approx((81.25, 49.5), abs=0.1), pytest.approx((75.12, 9.12), abs=0.1)]
    assert marks[0][0] == marks[1][0] and marks[0][3] != marks[1][3]  # one threat model, two attacks
    x1, y, x2, x, y1, y2 = map(float, re.findall(r'M(\S+) (\S+)H(\S+)M(\S+) (\S+)V(\S+)" stroke', text)[0])
    assert read['middle'](x2) - read['middle'](x1) == pytest.approx(2 * 0.39, abs=0.05)
    assert read['end'](y2) - read['end'](y1) == pytest.approx(-2 * 3.54, abs=0.1) and (y1 < y < y2) != (y2 < y < y1)
    assert x1 < x < x2


def test_pictures_are_inside_and_decode(cards):
    page = Page(gallery(cards))
    folder = cards / 'net_pssilu.at_cifar10_linf'
    for attrs, name in zip(page.all('img'), ['training.png', 'adversarial.png'], strict=True):
        content = base64.b64decode(attrs['src'].removeprefix('data:image/png;base64,'), validate=True)
        assert content == (folder / name).read_bytes() and folder.name in attrs['alt']
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.size == (int(attrs['width']), int(attrs['height']))
    (folder / 'training.png').write_bytes(b'version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ValueError, match=r'training\.png is no PNG \(a Git LFS pointer; type: git lfs pull\)'):
        gallery(cards)


def test_main_writes_the_page(cards, tmp_path, capsys):
    output = tmp_path / 'page.html'
    assert main(['--cards', str(cards), '-o', str(output)]) == 0
    assert capsys.readouterr().out == f'{output}\n' and output.read_text() == gallery(cards)
    assert main(['--cards', str(tmp_path / 'nowhere'), '-o', str(output)]) == 2
    assert "nowhere' does not exist; type: --cards DIR" in capsys.readouterr().err
    assert output.read_text() == gallery(cards)


CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
QUIET = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--hide-scrollbars']
QUIET += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
browser = pytest.mark.skipif(CHROMIUM is None, reason='needs chromium, chromium-browser or google-chrome')


def chromium(tmp_path, address, *flags):
    profile = tmp_path / f'profile{len(list(tmp_path.glob("profile*")))}'
    command = [CHROMIUM, *QUIET, f'--user-data-dir={profile}', '--virtual-time-budget=2000', *flags, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def in_browser(tmp_path, page, code, width=1200):
    """What an expression is in the page, in a frame that wide; the page's policy allows this one script more."""
    script = f"parent.postMessage(JSON.stringify({code}), '*')"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace('script-src ', f"script-src 'sha256-{digest}' ")
    (tmp_path / 'inner.html').write_text(page.replace('</body>', f'<script>{script}</script></body>'))
    outer = "<script>addEventListener('message', event => document.documentElement.dataset.found = event.data)</script>"
    outer += f'<iframe src="inner.html" width="{width}" height="900"></iframe>'  # a window cannot be so narrow
    (tmp_path / 'outer.html').write_text(f'<!DOCTYPE html><html><body>{outer}</body></html>')
    dom = chromium(tmp_path, (tmp_path / 'outer.html').as_uri(), '--dump-dom')
    return json.loads(Page(dom).all('html')[0]['data-found'])


@browser
def test_the_hash_sorts_in_a_browser(cards, tmp_path):
    stage(cards, 'net_elu.at_cifar10_linf', measurement('autoattack', 100, 0.9, 0.3), picture=False)
    path = tmp_path / 'gallery.html'
    path.write_text(gallery(cards))
    page = Page(chromium(tmp_path, f'{path.as_uri()}#sort=autoattack', '--dump-dom'))
    assert [value for value, _ in page.column('autoattack')] == ['0.0912', '0.3', '0.495', '']
    assert {
        a['data-key']: a['aria-sort'] for a in page.all('th') if a.get('aria-sort') != 'none' and 'data-key' in a
    } == {'autoattack': 'ascending'}


@browser
def test_titles_sort_when_clicked_and_missing_values_stay_last(cards, tmp_path):
    code = """(() => {
      const found = [];
      for (const key of ['cost', 'cost', 'clean', 'clean', 'threat', 'model']) {
        const button = document.querySelector(`[data-key=${key}] button`);
        button.focus();
        found.push([document.activeElement === button, button.tabIndex]);
        button.click();
        found.push([location.hash, ...[...document.querySelectorAll('.models tbody tr')].map(row =>
          row.cells[0].textContent.split('.')[0])]);
      }
      return found;
    })()"""
    found = in_browser(tmp_path, gallery(cards), code)
    assert found[::2] == [[True, 0]] * 6
    pssilu, relu, silu = 'net_pssilu', 'net_relu', 'net_silu'
    assert found[1::2] == [
        ['#sort=cost', silu, pssilu, relu],  # 0.01, 2 and 10.5 hours: as text 10 would stand before 2
        ['#sort=-cost', relu, pssilu, silu],
        ['#sort=clean', relu, pssilu, silu],
        ['#sort=-clean', pssilu, relu, silu],  # silu was not measured
        ['#sort=threat', silu, pssilu, relu],
        ['#sort=model', pssilu, relu, silu],
    ]


@browser
@pytest.mark.parametrize('width', [1200, 360])
def test_the_page_does_not_scroll_sideways(tmp_path, width):
    page = gallery(many(tmp_path / 'cards', 30))
    code = """({width: innerWidth, page: document.documentElement.scrollWidth,
      boxes: [...document.querySelectorAll('.scroll, pre, img')].map(box => box.getBoundingClientRect().right),
      table: document.querySelector('.models').getBoundingClientRect().right})"""
    found = in_browser(tmp_path, page, code, width)
    assert found['width'] == width and max(found['page'], *found['boxes']) <= width
    assert (found['table'] > width) == (width < 500)  # it scrolls in its own box, which a wide window has no need of


@browser
def test_a_screenshot_is_not_blank(tmp_path):
    path = tmp_path / 'gallery.html'
    path.write_text(gallery(many(tmp_path / 'cards', 6)))
    shot = Path(os.environ.get('TEST_ARTEFACTS', tmp_path)) / 'gallery.png'
    shot.parent.mkdir(parents=True, exist_ok=True)
    chromium(tmp_path, path.as_uri(), f'--screenshot={shot}', '--window-size=1200,1600')
    with Image.open(shot) as image:
        colours = image.convert('RGB').getcolors(1 << 24)
    assert len(colours) > 20 and max(count for count, _ in colours) < 0.98 * sum(count for count, _ in colours)
