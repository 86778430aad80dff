import concurrent.futures
import csv
import dataclasses
import io
import json
import os

import pytest
import torch
import yaml
from tiny_runs import TINY, Killed, assert_same, end_behind_epoch, killed_at, signalled_at, tiny, weights

from timm_robust.data import load_dataset
from timm_robust.evaluation.measure import evaluate
from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.models.load import load_model
from timm_robust.pixels import pixel_input
from timm_robust.training import loop as engine
from timm_robust.training.builder import build
from timm_robust.training.loop import Stopped, fit, result
from timm_robust.training.recipe import Recipe
from timm_robust.training.validation import validate


def test_a_run_leaves_what_its_user_needs(undisturbed):
    folder, line = undisturbed
    run = folder / 'run'
    rows = list(csv.DictReader(io.StringIO((run / 'summary.csv').read_text())))
    assert [row['epoch'] for row in rows] == ['0', '1', '2'] and rows[-1]['step'] == '7'
    assert {
        'train_loss',
        'val_clean_acc',
        'val_pgd_acc',
        'lr',
        'images_per_s',
        'alpha',
        'beta',
        'max_curvature',
    } <= set(rows[0])
    assert Recipe.from_yaml(run / 'args.yaml') == tiny(folder)
    assert set(yaml.safe_load((run / 'args.yaml').read_text())) == {f.name for f in dataclasses.fields(Recipe)}
    assert sorted(p.name for p in run.glob('*.pth.tar')) == [
        'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar', 'last.pth.tar', 'model_best.pth.tar'
    ]  # fmt: skip
    assert json.loads(json.dumps(line))['steps'] == 7
    assert float(line['val_pgd_acc']) == max(float(row['val_pgd_acc']) for row in rows)
    assert load_checkpoint(run / 'model_best.pth.tar')['best'] == line['val_pgd_acc']


def test_another_seed_does_not(undisturbed, tmp_path):
    fit(build(tiny(tmp_path, seed=1)))
    assert not torch.equal(
        weights(tmp_path)['state_dict.conv1.weight'], weights(undisturbed[0])['state_dict.conv1.weight']
    )


@pytest.mark.parametrize('number_of_step', [4, 5, 6], ids=['inside', 'end of an epoch', 'end of the run'])
def test_a_signal_saves_within_the_step_and_resume_gives_the_same_bits(undisturbed, tmp_path, number_of_step):
    run = signalled_at(number_of_step, build(tiny(tmp_path)))
    with pytest.raises(Stopped, match=rf'stopped by a signal at step {number_of_step + 1}.*--resume .*last\.pth\.tar'):
        fit(run)
    again = build(tiny(tmp_path, resume='auto'))
    assert again.step == number_of_step + 1
    line, expected = fit(again), undisturbed[1]
    assert {**line, 'seconds': 0, 'output': ''} == {**expected, 'seconds': 0, 'output': ''}
    assert_same(weights(tmp_path), weights(undisturbed[0]))
    losses = [
        [row['train_loss'] for row in load_checkpoint(f / 'run' / 'last.pth.tar')['history']]
        for f in (tmp_path, undisturbed[0])
    ]
    assert losses[0] == losses[1]


def test_a_signal_in_a_validation_saves_before_it_and_resume_gives_the_same_bits(undisturbed, tmp_path, monkeypatch):
    run = build(tiny(tmp_path))

    def signalled(run, data):
        run.stop = True
        return validate(run, data)

    monkeypatch.setattr(engine, 'validate', signalled)
    with pytest.raises(Stopped, match=r'stopped by a signal at step 3,'):
        fit(run)
    assert not load_checkpoint(tmp_path / 'run/last.pth.tar')['history']
    monkeypatch.undo()
    again = build(tiny(tmp_path, resume='auto'))
    fit(again)
    assert [row['step'] for row in again.history] == [3, 6, 7]
    assert_same(weights(tmp_path), weights(undisturbed[0]))


def test_a_kill_in_the_last_validation_loses_no_step(undisturbed, tmp_path, monkeypatch):
    run = build(tiny(tmp_path))

    def killed(run, data):
        if run.step == 7:
            run.writer.wait()
            raise Killed
        return validate(run, data)

    monkeypatch.setattr(engine, 'validate', killed)
    with pytest.raises(Killed):
        fit(run)
    monkeypatch.undo()
    again = build(tiny(tmp_path, resume='auto'))
    assert again.step == 7
    line = fit(again)
    assert line['val_pgd_acc'] == undisturbed[1]['val_pgd_acc']
    assert_same(weights(tmp_path), weights(undisturbed[0]))


def test_a_budget_that_start_up_uses_up_is_refused_before_anything_is_written(tmp_path, caplog):
    run = build(tiny(tmp_path, max_steps=None, budget='1h'))
    run.clock.started -= 3600
    with pytest.raises(ValueError, match=r'--budget 1h: start-up took \d{4,} s.*give at least \d+s'):
        fit(run)
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


@pytest.mark.slow
@pytest.mark.parametrize('seconds', [600, 0], ids=['not saved', 'saved'])
def test_a_budget_that_ends_behind_an_epoch_still_validates_the_last_weights(tmp_path, monkeypatch, seconds):
    run = build(tiny(tmp_path, max_steps=None, epochs=80, val_interval=4, budget='1h'))
    end_behind_epoch(run, 5, monkeypatch)
    monkeypatch.setattr(engine, 'SAVE_SECONDS', seconds)
    line = fit(run)
    rows = list(csv.DictReader(io.StringIO((tmp_path / 'run/summary.csv').read_text())))
    assert [int(row['epoch']) for row in rows] == list(range(6)) and rows[-1]['val_pgd_acc']
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] == line['steps'] == run.step and state['history'][-1]['val_pgd_acc'] == float(
        rows[-1]['val_pgd_acc']
    )


@pytest.mark.slow
@pytest.mark.parametrize(('val_size', 'seconds', 'expected'), [(50, 600, [2, 4]), (0, 600, [2, 4]), (50, 0, [3, 4])])
def test_epochs_between_validations_are_not_saved_unless_long_ago(tmp_path, monkeypatch, val_size, seconds, expected):
    monkeypatch.setattr(engine, 'SAVE_SECONDS', seconds)
    fit(build(tiny(tmp_path, epochs=5, max_steps=None, batch_size=300, val_interval=3, val_size=val_size)))
    numbers = [int(path.name.split('-')[1].split('.')[0]) for path in (tmp_path / 'run').glob('checkpoint-*')]
    assert sorted(numbers) == expected
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] == 5 and [row['epoch'] for row in state['history']] == list(range(5))


def test_a_run_that_holds_nothing_out_ends_with_its_last_weights_as_the_best(tmp_path):
    run = build(tiny(tmp_path, val_size=0))
    fit(run)
    assert_same(weights(tmp_path), weights(tmp_path, 'model_best.pth.tar'))
    assert load_model(tmp_path / 'run').num_classes == 10  # as its users open it
    best = tmp_path / 'run/model_best.pth.tar'
    best.unlink()
    fit(build(tiny(tmp_path, val_size=0, resume='auto')))  # a kill may have come before its name
    assert_same(weights(tmp_path), weights(tmp_path, 'model_best.pth.tar'))


def test_a_budget_that_ends_in_the_save_of_an_epoch_leaves_the_best_checkpoint_too(tmp_path, monkeypatch):
    run = build(tiny(tmp_path, val_size=0, max_steps=None, epochs=80, budget='1h'))
    end_behind_epoch(run, 2, monkeypatch)
    monkeypatch.setattr(engine, 'SAVE_SECONDS', 0)
    fit(run)
    assert_same(weights(tmp_path), weights(tmp_path, 'model_best.pth.tar'))


def test_the_average_of_a_run_that_holds_nothing_out_gets_statistics_of_its_own(tmp_path, monkeypatch):
    states = []
    for number, estimate in enumerate([engine.reestimate_batch_norm, lambda run, batches: None]):
        monkeypatch.setattr(engine, 'reestimate_batch_norm', estimate)
        fit(build(tiny(tmp_path / str(number), val_size=0)))
        states.append(load_checkpoint(tmp_path / str(number) / 'run/last.pth.tar'))
    with_statistics, without = (state['state_dict_ema'] for state in states)
    different = {key for key, value in with_statistics.items() if not torch.equal(value, without[key])}
    assert different and all('running' in key or 'num_batches' in key for key in different)
    assert_same(states[0]['state_dict'], states[1]['state_dict'])


def test_a_long_epoch_is_saved_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, 'SAVE_SECONDS', 0)
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path, log_interval=1000))))
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] == 5 and state['sums'][0] == 3


def test_the_last_epoch_of_a_budget_is_saved_though_there_is_nothing_to_validate(tmp_path, monkeypatch):
    run = build(tiny(tmp_path, max_steps=None, epochs=80, val_interval=4, val_size=0, budget='1h'))
    end_behind_epoch(run, 1, monkeypatch)
    fit(run)
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] == run.step and [row['epoch'] for row in state['history']] == [0, 1]


def test_a_save_that_fails_ends_the_run_in_the_next_step_and_says_why(tmp_path, monkeypatch):
    torch_save = torch.save

    def fail(state, file):
        if state['step'] >= 3:
            raise OSError(28, 'No space left on device')
        torch_save(state, file)

    run = build(tiny(tmp_path, epochs=50, max_steps=None, val_interval=50))
    monkeypatch.setattr(torch, 'save', fail)
    monkeypatch.setattr(engine, 'SAVE_SECONDS', 0)
    begin = run.writer.start
    run.writer.start = lambda work: begin(work) or concurrent.futures.wait([run.writer.job])
    with pytest.raises(OSError, match=r'cannot write .*checkpoint-0.*No space left on device; it needs about '):
        fit(run)
    assert run.step == 4
    assert os.listdir(tmp_path / 'run') and not list((tmp_path / 'run').glob('.*'))
    assert load_checkpoint(tmp_path / 'run/last.pth.tar')['step'] == 2


@pytest.mark.slow
def test_an_epoch_that_the_budget_cuts_on_resumption_has_a_row_of_its_own(tmp_path):
    settings = {'max_steps': None, 'epochs': 80, 'budget': '1h', 'val_interval': 2}
    run = signalled_at(10, build(tiny(tmp_path, **settings)))
    run.clock.progress = lambda step: 0.5
    with pytest.raises(Stopped):
        fit(run)
    again = build(tiny(tmp_path, resume='auto', **settings))
    again.clock.progress = lambda step: 1.0
    assert fit(again)['steps'] == 11
    rows = [(row['epoch'], row['step'], 'val_pgd_acc' in row) for row in again.history]
    assert rows == [(0, 3, False), (1, 6, True), (2, 9, False), (3, 11, True)]


def test_the_result_is_that_of_the_saved_best(tmp_path):
    run = build(tiny(tmp_path))
    fit(run)
    run.history.insert(0, {**run.history[0], 'epoch': -1, 'val_pgd_acc': 0.99})  # of a checkpoint that stayed elsewhere
    assert result(run)['epoch'] == load_checkpoint(tmp_path / 'run/model_best.pth.tar')['epoch']


def test_the_checkpoint_is_a_model_that_evaluates(undisturbed):
    model = load_model(undisturbed[0] / 'run')
    state = load_checkpoint(undisturbed[0] / 'run' / 'model_best.pth.tar')
    assert torch.equal(model.fc.weight, state['state_dict_ema']['fc.weight'])
    result, _ = evaluate(
        model, load_dataset('digits', split='test'), TINY.threat_model, attack='pgd', n=20, pgd_steps=2
    )
    assert 0 <= result.pgd_acc <= result.clean_acc <= 1


@pytest.mark.parametrize(
    ('model', 'kwargs'),
    [
        ('convnext_atto', {'dims': (8, 8, 16, 16), 'depths': (1, 1, 1, 1)}),
        ('vit_tiny_patch16_224', {'img_size': 32, 'patch_size': 8, 'embed_dim': 12, 'depth': 1, 'num_heads': 2}),
        ('resnet50', {'channels': (8, 8, 8, 8), 'layers': (1, 1, 1, 1)}),
    ],
)
def test_any_timm_model_trains_and_evaluates_with_eps_in_pixels(tmp_path, model, kwargs):
    run = build(tiny(tmp_path, model=model, model_kwargs=kwargs, max_steps=1, val_size=20, model_ema=False))
    assert run.model.pretrained_cfg['mean'] != (0.0, 0.0, 0.0)  # normalised inside the attacked function
    fit(run)
    loaded = load_model(tmp_path / 'run')
    result, _ = evaluate(
        loaded, load_dataset('digits', split='test'), TINY.threat_model, attack='pgd', n=10, pgd_steps=1
    )
    assert result.max_distance is None or result.max_distance <= 0.1 + 1e-6
    mean, std = (torch.tensor(run.model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(run.forward(x), run.model((x - mean) / std), atol=1e-5, rtol=1e-4)


def test_a_model_trained_on_resized_images_is_evaluated_on_resized_images(tmp_path):
    kwargs = {'channels': (8, 8, 8, 8), 'layers': (1, 1, 1, 1)}
    run = build(tiny(tmp_path, model='resnet50', model_kwargs=kwargs, img_size=64, max_steps=1, model_ema=False))
    fit(run)
    loaded, x = load_model(tmp_path / 'run'), torch.rand(4, 3, 32, 32)
    run.model.eval()
    torch.testing.assert_close(pixel_input(loaded)(x), run.forward(x))
    settings = {'attack': 'none', 'n': 50}
    data = load_dataset('digits', split='test')
    at_64, at_32 = (evaluate(loaded, data, TINY.threat_model, img_size=s, **settings)[1] for s in (None, 32))
    assert torch.equal(at_64['y_pred'], run.forward(data.first(50).pixels()).argmax(1))
    assert not torch.equal(pixel_input(loaded)(x), pixel_input(loaded, 32)(x)) and len(at_32['y_pred']) == 50


def test_the_weights_that_are_validated_are_the_averaged_ones(tmp_path, monkeypatch):
    seen = []

    def watched(run, data):
        seen.append(torch.equal(run.model.conv1.weight, run.ema.module.conv1.weight))
        return validate(run, data)

    monkeypatch.setattr(engine, 'validate', watched)
    fit(build(tiny(tmp_path)))
    assert len(seen) == 3 and all(seen)
