"""The page: pictures of strangers in, attacks inside the ball, and nothing opened that was not uploaded."""

import io
import json
import math
import os
import re
import signal
import socket
import struct
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
import warm
import yaml
from browser import CHROMIUM, Browser
from PIL import Image
from torch import nn

from timm_robust import ThreatModel, load_model
from timm_robust.app import ATTACKS, Shown, accuracy_curve, compare, default_models, launch, load_models, main
from timm_robust.app.command import ROBUST, STANDARD, records_of
from timm_robust.app.outcome import RADII
from timm_robust.app.page import SEEN, build_page
from timm_robust.app.pictures import as_input, classes_of, example, example_data, input_size, read_picture
from timm_robust.data import CIFAR10_CLASSES, ImageData, load_dataset
from timm_robust.release import write_model
from timm_robust.training import Recipe

ROOT = Path(__file__).parents[1]
CIFAR10 = ROOT.parent / 'shared/data/cifar10'
EIGHT = ThreatModel('Linf', 8 / 255)
FIRST = next(iter(ATTACKS))


@pytest.fixture(scope='module')
def tiny():
    return load_model('resnet18_relu', width=4)


@pytest.fixture(scope='module')
def folders(tmp_path_factory, tiny):
    """Two folders of weights, as a user names them."""
    made = [tmp_path_factory.mktemp('weights') / name for name in ('first', 'second')]
    for folder in made:
        write_model(tiny, folder, 'resnet18_relu.at_cifar10_linf', model_args={'width': 4})
    return [str(folder) for folder in made]


def saved(image, kind='png', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))


def png_of_size(width, height):
    """A PNG whose header promises more than follows."""
    chunks = b''
    for kind, data in (
        (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)),
        (b'IDAT', b''),
        (b'IEND', b''),
    ):
        chunks += struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunks


REFUSED = {
    'text': (b'hello', 'no picture'),
    'empty': (b'', 'no picture'),
    'svg': (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 'no picture'),
    'tiff': (saved(noise(40, 40, 3), 'tiff'), 'no picture'),
    'cut off': (saved(noise(40, 40, 3))[:-2000], 'damaged or not whole'),
    'bomb': (png_of_size(60_000, 60_000), 'too many pixels; allowed: up to 25 million'),
    'huge': (png_of_size(6000, 6000), '6000 x 6000 pixels; allowed: up to 25 million'),
    'strip': (saved(noise(10, 4000, 3)), '4000 x 10 pixels is a strip'),
    '16 bits': (saved(Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16))), 'kind I;16'),
    'many bytes': (saved(noise(2000, 2000, 3)), '12.0 MB; allowed: up to 10 MB'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_no_picture_is_refused_with_what_is_allowed(case, tmp_path):
    path = tmp_path / 'upload.png'
    content, match = REFUSED[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(match)):
        read_picture(path)


def test_pictures_are_read_upright_on_white_and_from_their_first_frame(tmp_path):
    path = tmp_path / 'upload'
    red, blue = Image.new('RGB', (6, 4), 'red'), Image.new('RGB', (6, 4), 'blue')
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path.write_bytes(saved(red, 'jpeg', exif=exif))
    assert read_picture(path)[0].size == (4, 6)
    path.write_bytes(saved(Image.new('RGBA', (6, 4), (0, 0, 0, 0))))
    assert read_picture(path)[0].getcolors() == [(24, (255, 255, 255))]
    path.write_bytes(saved(red, 'gif', save_all=True, append_images=[blue]))
    picture, note = read_picture(path)
    assert picture.getpixel((0, 0)) == (255, 0, 0) and 'first frame' in note
    for kind in ('png', 'bmp', 'webp'):
        path.write_bytes(saved(blue, kind, **{'lossless': True} if kind == 'webp' else {}))
        picture, note = read_picture(path)
        assert picture.mode == 'RGB' and picture.getpixel((5, 3)) == (0, 0, 255) and not note


def test_damaged_pictures_are_read_or_refused_and_nothing_else(tmp_path):
    path, rng = tmp_path / 'upload', np.random.default_rng(0)
    red = Image.new('RGB', (20, 20), 'red')
    sources = [saved(noise(20, 20, 3), kind) for kind in ('png', 'jpeg', 'webp', 'bmp')]
    sources.append(saved(red, 'gif', save_all=True, append_images=[noise(20, 20, 3)]))
    ends = []
    for number in range(300):
        content = bytearray(sources[number % len(sources)])
        for place in rng.integers(0, len(content), 4):
            content[place] = rng.integers(0, 256)
        path.write_bytes(content[: rng.integers(1, len(content)) if number % 3 == 0 else None])
        try:
            ends.append(read_picture(path)[0].mode)
        except ValueError as error:
            assert 'allowed' in str(error)
            ends.append('refused')
    assert set(ends) == {'RGB', 'refused'}


def test_a_model_sees_a_picture_as_its_data_configuration_says(tiny):
    exact = noise(32, 32, 3)
    x = as_input(exact, tiny)
    assert torch.equal(x[0].permute(1, 2, 0) * 255, torch.tensor(np.array(exact)).float())
    wide = Image.new('RGB', (96, 32), 'red')
    wide.paste('blue', (32, 0, 64, 32))  # the square in the middle
    seen = as_input(wide, tiny)
    assert seen.shape == (1, 3, 32, 32) and torch.equal(seen[0, 2], torch.ones(32, 32)) and not seen[0, 0].any()
    grey = load_model('resnet18_relu', width=4, in_chans=1)
    assert as_input(exact, grey).shape == (1, 1, 32, 32)
    large = load_model('resnet18_relu', width=4)
    large.pretrained_cfg = {**large.pretrained_cfg, 'img_size': 48}  # what a run resized its images to
    assert input_size(large) == (3, 48, 48) and as_input(exact, large).shape == (1, 3, 48, 48)


def test_class_names_come_from_training_or_from_the_tag(tiny):
    assert classes_of(load_model('resnet18_relu', width=4, num_classes=2)) == ('class 0', 'class 1')
    assert classes_of(tiny) == CIFAR10_CLASSES  # the network's default tag names the data
    assert classes_of(load_model(STANDARD)) == tuple(json.loads((STANDARD / 'config.json').read_text())['label_names'])


@pytest.mark.skipif(not CIFAR10.is_dir(), reason='the offline copy of CIFAR-10 is not beside the checkout')
def test_the_examples_are_the_first_official_test_image_of_each_class():
    data = load_dataset('cifar10', CIFAR10, 'test').first(1000)
    first = [int((data.labels == label).nonzero()[0]) for label in range(10)]
    assert torch.equal(example_data().images, data.images[first])


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('method', ATTACKS)
def test_attacks_stay_in_the_ball_and_lead_away_from_the_class(method, norm, tiny):
    threat_model = ThreatModel(norm, 8 / 255 if norm == 'Linf' else 0.5)
    found = compare(tiny, example(3), threat_model, method, 'horse')
    delta = found.x_adv - found.x
    length = delta.abs().max() if norm == 'Linf' else delta.norm()
    assert 0.5 * threat_model.eps < float(length) < threat_model.eps * (1 + 1e-5)
    assert float(found.x_adv.min()) >= 0 and float(found.x_adv.max()) <= 1
    assert float(found.clean.sum()) == pytest.approx(1) and float(found.adversarial.sum()) == pytest.approx(1)
    assert found.label == 7 and found.given and found.adversarial[7] < found.clean[7]
    again = compare(tiny, example(3), threat_model, method, 'horse')
    assert torch.equal(found.x_adv, again.x_adv)


def test_without_a_class_the_attack_leads_away_from_what_the_model_sees(tiny):
    found = compare(tiny, example(3), EIGHT, FIRST, 'zebra')
    assert found.label == int(found.clean.argmax()) and not found.given
    assert found.fooled == (int(found.adversarial.argmax()) != found.label)


def test_the_perturbation_is_magnified_so_that_eps_is_white_or_black(tiny):
    picture, factor = compare(tiny, Image.new('RGB', (32, 32), 'grey'), EIGHT, FIRST).magnified
    assert factor == pytest.approx(255 / 16)
    assert float(picture.max()) == pytest.approx(1, abs=1e-4) and float(picture.min()) == pytest.approx(0, abs=1e-4)


class Brightness(nn.Module):
    """Class 0 where an image is brighter than grey: one of brightness 0.5 + m falls in the Linf ball of m."""

    num_classes, pretrained_cfg = 2, {'input_size': (3, 32, 32)}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)  # says how many channels there are

    def forward(self, x):
        brighter = 100 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([brighter, -brighter], 1)


def test_accuracy_over_eps_falls_at_each_images_margin():
    levels = torch.tensor(
        [128 + 1, 128 + 5, 128 + 9, 100], dtype=torch.uint8
    )  # margins 1.5, 5.5, 9.5; the last is wrong
    images = levels.view(-1, 1, 1, 1).expand(4, 3, 32, 32).contiguous()
    data = ImageData(images, torch.zeros(4, dtype=torch.int64), ('bright', 'dark'), 'levels')
    steps = list(accuracy_curve(Brightness(), data, 'Linf'))
    assert [len(points) for points in steps] == list(range(1, len(RADII) + 2))
    expected = [(0.0, 3)] + [(radius / 255, sum(radius < margin for margin in (1.5, 5.5, 9.5))) for radius in RADII]
    assert steps[-1] == expected
    with pytest.raises(ValueError, match='levels has 2 classes, this model 1'):
        narrow = Brightness()
        narrow.num_classes = 1
        list(accuracy_curve(narrow, data, 'Linf'))


def test_a_network_whose_logits_are_nan_resists_nothing():
    class Damaged(Brightness):
        def forward(self, x):
            return super().forward(x) * torch.nan

    data = ImageData(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ('a', 'b'), 'two')
    assert {right for _, right in list(accuracy_curve(Damaged(), data, 'Linf'))[-1]} == {0}
    with pytest.raises(ValueError, match='logits of the model are NaN on this picture'):
        compare(Damaged(), example(3), EIGHT, FIRST)


def test_an_answer_shows_both_models_and_runs_no_ones_script(tiny, tmp_path):
    evil = load_model('resnet18_relu', width=4, num_classes=2)
    evil.pretrained_cfg = {**evil.pretrained_cfg, 'label_names': ('<script>alert(1)</script>', 'b')}
    shown = Shown({'<b>one</b>': evil, 'two': tiny})
    html = shown.attack(None, 'cat', 'Linf', 8, FIRST, SEEN)
    assert html.count('<img') == 6 and html.count('data:image/png') == 6 and 'x 15.9, grey is none' in html
    assert '<script' not in html and '&lt;script' in html and '<b>one' not in html
    curve = list(shown.curve('Linf'))[-1]
    assert 'role="alert"' in curve and 'cifar' not in curve.lower()  # two classes are not ten


@pytest.mark.parametrize(
    ('given', 'match'),
    [
        ({'name': 'zebra'}, 'example &#x27;zebra&#x27; is unknown; allowed: airplane'),
        ({'norm': 'L1'}, 'norm &#x27;L1&#x27; is unknown'),
        ({'eps': -1}, 'must be finite and not negative'),
        ({'eps': math.nan}, 'must be finite'),
        ({'eps': None}, 'eps is empty'),
        ({'eps': 999}, 'wider than the pixel range'),
        ({'method': 'CW'}, 'attack &#x27;CW&#x27; is unknown; allowed: PGD'),
    ],
)
def test_what_cannot_be_meant_is_refused_on_the_page(given, match, tiny):
    usual = {'upload': None, 'name': 'cat', 'norm': 'Linf', 'eps': 8, 'method': FIRST, 'label': SEEN}
    html = Shown({'one': tiny}).attack(**usual | given)
    assert 'class="refused"' in html and match in html and '<img' not in html


def test_the_records_are_those_of_the_release():
    found = records_of(default_models())
    robust, standard = found.values()
    results = json.loads((ROOT / f'model_cards/{ROBUST}/results.json').read_text())['measurements']
    assert len(robust) == len(results)
    pgd = next(item['result'] for item in results if item['key'] == 'pgd_1000')
    row = next(row for row in robust if row['attack'] == 'PGD-10')
    assert row['images'] == 1000 and row['under attack, %'].startswith(f'{100 * pgd["pgd_acc"]:.2f} ')
    assert [row['images'] for row in standard] == [1000] and records_of(['nothing']) == {}


@pytest.mark.slow
def test_the_pair_of_the_page_shows_what_adversarial_training_does(monkeypatch):
    """On the ten examples: the standard network knows them all, and falls on all at 4/255; the robust one not."""
    monkeypatch.setattr('timm_robust.app.outcome.RADII', (4,))
    robust, standard = (list(accuracy_curve(model, example_data(), 'Linf'))[-1] for model in pair())
    assert standard[0][1] == 10 and standard[1][1] == 0
    assert robust[0][1] >= 7 and robust[1][1] >= 7


def pair():
    return load_models(default_models()).values()


def test_the_standard_weights_are_those_of_its_recipe():
    recipe = Recipe.from_yaml(STANDARD / 'recipe.yaml')
    config = json.loads((STANDARD / 'config.json').read_text())
    assert recipe.loss == 'clean' and recipe.model == config['architecture']
    assert {'width': config['model_args']['width']} == recipe.model_kwargs
    assert (STANDARD / 'model.safetensors').stat().st_size < 1_500_000


def test_models_of_one_name_are_told_apart_and_five_are_too_many(folders):
    assert len(load_models([folders[0], folders[0]])) == 2
    with pytest.raises(ValueError, match='5 models do not fit beside each other; allowed: up to 4'):
        load_models(folders * 2 + folders[:1])


def test_without_gradio_the_error_says_what_to_type(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ImportError, match=re.escape("pip install 'gradio>=6.31'")):
        build_page(Shown({'one': tiny}))


def test_sharing_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(['--share'])
    assert end.value.code == 2 and "unknown argument '--share'" in capsys.readouterr().err


def test_the_space_has_what_the_hub_asks_for_and_what_the_package_needs():
    front = yaml.safe_load((ROOT / 'space/README.md').read_text().split('---')[1])
    assert front['sdk'] == 'gradio' and (ROOT / 'space' / front['app_file']).is_file()
    project = (ROOT / 'pyproject.toml').read_text()
    assert f'app = ["gradio>={front["sdk_version"].rpartition(".")[0]}"]' in project
    needed = re.search(r'^dependencies = \[(.*?)\]', project, re.S | re.M)[1]
    assert (ROOT / 'space/requirements.txt').read_text().split() == re.findall('"(.*?)"', needed)


@pytest.fixture(scope='module')
def page(folders):
    """The page, served at a free port."""
    pytest.importorskip('gradio', reason='the page needs gradio: pip install gradio')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_ALLOWED_PATHS', '/')
        patch.setenv('GRADIO_SHARE', 'True')
        page = launch(folders, port=free_port())
        yield page
        page.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.fixture(scope='module')
def ask(page):
    """Press the button over HTTP, as a program does."""
    client = pytest.importorskip('gradio_client').Client(page.local_url, verbose=False)

    def press(upload, *rest):
        return client.predict(upload, *(rest or ('cat', 'Linf', 8, FIRST, SEEN)), api_name='/attack')

    return press


def test_the_page_is_served_here_alone_and_tells_nobody(page):
    assert page.local_url.startswith('http://127.0.0.1:') and page.share_url is None
    assert not page.analytics_enabled and not page.allowed_paths and not page.is_colab


@pytest.mark.parametrize('path', ['/etc/passwd', str(ROOT / 'pyproject.toml'), 'pyproject.toml', '../../etc/passwd'])
@pytest.mark.parametrize('route', ['file=', 'gradio_api/file='])
def test_no_file_of_the_machine_is_served(route, path, page):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f'{page.local_url}{route}{path}')
    assert refusal.value.code in (403, 404)


def test_a_picture_is_attacked_and_a_text_named_png_is_refused(ask, tmp_path):
    from gradio_client import handle_file

    good, bad = tmp_path / 'good.png', tmp_path / 'bad.png'
    noise(60, 50, 3).save(good)
    bad.write_text('hello')
    html = ask(handle_file(good))
    assert 'Your picture: 50 x 60 pixels.' in html and html.count('<img') == 6
    for _ in range(2):  # the page goes on
        assert 'this file is no picture that can be read' in ask(handle_file(bad))
    assert ask(None).count('<img') == 6


@pytest.mark.parametrize(
    ('place', 'match'),
    [
        (str(ROOT / 'docs/leaderboard.png'), ''),
        ('/etc/passwd', ''),
        ('http://127.0.0.1:9/x.png', 'an upload is a file, not an address'),
        ('https://example.com/x.png', 'an upload is a file, not an address'),
    ],
)
def test_nothing_is_opened_that_was_not_uploaded(place, match, page):
    """By hand: Gradio's client would upload the file first."""
    upload = {'path': place, 'meta': {'_type': 'gradio.FileData'}}
    data = json.dumps({'data': [upload, 'cat', 'Linf', 8, FIRST, SEEN]}).encode()
    address = f'{page.local_url}gradio_api/call/attack'
    with urllib.request.urlopen(urllib.request.Request(address, data, {'Content-Type': 'application/json'})) as answer:
        number = json.load(answer)['event_id']
    with urllib.request.urlopen(f'{address}/{number}') as answer:
        said = answer.read().decode()
    assert said.startswith('event: error') and match in said and '<img' not in said


def test_a_port_in_use_is_one_line(page, folders, capsys):
    assert main(['--dataset', 'cifar100', '-n', '5']) == 2 and 'add --data-dir FOLDER' in capsys.readouterr().err
    assert main([*folders, '--port', page.local_url.rstrip('/').rpartition(':')[2]]) == 2
    assert 'port' in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium; apt-get install chromium')
def test_the_page_in_a_browser(page, tmp_path):
    browser = Browser(tmp_path / 'profile')
    bad = tmp_path / 'bad.png'
    bad.write_text('hello')
    try:
        browser.open(page.local_url)
        browser.wait("document.querySelectorAll('#result img').length == 6")
        browser.wait("[...document.querySelectorAll('#result img')].every(image => image.naturalWidth == 32)")
        assert 'class airplane' in browser.ask("document.querySelector('#result').innerText")
        browser.upload('#upload input[type=file]', bad)
        browser.wait("document.querySelector('#result [role=alert]')?.innerText.startsWith('this file is no picture')")
        browser.ask("document.querySelectorAll('#examples input')[8].click()")
        browser.wait("document.querySelector('#result').innerText.includes('class ship')")
        browser.ask("[...document.querySelectorAll('#norm input')].find(one => one.value == 'L2').click()")
        browser.wait("document.querySelector('#eps input[type=number]').value == '128'")
        browser.ask("document.querySelector('#attack').click()")
        browser.wait("document.querySelector('#result').innerText.includes('L2 128/255')")
        browser.picture(tmp_path / 'attack.png')
        browser.ask("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.includes('eps')).click()")
        browser.wait("document.querySelector('#measure')")
        browser.ask("document.querySelector('#measure').click()")
        browser.wait("[...document.querySelectorAll('#curve tr')].filter(row => row.cells.length == 9).length == 3")
        browser.picture(tmp_path / 'curve.png')
        assert browser.errors == []
        foreign = {one for one in browser.addresses if not one.startswith((page.local_url, 'data:', 'blob:'))}
        assert foreign == set()
    finally:
        browser.close()
    with Image.open(tmp_path / 'attack.png') as attack, Image.open(tmp_path / 'curve.png') as curve:
        assert attack.size == curve.size and attack.tobytes() != curve.tobytes()


@pytest.mark.slow
def test_the_command_serves_and_deletes_what_was_uploaded(folders, tmp_path):
    gradio_client = pytest.importorskip('gradio_client')
    environment = {**os.environ, 'TMPDIR': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    words = ['-m', 'timm_robust.cli', 'app', folders[0], '--port', free_port()]
    with warm.Popen(words, env=environment, stdout=PIPE, cwd=ROOT) as process:
        address = re.search(r'http://\S+/', process.stdout.readline())[0]
        client = gradio_client.Client(address, verbose=False)
        upload = gradio_client.handle_file(ROOT / 'docs/leaderboard.png')
        assert '<img' in client.predict(upload, 'cat', 'Linf', 8, FIRST, SEEN, api_name='/attack')
        assert list(tmp_path.rglob('leaderboard.png'))
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # of tests under nohup
        stop = signal.SIGTERM if ignored else signal.SIGHUP  # its terminal was closed
        process.send_signal(stop)
        assert process.wait(60) == 128 + stop
    assert not list(tmp_path.rglob('leaderboard.png'))
