"""Smooth Adversarial Training as its user runs it: a folder of images, one and two processes, evaluation, export."""

import json
from pathlib import Path

import pytest
import timm
import torch
import warm
from PIL import Image
from sklearn.datasets import load_digits

from timm_robust.models.load import load_model

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / 'train/recipes/resnet50_silu.sat_imagenet_linf.yaml'


def call(*command, how=warm.run):
    done = how(command)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """train/ and validation/ with the ten digits as classes, 64 pixels a side."""
    root, digits = tmp_path_factory.mktemp('images'), load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:80], digits.target[:80], strict=True)):
        place = root / ('train' if number < 60 else 'validation') / f'digit{label}'
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((image * 255 / 16).astype('uint8')).resize((64, 64)).convert('RGB')
        pixels.save(place / f'{number}.png')
    return root


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50_silu', 'efficientnet_b0_silu'])
def test_a_network_trains_on_a_folder_is_measured_and_exported(name, folder, tmp_path):
    settings = ['-c', RECIPE, '--model', name, '--data-dir', folder, '--img-size', 64, '--batch-size', 4]
    settings += ['--val-size', 10, '--workers', 1, '--no-torchcompile', '--device', 'cpu']
    settings += ['--output', tmp_path, '--checkpoint-hist', 1, '--eval-steps', 1]
    train = ROOT / 'train/adv_train.py'
    call(train, *settings, '--experiment', 'one', '--max-steps', 2)
    if name == 'resnet50_silu':
        again = call(train, *settings, '--experiment', 'one', '--max-steps', 3, '--resume', 'auto', '--allow-changes')
        assert json.loads(again.stdout.splitlines()[-1])['steps'] == 3 and 'at step 2 of 3' in again.stderr
    pair = call(train, *settings, '--experiment', 'two', '--max-steps', 2, how=warm.run_pair)
    assert json.loads(pair.stdout.splitlines()[-1])['images'] == 16

    evaluate = ['-m', 'timm_robust.evaluate', tmp_path / 'one', '--dataset', 'folder', '--data-dir', folder]
    evaluate += ['--split', 'validation', '-n', 5, '--eps', '4/255', '--batch-size', 5, '--device', 'cpu', '--quiet']
    record = json.loads(call(*evaluate, '--attack', 'autoattack').stdout.splitlines()[-1])
    assert (record['n'], record['dataset'], record['attack']) == (5, folder.name, 'autoattack')
    assert 0 <= record['pgd_acc'] <= record['clean_acc'] <= 1
    (tmp_path / 'releases.json').write_text('{}')
    where = ['--cards', tmp_path / 'cards', '--table', tmp_path / 'releases.json']
    call('-m', 'timm_robust.staging', 'stage', tmp_path / 'one', f'{name}.sat_digits_linf', *where)
    staged = tmp_path / 'cards' / f'{name}.sat_digits_linf'
    model, x = timm.create_model(f'local-dir:{staged}', pretrained=True).eval(), torch.rand(2, 3, 64, 64)
    trained = load_model(tmp_path / 'one').eval()
    assert model.num_classes == 10 and type(model) is type(trained)
    weights = {key: value.half().float() if value.ndim > 1 else value for key, value in trained.state_dict().items()}
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())  # stored in fp16
    trained.load_state_dict(weights)  # three steps leave logits of 30,000, on which the rounding alone shows
    torch.testing.assert_close(model(x), trained(x))
