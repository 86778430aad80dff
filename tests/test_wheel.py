"""A wheel of this checkout, used from an empty folder, without the checkout and without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from PIL import Image

from timm_robust.weights import RELEASES, WEIGHTS

ROOT = Path(__file__).parents[1]
NAME = 'resnet18_pssilu.fgsm_cifar10_linf'
TINY = ['--dataset', 'digits', '--val-size', '8', '--batch-size', '4', '--max-steps', '1', '--eval-steps', '1']


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """An environment variable's worth of installation: the wheel, unpacked by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'  # a build leaves folders behind
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip('not a git checkout')
    for name in filter(None, tracked.stdout.split('\0')):
        if (ROOT / name).is_file() and not name.startswith('tests/'):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = folder.glob('*.whl')
    subprocess.run(
        [*pip, 'install', '--no-deps', '--no-index', '--target', str(folder / 'site'), str(wheel)], check=True
    )
    shutil.rmtree(source)
    return folder / 'site'


@pytest.fixture
def python(installed, tmp_path):
    """Run Python in an empty folder, where the wheel is installed."""
    environment = {**os.environ, 'PYTHONPATH': str(installed), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}

    def run(*words):
        done = warm.run(words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_the_wheel_has_the_weights_that_are_not_on_the_hub_and_no_others(installed):
    held = {path.parent.name for path in installed.glob(f'timm_robust/model_cards/*/{WEIGHTS}')}
    assert held == {name for name, release in RELEASES.items() if release.commit is None}
    assert {path.parent.name for path in installed.glob('timm_robust/model_cards/*/results.json')} == set(RELEASES)
    assert (installed / 'bin/timm-robust').is_file()


def test_released_models_load_by_name(python, installed):
    code = f"""
import timm, timm_robust
assert timm_robust.__file__.startswith({str(installed)!r}), timm_robust.__file__
print(timm.create_model('resnet18_pssilu', pretrained=True).pretrained_cfg['tag'])
"""
    assert python('-c', code).split() == ['fgsm_cifar10_linf']


def test_the_page_finds_its_models_and_pictures(python):
    code = """
from timm_robust.app import Shown, default_models, load_models
print(Shown(load_models(default_models())).attack(None, 'cat', 'Linf', 8, 'FGSM, 1 step', '').count('<img'))
"""
    assert python('-c', code).split() == ['6']


@pytest.mark.slow
def test_a_recipe_by_its_name_is_trained_measured_and_staged(python, tmp_path):
    run = python('-m', 'timm_robust.cli', 'train', NAME, *TINY, '--output', 'runs', '--experiment', 'run')
    assert json.loads(run.splitlines()[-1])['steps'] == 1
    record = python(
        '-m', 'timm_robust.cli', 'evaluate', 'runs/run', '--dataset', 'digits', '-n', '4', '--attack', 'pgd'
    )
    assert 'digits test, 4 images' in record
    python('-m', 'timm_robust.cli', 'stage', 'runs/run', 'resnet18_pssilu.fgsm_digits_linf')
    assert (tmp_path / 'model_cards/resnet18_pssilu.fgsm_digits_linf/README.md').is_file()
    assert list(json.loads((tmp_path / 'releases.json').read_text())) == ['resnet18_pssilu.fgsm_digits_linf']


@pytest.mark.slow
def test_the_demo_runs(python, tmp_path):
    run = python('-m', 'timm_robust.cli', 'demo', '-n', '1', '--epochs', '1')
    assert set(json.loads(run.splitlines()[-1])) == {'standard training', 'robust training'}
    assert (tmp_path / 'output/demo/.demo').is_file()
    with Image.open(tmp_path / 'output/demo/demo.png') as picture:
        assert picture.size[0] > 600
        assert len(picture.convert('L').getcolors(1 << 16)) > 50  # not blank
