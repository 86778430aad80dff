"""From a folder of pictures to a robust, measured classifier: what the recipes finetune_folder* promise."""

import contextlib
import csv
import dataclasses
import json
import os
import runpy
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_runs import draw_pictures, signalled_at, tiny

from timm_robust import cli
from timm_robust.data import CIFAR10_CLASSES
from timm_robust.models import load_model
from timm_robust.pixels import pixel_input
from timm_robust.training import builder, parse_recipe
from timm_robust.training.batches import held_out_images
from timm_robust.training.builder import build
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.loop import Stopped, fit, out_of_patience


def in_grey(folder):
    """The same pictures without their colours."""
    for path in folder.glob('*/*.png'):
        Image.open(path).convert('L').save(path)
    return folder


def save_robust(folder):
    """A network of ten classes in colour, as a run leaves it."""
    robust = timm.create_model('resnet18_pssilu', width=4)
    state = {'arch': 'resnet18_pssilu', 'model_kwargs': {'width': 4}, 'num_classes': 10}
    save_checkpoint(folder / 'model_best.pth.tar', state | {'state_dict': robust.state_dict()})
    return robust


SMALL = ['--img-size', '32', '--batch-size', '6', '--max-steps', '4', '--workers', '0', '--device', 'cpu', '--no-amp']


def test_frozen_batch_norm_keeps_its_statistics_and_normalises_by_them(tmp_path):
    run = build(tiny(tmp_path, freeze_bn=True, val_size=0, max_steps=2))
    before = {key: value.clone() for key, value in run.model.state_dict().items() if 'running' in key}
    weight = run.model.conv1.weight.clone()
    for step in range(2):
        run.scheduler.step_update(1)
        run.train_step(*run.batches[step], step)
    after = run.model.state_dict()
    assert before and all(torch.equal(value, after[key]) for key, value in before.items())
    assert not torch.equal(run.model.conv1.weight, weight)
    with pytest.raises(ValueError, match='freeze_bn keeps the statistics'):
        tiny(tmp_path, freeze_bn=True, attack_bn='train')


def test_patience_counts_validations_since_the_best_one(tmp_path):
    run = build(tiny(tmp_path, patience=2, max_steps=2))
    run.history = [{'step': step, 'val_pgd_acc': accuracy} for step, accuracy in ((1, 0.2), (2, 0.5), (3, 0.4))]
    run.best = 0.5
    assert not out_of_patience(run)
    run.history.append({'step': 4, 'val_pgd_acc': 0.45})
    assert out_of_patience(run)
    run.recipe, run.total_steps = dataclasses.replace(run.recipe, eps_warmup=0.75), 4
    assert not out_of_patience(run)  # before, the attack of training was a weaker one


def test_a_run_out_of_patience_ends_early(tmp_path):
    settings = {'patience': 1, 'epochs': 9, 'max_steps': None, 'lr': 1e-9, 'model_ema': False}  # nothing gets better
    assert fit(build(tiny(tmp_path, **settings)))['steps'] < 9 * 3


def test_patience_may_end_behind_an_epoch_that_was_not_to_be_validated(tmp_path):
    settings = {'val_interval': 2, 'epochs': 9, 'max_steps': None, 'model_ema': False}
    with pytest.raises(Stopped):
        fit(signalled_at(13, build(tiny(tmp_path, **settings))))  # in epoch 4
    run = build(tiny(tmp_path, patience=1, resume='auto', **settings))
    run.history[1]['val_pgd_acc'] = run.best = 1.0
    assert fit(run)['steps'] == 15 and 'val_pgd_acc' in run.history[-1]


@pytest.mark.parametrize(('size', 'images', 'held'), [(0.2, 1437, 287), (50, 1437, 50), (0, 1437, 0), (0.01, 10, 1)])
def test_held_out_images_may_be_a_share_of_one_image_at_least(tmp_path, size, images, held):
    assert tiny(tmp_path, val_size=size).held_out_of(images) == held


def test_a_split_beside_the_training_folder_is_found_and_else_images_are_drawn_and_written_down(tmp_path):
    draw_pictures(tmp_path / 'one/train')
    draw_pictures(tmp_path / 'one/val', n=2)
    draw_pictures(tmp_path / 'two')
    settings = {'dataset': 'folder', 'val_split': 'auto', 'val_size': 0.2, 'img_size': 32, 'workers': 0}
    settings |= {'batch_size': 6, 'max_steps': 1, 'model_ema': False}
    run = build(tiny(tmp_path, data_dir=str(tmp_path / 'one'), **settings))
    assert len(run.batches.data) == 30 and len(run.held_out) == 6 and run.held_out_names == []
    run = build(tiny(tmp_path, data_dir=str(tmp_path / 'two'), experiment='two', **settings))
    assert len(run.batches.data) == 24 and len(run.held_out) == 6
    fit(run)
    names = (run.folder / 'held_out.txt').read_text().split()
    assert len(names) == 6 and all((tmp_path / 'two' / name).is_file() for name in names)
    again = build(tiny(tmp_path, data_dir=str(tmp_path / 'two'), experiment='three', **settings))
    assert again.held_out_names == names
    best = run.folder / 'last.pth.tar'
    assert len(held_out_images(best)) == 6
    shutil.copytree(tmp_path / 'two', tmp_path / 'moved')
    assert len(held_out_images(best, str(tmp_path / 'moved'))) == 6  # the same pictures elsewhere
    shutil.copy(tmp_path / 'two/ant/0.png', tmp_path / 'two/ant/more.png')  # the draw would be another one now
    with pytest.raises(ValueError, match='images that it was trained on could be taken for held out'):
        held_out_images(best)


def test_names_that_are_no_text_are_written_down(tmp_path):
    pictures = draw_pictures(tmp_path / 'pictures')
    for file in pictures.glob('*/*.png'):
        file.rename(os.fsdecode(os.fsencode(file)[:-4] + b'\xff.png'))
    settings = {'dataset': 'folder', 'val_size': 0.2, 'img_size': 32, 'workers': 0, 'batch_size': 6, 'max_steps': 1}
    run = build(tiny(tmp_path, data_dir=str(pictures), model_ema=False, **settings))
    fit(run)
    assert b'\xff.png\n' in (run.folder / 'held_out.txt').read_bytes()


def test_a_grey_network_learns_grey_pictures_from_the_weights_of_one_in_colour(tmp_path, caplog):
    robust = save_robust(tmp_path / 'robust')
    settings = {'model_kwargs': {'width': 4, 'in_chans': 1}, 'initial_checkpoint': str(tmp_path / 'robust')}
    settings |= {'dataset': 'folder', 'val_size': 0.2, 'img_size': 32, 'workers': 0, 'batch_size': 6, 'max_steps': 2}
    colours, grey = draw_pictures(tmp_path / 'colours'), in_grey(draw_pictures(tmp_path / 'grey'))
    with caplog.at_level('INFO', 'timm_robust'):
        run = build(tiny(tmp_path, data_dir=str(grey), **settings))
    assert 'conv1.weight is adapted to 1' in caplog.text
    torch.testing.assert_close(run.model.conv1.weight, robust.conv1.weight.sum(1, keepdim=True))
    assert run.batches[0][0].shape == (6, 1, 32, 32) and fit(run)['steps'] == 2
    assert cli.main(['evaluate', str(run.folder), '--split', 'held_out', '--attack', 'pgd']) == 0
    with pytest.raises(ValueError, match='has images in colour, the model takes 1 channel'):
        fit(build(tiny(tmp_path, data_dir=str(colours), experiment='colours', **settings)))


def test_a_network_of_timm_learns_grey_pictures(tmp_path):
    pictures = in_grey(draw_pictures(tmp_path / 'grey'))
    settings = {'dataset': 'folder', 'val_size': 0.2, 'img_size': 32, 'workers': 0, 'batch_size': 6, 'max_steps': 2}
    settings |= {'model': 'test_resnet', 'data_dir': str(pictures)}
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    kwargs = {'in_chans': 1, 'pretrained_cfg_overlay': {'mean': mean, 'std': std}}
    run = build(tiny(tmp_path, model_kwargs=kwargs, **settings))
    assert fit(run)['steps'] == 2
    assert cli.main(['evaluate', str(run.folder), '--split', 'held_out', '--attack', 'pgd']) == 0
    x, model = torch.rand(2, 1, 32, 32), load_model(run.folder)
    with torch.no_grad():
        expected = model((x - 0.4) / 0.3)  # the means over colours, as timm's loader takes them
        torch.testing.assert_close(pixel_input(model)(x), expected)


def test_initial_weights_are_taken_instead_of_pretrained_ones(tmp_path, monkeypatch):
    save_robust(tmp_path / 'robust')
    asked = []
    make = builder.make_model
    monkeypatch.setattr(builder, 'make_model', lambda *args, **kw: asked.append(kw['pretrained']) or make(*args, **kw))
    build(tiny(tmp_path, pretrained=True, initial_checkpoint=str(tmp_path / 'robust')))
    assert asked == [False]


def test_a_run_goes_on_without_the_weights_that_it_began_from(tmp_path, monkeypatch):
    save_robust(tmp_path / 'robust')
    settings = {'initial_checkpoint': str(tmp_path / 'robust'), 'resume': 'auto', 'max_steps': 2}
    first = build(tiny(tmp_path, **settings))
    fit(first)
    shutil.rmtree(tmp_path / 'robust')
    again = build(tiny(tmp_path, **settings))
    assert again.step == 2 and torch.equal(again.model.conv1.weight, first.model.conv1.weight)
    assert not again.changes


@pytest.mark.slow
@pytest.mark.parametrize(
    ('recipe', 'model'),
    [
        ('finetune_folder', 'test_resnet'),
        ('finetune_folder', 'test_convnext'),
        ('finetune_folder_transformer', 'test_vit'),
    ],
)
def test_a_folder_of_pictures_becomes_a_measured_release(tmp_path, capsys, recipe, model):
    pictures = draw_pictures(tmp_path / 'insects')
    train = ['train', recipe, '--model', model, '--no-pretrained', '--data-dir', str(pictures), *SMALL]
    if model == 'test_vit':
        train += ['--model-kwargs', 'img_size=32']
    run = tmp_path / 'mine'
    assert cli.main([*train, '--output', str(tmp_path), '--experiment', 'mine']) == 0
    assert 'has 8 training images' in capsys.readouterr().err
    assert cli.main(['report', str(run), '--steps', '2']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['classes'] == ['ant', 'bee', 'cat'] and record['n'] == 6
    if model != 'test_resnet':
        return
    name, cards = f'{model}.finetuned_insects_linf', ['--cards', str(tmp_path / 'cards')]
    assert cli.main(['stage', str(run), name, *cards]) == 0
    config = json.loads((tmp_path / 'cards' / name / 'config.json').read_text())
    assert config['label_names'] == ['ant', 'bee', 'cat']
    capsys.readouterr()
    measure = ['measure', name, *cards, '--run', str(run), '--data-dir', str(pictures), '--attack', 'pgd']
    assert cli.main(measure) == 0
    card = (tmp_path / 'cards' / name / 'README.md').read_text()
    assert 'trained adversarially on insects against Linf 4/255' in card
    assert f'timm-robust measure {name} --run RUN --data-dir DIR --attack pgd -n 6' in card
    assert '20% of the training images, held out' in card


@pytest.mark.slow
def test_the_study_of_starts_goes_from_cifar_to_a_table_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    for split in ('train', 'test'):
        draw_pictures(tmp_path / split, CIFAR10_CLASSES, n=20)
        files = [(tmp_path / split / name / f'{n}.png') for n in range(20) for name in CIFAR10_CLASSES]
        rows = [{'bytes': file.read_bytes(), 'path': None} for file in files]
        pq.write_table(pa.table({'img': rows, 'label': [*range(10)] * 20}), tmp_path / f'{split}.parquet')
    study = runpy.run_path(str(Path(__file__).parents[1] / 'train/studies/finetune/run.py'))['main']
    settings = ['--data-dir', str(tmp_path), '-o', str(tmp_path / 'out'), '--images', '16', '--seeds', '1', '-n', '4']
    settings += ['--max-steps', '1', '--jobs', '1', '--rates', str(tmp_path / 'rates.csv')]
    assert study(settings) == 2 and 'has no rate for random weights and 16 pictures' in capsys.readouterr().err
    script = study.__wrapped__.__globals__
    with pytest.raises(ValueError, match=r'evaluate nobody failed: error: .* no model in the timm registry'):
        script['Run'](ThreadPoolExecutor(1), tmp_path, None)('evaluate', 'nobody')

    def run(_, *words):  # in this process: others take seconds to begin
        print('timm-robust', *words)
        assert cli.main(list(words)) == 0

    monkeypatch.setattr(script['Run'], '__call__', run)
    # signals go to main threads alone
    monkeypatch.setattr('timm_robust.train.listen', lambda *_: contextlib.nullcontext())
    monkeypatch.setitem(script, 'GRID', (0.01,))
    assert study([*settings[:-2], '--tune']) == 2 and 'name another file for them: --rates' in capsys.readouterr().err
    assert study([*settings, '--tune']) == 0
    rates = [*csv.DictReader((tmp_path / 'rates.csv').read_text().splitlines())]
    assert [(row['start'], row['lr']) for row in rates] == [(s, '0.01') for s in ('random', 'ordinary', 'robust')]
    capsys.readouterr()
    assert study(settings) == 0
    out, said = tmp_path / 'out', capsys.readouterr()
    assert (out / 'source/classes.txt').read_text().split() == [*CIFAR10_CLASSES[:1], *CIFAR10_CLASSES[2:9]]
    with np.load(out / 'own-16-s0/train.npz') as own, np.load(out / 'test/validation.npz') as left:
        assert own['image'].shape == (32, 3, 32, 32) and own['label'].sum() == 16 and len(left['label']) == 4
        assert not (own['image'][:, None] == left['image']).all((2, 3, 4)).any()
    rows = [*csv.DictReader((out / 'results.csv').read_text().splitlines())]
    assert [row['start'] for row in rows] == ['random', 'ordinary', 'robust'] and {row['n'] for row in rows} == {'4'}
    assert {row['steps'] for row in rows} == {'1'}
    assert (out / 'findings.md').read_text() in said.out and (out / 'accuracy.png').stat().st_size > 5000
    assert study(settings) == 0 and 'timm-robust evaluate' not in capsys.readouterr().out
    next(out.glob('records/robust-16-s0-*.npz')).unlink()  # as after a kill between the two files of a measurement
    assert study(settings) == 0 and capsys.readouterr().out.count('timm-robust evaluate') == 1
    assert study([*settings, '-n', '3']) == 0 and capsys.readouterr().out.count('timm-robust evaluate') == 3


def test_every_arm_of_the_study_of_starts_takes_as_many_steps_under_the_rate_that_was_best(tmp_path):
    names = runpy.run_path(str(Path(__file__).parents[1] / 'train/studies/finetune/run.py'))
    arm, found = names['Arm'], {}
    for images in (50, 200, 1000):
        name, words = names['arm_run'](arm('robust', images, 0, 0.01), None)
        recipe = parse_recipe(['finetune_folder', *words])
        steps_per_epoch = 2 * images // recipe.batch_size
        assert recipe.epochs * steps_per_epoch >= recipe.max_steps == 600 and recipe.held_out_of(2 * images) == 0
        assert recipe.patience is None and recipe.warmup_epochs == recipe.epochs / 10 and recipe.val_split is None
        found[name] = words
    assert names['arm_run'](arm('robust', 50, 0, 0.03), None)[0] not in found
    rates = tmp_path / 'rates.csv'
    rates.write_text('start,images,lr,clean_acc,pgd_acc\nrandom,50,0.01,0.5,0.5\nrandom,50,0.1,0.8,0.45\n')
    assert names['read_rates'](rates, [('random', 50)]) == {('random', 50): 0.1}
    with open(rates, 'a') as file:
        file.write('robust,50,0.3,0.736,0.406\nrobust,50,0.003,0.682,0.46\n')  # equal, but for the dust of a sum
    assert names['read_rates'](rates, [('robust', 50)])['robust', 50] == 0.003
    file_of = lambda images, lr: names['Arm']('random', images, 99, lr)  # noqa: E731
    found = names['RobustnessResult']
    records = []
    for number, accuracy in enumerate((0.6, 0.7)):
        values = {'clean_acc': accuracy, 'pgd_acc': accuracy}
        records.append(tmp_path / f'{number}.json')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(found, 'from_json', lambda path, values=values: types.SimpleNamespace(**values))
            names['write_rates'](rates, [file_of(200, 0.01)], records[-1:])
    text = rates.read_text()
    assert 'random,200,0.01,0.7,0.7' in text and 'random,200,0.01,0.6' not in text and 'random,50,0.1,0.8' in text
    with pytest.raises(ValueError, match='no rate for robust weights and 1000 pictures a class; measure them first'):
        names['read_rates'](rates, [('robust', 1000)])
