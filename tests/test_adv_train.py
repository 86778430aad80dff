"""The real script, as a user starts it."""

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from PIL import Image

from timm_robust import train
from timm_robust.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
CIFAR10 = ROOT.parent / 'shared/data/cifar10'
RECIPES = sorted((ROOT / 'train/recipes').glob('*.*.yaml'))


def adv_train(*args, cwd=None):
    return warm.run([ROOT / 'train/adv_train.py', *args], cwd=cwd)


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


@pytest.mark.slow
def test_default_flags_run(folder):
    """Every default as it stands, the full ResNet-18 and PGD-10 included; only run and batches are cut."""
    run = adv_train('--max-steps', 1, '--val-size', 20, '--batch-size', 16, '--experiment', 'default', cwd=folder)
    assert run.returncode == 0, run.stderr
    line = json.loads(run.stdout.strip().splitlines()[-1])
    assert line['model'] == 'resnet18_pssilu' and line['threat_model'] == 'Linf 8/255' and line['steps'] == 1
    assert (folder / 'output/train/default/model_best.pth.tar').is_file()
    assert 'images/s' in run.stderr and ' left' in run.stderr


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason='tests what is said where there is no GPU')


@pytest.mark.parametrize(
    ('args', 'match'),
    [
        (['--data-dir', 'nowhere'], '--dataset-download'),
        pytest.param(['--device', 'cuda'], 'type --device cpu', marks=NO_GPU),
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


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_trades_recipes_of_dai_attack_as_the_authors_trainer_does(norm):
    recipe = Recipe.from_yaml(ROOT / f'train/recipes/wrn28_10_pssilu.trades_ddpm6m_cifar10_{norm}.yaml')
    x, seen = torch.full((4, 3, 32, 32), 0.5), []

    def surrogate(image):
        seen.append(image.detach())
        return image.flatten(1).sum(1)  # a step goes the same way in every pixel

    recipe.attack_schedule.at(1.0)(surrogate, x)
    assert len(seen) == 10
    assert (seen[0] - x).std().item() == pytest.approx(0.001, rel=0.05)  # x + 0.001 N(0, 1)
    step = (seen[1] - seen[0]).flatten(1)
    if norm == 'l2':
        assert step.norm(dim=1).tolist() == pytest.approx([2 * 0.5 / 10] * 4, rel=1e-3)  # 2 eps / steps
    else:
        assert step.abs().amax(1).tolist() == pytest.approx([0.0078] * 4, rel=1e-3)


@pytest.mark.parametrize('size', ['1m', '20m'])
def test_the_edm_recipes_follow_the_course_of_the_authors_code(size):
    """OneCycleLR(pct_start=0.025), TRADES-10 on batch statistics, momentum 0.01 of batch norm."""
    recipe = Recipe.from_yaml(ROOT / f'train/recipes/wrn28_10_pssilu.trades_edm{size}_cifar10_linf.yaml')
    assert (recipe.sched, recipe.lr, recipe.momentum) == ('onecycle_cosine', 0.2, 0.9)
    assert recipe.warmup_epochs == 0.025 * recipe.epochs and recipe.min_lr == pytest.approx(0.2 / 25 / 1e4)
    assert (recipe.loss, recipe.steps, recipe.bn_momentum, recipe.attack_bn) == ('trades', 10, 0.01, 'train')


def test_every_signal_that_ends_a_program_asks_for_a_save(monkeypatch):
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)  # nohup ignores SIGHUP
            run, got = SimpleNamespace(stop=False), []
            with train.listen(run, got):
                os.kill(os.getpid(), number)
                assert run.stop and got == [number]
                assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends it
            assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with train.listen(run, got):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_there_are_recipes():
    assert {'resnet18_pssilu.fgsm_cifar10_linf', 'resnet18_relu.fgsm_cifar10_linf'} <= {p.stem for p in RECIPES}


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason='the offline copy of CIFAR-10 is not beside the checkout')
def test_a_recipe_trains_on_real_cifar10(tmp_path):
    recipe = ROOT / 'train/recipes/resnet18_pssilu.fgsm_cifar10_linf.yaml'
    cut = ['--max-steps', 2, '--batch-size', 16, '--val-size', 50, '--eval-steps', 1]
    run = adv_train('-c', recipe, '--data-dir', CIFAR10, *cut, '--output', tmp_path)
    assert run.returncode == 0, run.stderr
    assert '49950 images' in run.stderr


def test_the_demo_leaves_folders_of_others_alone(tmp_path):
    (tmp_path / 'robust').mkdir()
    (tmp_path / 'robust/thesis.txt').write_text('years of work')
    run = warm.run([ROOT / 'train/demo.py', '--output', tmp_path])
    assert run.returncode == 2 and f'error: {tmp_path} is not of a demo, and stays; name a new folder' in run.stderr
    assert [path.name for path in tmp_path.rglob('*')] == ['robust', 'thesis.txt']
