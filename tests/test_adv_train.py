"""The real script, as a user starts it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_robust.data import load_dataset
from timm_robust.recipe import Recipe

ROOT = Path(__file__).parents[1]
CIFAR10 = ROOT.parent / 'shared/data/cifar10'
RECIPES = sorted((ROOT / 'train/recipes').glob('*.yaml'))


def adv_train(*args, cwd=None):
    return subprocess.run(
        [sys.executable, str(ROOT / 'train/adv_train.py'), *map(str, args)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder whose data/ is a small CIFAR-10 in the parquet layout, where the defaults look for it."""
    pq, pa = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    folder = tmp_path_factory.mktemp('default')
    (folder / 'data').mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, n in (('train', 300), ('test', 20)):
        rows = []
        for _ in range(n):
            png = io.BytesIO()
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(png, 'png')
            rows.append({'bytes': png.getvalue(), 'path': ''})
        table = pa.table({'img': rows, 'label': [i % 10 for i in range(n)]})
        pq.write_table(table, folder / 'data' / f'{split}-00000-of-00001.parquet')
    return folder


def test_default_flags_run(folder):
    """Every default as it stands, the full ResNet-18 and PGD-10 included; only the length of the run is cut."""
    run = adv_train('--max-steps', 1, '--val-size', 20, '--experiment', 'default', cwd=folder)
    assert run.returncode == 0, run.stderr
    line = json.loads(run.stdout.strip().splitlines()[-1])
    assert line['model'] == 'resnet18_pssilu' and line['threat_model'] == 'Linf 8/255' and line['steps'] == 1
    assert (folder / 'output/train/default/model_best.pth.tar').is_file()
    assert 'images/s' in run.stderr and ' left' in run.stderr


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason='tests what is said where there is no GPU')


@pytest.mark.parametrize(
    ('args', 'match'),
    [
        (['--eps', '8'], "write '8/255'"),
        (['--bach-size', '8'], "did you mean '--batch-size'"),
        (['--data-dir', 'nowhere'], '--dataset-download'),
        (['-c', 'nowhere.yaml'], 'nowhere.yaml does not exist'),
        pytest.param(['--device', 'cuda'], 'type --device cpu', marks=NO_GPU),
        (['--model', 'resnet18_pssil'], 'nearest: resnet18_pssilu'),
        (['--resume', 'broken.pth.tar'], 'broken.pth.tar is damaged or no checkpoint'),
    ],
)
def test_bad_input_is_one_line(folder, args, match):
    (folder / 'broken.pth.tar').write_bytes(b'PK not a checkpoint')
    run = adv_train(*args, '--val-size', 20, cwd=folder)
    assert run.returncode == 2
    assert match in run.stderr and 'Traceback' not in run.stderr


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_are_documents(path):
    recipe = Recipe.from_yaml(path)
    arch, tag = path.stem.split('.')
    assert recipe.model == arch
    data = 'imagenet' if recipe.dataset == 'folder' else recipe.dataset
    assert tag.endswith(f'_{data}_{recipe.norm.lower()}')
    head = path.read_text().partition('\nmodel:')[0]
    assert all(line.startswith('#') for line in head.splitlines())
    for word in ('Paper:', 'Command:', 'Hardware:', 'Hours:', 'Expected:'):
        assert word in head, word
    assert f'-c train/recipes/{path.name}' in head


def test_there_are_recipes():
    assert {'resnet18_pssilu.fgsm_cifar10_linf', 'resnet18_relu.fgsm_cifar10_linf'} <= {p.stem for p in RECIPES}


@pytest.mark.skipif(not CIFAR10.is_dir(), reason='the offline copy of CIFAR-10 is not beside the checkout')
def test_a_recipe_trains_on_real_cifar10(tmp_path):
    recipe = ROOT / 'train/recipes/resnet18_pssilu.fgsm_cifar10_linf.yaml'
    run = adv_train(
        '-c', recipe, '--data-dir', CIFAR10, '--max-steps', 2, '--val-size', 50, '--output', tmp_path, '--eval-steps', 1
    )
    assert run.returncode == 0, run.stderr
    assert '49950 images' in run.stderr


def test_the_demo_runs_end_to_end(tmp_path):
    args = ['--output', str(tmp_path), '-n', '2', '--epochs', '1']
    run = subprocess.run([sys.executable, str(ROOT / 'train/demo.py'), *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(json.loads(run.stdout.splitlines()[-1])) == {'standard training', 'robust training'}
    with Image.open(tmp_path / 'demo.png') as picture:
        assert picture.size[0] > 600
        assert len(picture.convert('L').getcolors(1 << 16)) > 50  # not blank
    assert len(load_dataset('digits', split='test')) == 360
