import concurrent.futures
import csv
import dataclasses
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import timm
import torch
import yaml

from timm_robust.attacks.gradient import input_gradient
from timm_robust.attacks.surrogates import cross_entropy
from timm_robust.data import load_dataset
from timm_robust.evaluation.measure import evaluate
from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.models.load import load_model
from timm_robust.pixels import pixel_input
from timm_robust.training import batches as batches_module
from timm_robust.training import builder as module
from timm_robust.training import loop as engine
from timm_robust.training import rollback, validation
from timm_robust.training import run as run_module
from timm_robust.training.batches import read_data
from timm_robust.training.builder import build, make_scheduler, set_bn_momentum
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.loop import Stopped, epoch_row, fit, result
from timm_robust.training.planning import plan
from timm_robust.training.recipe import Recipe
from timm_robust.training.run import Sums
from timm_robust.training.state import restore, save
from timm_robust.training.validation import reestimate_batch_norm, validate
from timm_robust.training.watchdog import Diverged, check_epoch

TINY = Recipe(
    model='resnet18_pssilu',
    model_kwargs={'width': 4},
    dataset='digits',
    val_size=50,
    crop_padding=1,
    hflip=0.0,
    eps=0.1,
    steps=1,
    eval_steps=2,
    epochs=3,
    max_steps=7,
    batch_size=400,
    lr=0.05,
    warmup_epochs=1.0,
    model_ema=True,
    model_ema_decay=0.9,
    experiment='run',
    log_interval=2,
)


def tiny(folder, **changes):
    return dataclasses.replace(TINY, output=str(folder), **changes)


def weights(folder, name='last.pth.tar'):
    state = load_checkpoint(folder / 'run' / name)
    return {f'{part}.{k}': v for part in ('state_dict', 'state_dict_ema') for k, v in state[part].items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    return folder, fit(build(tiny(folder)))


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


def test_the_same_seed_gives_the_same_bits(undisturbed, tmp_path):
    fit(build(tiny(tmp_path)))
    assert_same(weights(tmp_path), weights(undisturbed[0]))


def test_another_seed_does_not(undisturbed, tmp_path):
    fit(build(tiny(tmp_path, seed=1)))
    assert not torch.equal(
        weights(tmp_path)['state_dict.conv1.weight'], weights(undisturbed[0])['state_dict.conv1.weight']
    )


class Killed(Exception):
    pass


def killed_at(step, run, error=Killed):
    """The run, which will fail before it takes this step."""
    batches = run.batches

    class Failing:
        steps_per_epoch, data = batches.steps_per_epoch, batches.data

        def __getitem__(self, number):
            if number == step:
                raise error
            return batches[number]

    run.batches = Failing()
    return run


@pytest.mark.parametrize('resume', ['auto', 'file'])
def test_resume_ends_with_the_undisturbed_runs_bits(undisturbed, tmp_path, resume):
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path))))
    path = 'auto' if resume == 'auto' else str(tmp_path / 'run' / 'checkpoint-0.pth.tar')
    again = build(tiny(tmp_path, resume=path))
    assert again.step == 3 and again.folder == tmp_path / 'run'
    fit(again)
    assert_same(weights(tmp_path), weights(undisturbed[0]))
    assert len(again.history) == 3


@pytest.mark.slow
def test_resume_with_a_cosine_cycle_and_gaussian_starts(tmp_path):
    settings = {'sched': 'onecycle_cosine', 'bn_momentum': 0.01, 'start_noise': 0.001, 'attack_bn': 'train'}
    fit(build(tiny(tmp_path / 'a', **settings)))
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path / 'b', **settings))))
    fit(build(tiny(tmp_path / 'b', resume='auto', **settings)))
    assert_same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


def test_resume_auto_without_a_checkpoint_starts_afresh(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'timm_robust'):
        assert build(tiny(tmp_path, resume='auto')).step == 0
    assert 'nothing to resume' in caplog.text


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'model': 'resnet18_relu'}, r'trained with model resnet18_pssilu, now resnet18_relu: go on with --model res'),
        ({'model': 'resnet18_relu', 'allow_changes': True}, r"holds arch 'resnet18_pssilu', the recipe says 'resnet18"),
        ({'model_kwargs': {'width': 8}, 'allow_changes': True}, r'weights of another resnet18_pssilu: .*size mismatch'),
        ({'eps': 0.2, 'weight_decay': 0.1}, r'eps 0.1, now 0.2; weight_decay 0.0005, now 0.1: go on with --eps 0.1'),
        ({'opt': 'adamw'}, r'trained with opt sgd, now adamw: go on with --opt sgd, .* type --allow-changes'),
        ({'amp': True}, r'amp False, now True: go on with --no-amp'),
        ({'epochs': 2}, r'trained with epochs 3, now 2: go on with --epochs 3'),
        ({'max_steps': 6, 'allow_changes': True}, r'is at step 7, behind the end of this schedule, step 6; type more'),
        ({'batch_size': 200}, r'400 in each of 1 processes; resume with batches of 400 in all, not 200 x 1'),
    ],
)
def test_resume_refuses_another_run(undisturbed, tmp_path, changes, match):
    path = str(undisturbed[0] / 'run' / 'last.pth.tar')
    with pytest.raises(ValueError, match=match):
        build(tiny(tmp_path, resume=path, **changes))


def test_other_images_under_the_same_name_are_refused(undisturbed, tmp_path, monkeypatch):
    path = str(undisturbed[0] / 'run' / 'last.pth.tar')
    real = batches_module.load_dataset
    monkeypatch.setattr(batches_module, 'load_dataset', lambda *args: real(*args).first(1400))
    with pytest.raises(
        ValueError, match=r'training data 1387 images #\w+, now 1350 images #\w+; vali.*: name the right'
    ):
        build(tiny(tmp_path, resume=path))
    again = build(tiny(tmp_path, resume=path, allow_changes=True))
    assert again.step == 7 and again.changes[0]['changes']['training data'][1].startswith('1350 images')


@pytest.mark.slow
def test_a_course_is_changed_on_purpose_and_noted(undisturbed, tmp_path):
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path))))
    changes = {'eps': 0.2, 'weight_decay': 0.1, 'seed': 7, 'lr': 0.01}
    again = build(tiny(tmp_path, resume='auto', allow_changes=True, **changes))
    assert {group['weight_decay'] for group in again.train_step.optimizer.param_groups} == {0.0, 0.1}
    assert again.train_step.optimizer.state_dict()['state']  # the moments go on
    fit(again)
    assert Recipe.from_yaml(tmp_path / 'run/args.yaml') == tiny(tmp_path, resume='auto', **changes)
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    noted = {'weight_decay': [0.0005, 0.1], 'eps': [0.1, 0.2], 'seed': [42, 7], 'lr': [0.05, 0.01]}
    assert state['changes'] == [{'step': 3, 'epoch': 0, 'changes': noted}] and state['recipe']['eps'] == 0.2
    third = build(tiny(tmp_path, resume='auto', opt='adamw', allow_changes=True, **changes))
    assert not third.train_step.optimizer.state_dict()['state'] and len(third.changes) == 2


def test_a_checkpoint_that_does_not_tell_its_images_resumes(undisturbed, tmp_path, caplog):
    state = load_checkpoint(undisturbed[0] / 'run/checkpoint-1.pth.tar')
    for key in ('images', 'changes'):
        del state[key]
    del state['recipe']['allow_changes']
    save_checkpoint(tmp_path / 'run/last.pth.tar', state)
    with caplog.at_level(logging.INFO, 'timm_robust'):
        assert build(tiny(tmp_path, resume='auto')).step == 6
    assert 'last.pth.tar does not tell its images: they are taken for these' in caplog.text


@pytest.mark.slow
def test_what_a_run_goes_back_from_is_never_taken_up_again(tmp_path, monkeypatch, caplog):
    found = {3: 0.3, 6: 0.5, 7: 0.6}
    validation = lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': found[args[3].step]}  # noqa: E731
    monkeypatch.setattr(engine, 'validate', validation)
    folder, settings = tmp_path / 'run', {'checkpoint_hist': 3, 'ema_bn_batches': 0}
    fit(build(tiny(tmp_path, **settings)))
    settings['seed'] = 7
    back = build(tiny(tmp_path, resume=str(folder / 'checkpoint-0.pth.tar'), **settings))
    assert sorted(folder.glob('*.pth.tar'))[-1].name == 'model_best.pth.tar' and not list(folder.glob('abandoned*'))
    with pytest.raises(Killed):
        fit(killed_at(4, back))
    assert build(tiny(tmp_path, resume='auto', **settings)).step == 7  # nothing was saved: the first course stands
    found[6] = 0.2
    with pytest.raises(Killed):
        fit(killed_at(6, build(tiny(tmp_path, resume=str(folder / 'checkpoint-0.pth.tar'), **settings))))
    assert 'what was saved after step 3 is of the course that was left; it is in ' in caplog.text
    aside = {path.name: load_checkpoint(path)['step'] for path in (folder / 'abandoned-after-step-3').iterdir()}
    assert aside == {'checkpoint-1.pth.tar': 6, 'checkpoint-2.pth.tar': 7, 'last.pth.tar': 7, 'model_best.pth.tar': 7}
    again = build(tiny(tmp_path, resume='auto', **settings))
    assert again.step == 6 and again.best == 0.3
    assert load_checkpoint(folder / 'model_best.pth.tar')['step'] == 3


def test_a_folder_that_nobody_named_is_the_runs_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, 'strftime', lambda _: 'now')
    settings = {'experiment': None, 'max_steps': 1, 'val_size': 0, 'epochs': 1}
    runs = [build(tiny(tmp_path, **settings)), build(tiny(tmp_path, resume='auto', **settings))]  # in one second
    folders = [fit(run)['output'] for run in runs]
    assert folders == [str(tmp_path / name) for name in ('now-resnet18_pssilu', 'now-resnet18_pssilu-2')]


def test_a_folder_in_use_is_refused(undisturbed, tmp_path):
    code = 'import sys, pathlib; from timm_robust.files import lock_folder; '
    code += 'lock = lock_folder(pathlib.Path(sys.argv[1])); print(1, flush=True); input()'
    (tmp_path / 'run').mkdir()
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    with subprocess.Popen([sys.executable, '-c', code, tmp_path / 'run'], **pipes) as other:
        assert other.stdout.readline()
        for go in (lambda: fit(build(tiny(tmp_path))), lambda: build(tiny(tmp_path, resume='auto'))):
            with pytest.raises(BlockingIOError, match=f'is held by process {other.pid} on'):
                go()
        assert [path.name for path in (tmp_path / 'run').iterdir()] == ['run.lock']
        other.communicate('\n')
    assert build(tiny(tmp_path, resume='auto')).lock is not None


def held_out(run):
    return {image.numpy().tobytes() for image in run.held_out.images}


def test_a_resumed_run_keeps_its_held_out_images_whatever_its_seed(undisturbed, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(validation, 'pgd', lambda *args, generator, **kw: starts.append(generator) or args[1])
    recipe = tiny(tmp_path, resume=str(undisturbed[0] / 'run/checkpoint-1.pth.tar'))
    first = build(tiny(tmp_path))
    path = tmp_path / 'run/last.pth.tar'
    for seed in (7, 8):  # the second goes on from what the first one wrote
        run = build(dataclasses.replace(recipe, seed=seed))
        assert held_out(run) == held_out(first)
        assert not held_out(run) & {image.numpy().tobytes() for image in run.batches.data.images}
        assert not torch.equal(run.batches[0][0], first.batches[0][0])  # the order is another
        validate(run.attack_forward, run.held_out, run.recipe, run)
        assert starts.pop().initial_seed() == TINY.seed
        run.folder = path.parent
        save(run, 1, numbered=False)
        run.writer.wait()
        recipe = dataclasses.replace(recipe, resume=str(path))


def test_a_checkpoint_of_an_older_version_keeps_its_held_out_images_too(undisturbed, tmp_path):
    state = load_checkpoint(undisturbed[0] / 'run/checkpoint-1.pth.tar')
    state.pop('split_seed', None)
    save_checkpoint(tmp_path / 'run/last.pth.tar', state)
    again = build(tiny(tmp_path, resume='auto', seed=7))
    assert again.step == 6 and held_out(again) == held_out(build(tiny(tmp_path)))


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'val_size': 60}, r'trained with --val-size 50; resume with that, not with --val-size 60: images that were'),
        ({'val_size': 0}, r'trained with --val-size 50; resume with that, not with --val-size 0'),
        ({'val_split': 'test'}, r'trained with --val-split None; resume with that, not with --val-split test'),
    ],
)
def test_resume_refuses_another_held_out_split(undisturbed, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        build(tiny(tmp_path, resume=str(undisturbed[0] / 'run/last.pth.tar'), **changes))


def test_a_new_run_does_not_mix_with_an_old_one(undisturbed):
    folder = undisturbed[0]
    before = (folder / 'run/last.pth.tar').read_bytes()
    with pytest.raises(FileExistsError, match='holds a run already; go on with it by --resume auto, name another'):
        fit(build(tiny(folder, lr=0.1)))
    assert (folder / 'run/last.pth.tar').read_bytes() == before


def test_the_checkpoint_is_a_model_that_evaluates(undisturbed):
    model = load_model(undisturbed[0] / 'run')
    state = load_checkpoint(undisturbed[0] / 'run' / 'model_best.pth.tar')
    assert torch.equal(model.fc.weight, state['state_dict_ema']['fc.weight'])
    result, _ = evaluate(
        model, load_dataset('digits', split='test'), TINY.threat_model, attack='pgd', n=20, pgd_steps=2
    )
    assert 0 <= result.pgd_acc <= result.clean_acc <= 1


def test_validation_agrees_with_evaluation(undisturbed):
    """The engine's quick numbers against the evaluator's: equal clean accuracy, PGD within the start's noise."""
    run = build(tiny(undisturbed[0], resume=str(undisturbed[0] / 'run' / 'last.pth.tar')))
    ours = validate(run.attack_forward, run.held_out, run.recipe)
    theirs, _ = evaluate(run.model, run.held_out, TINY.threat_model, attack='pgd', pgd_steps=2)
    assert ours['val_clean_acc'] == theirs.clean_acc
    assert ours['val_pgd_acc'] == pytest.approx(theirs.pgd_acc, abs=0.1)


def test_held_out_images_are_never_trained_on(tmp_path):
    run = build(tiny(tmp_path))
    held = {image.numpy().tobytes() for image in run.held_out.images}
    assert not held & {image.numpy().tobytes() for image in run.batches.data.images}
    assert len(run.held_out) == 50 and len(run.batches.data) == 1437 - 50


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({'sched': 'onecycle', 'warmup_epochs': 2.0}, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 99: 0.0125}),
        ({'sched': 'cosine', 'min_lr': 0.1}, {0: 1.0, 50: 0.55, 99: 0.1}),
        ({'sched': 'multistep', 'decay_milestones': [5, 8]}, {0: 1.0, 49: 1.0, 50: 0.1, 79: 0.1, 80: 0.01}),
        ({'sched': 'constant'}, {0: 1.0, 99: 1.0}),
    ],
)
def test_schedules(settings, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, Recipe(lr=1.0, epochs=10, **settings), total_steps=100)
    for step in range(100):
        if scheduler is not None:
            scheduler.step_update(step)
        if step in expected:
            assert optimizer.param_groups[0]['lr'] == pytest.approx(expected[step], abs=2e-3), step


@pytest.mark.parametrize('warmup_epochs', [0.1, 0.25, 3.0])
def test_a_cosine_cycle_is_that_of_torch(warmup_epochs):
    """The rate and momentum of OneCycleLR with its defaults, at every step."""
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9) for _ in range(2))
    recipe = Recipe(lr=0.2, min_lr=8e-7, epochs=10, sched='onecycle_cosine', warmup_epochs=warmup_epochs)
    scheduler = make_scheduler(ours, recipe, total_steps=400)
    reference = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.2, 400, pct_start=warmup_epochs / 10)
    for step in range(400):
        scheduler.step_update(step)
        for key in ('lr', 'momentum'):
            assert ours.param_groups[0][key] == pytest.approx(theirs.param_groups[0][key], rel=1e-9), (step, key)
        theirs.step()
        if step < 399:
            reference.step()


def test_a_cosine_cycle_without_warmup_or_momentum(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, Recipe(lr=1.0, epochs=10, sched='onecycle_cosine'), total_steps=101)
    rates = []
    for step in (0, 50, 100, 101):  # a clock may round to one tick after the end
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_batch_norm_takes_the_momentum_of_the_recipe(tmp_path):
    run = build(tiny(tmp_path, bn_momentum=0.01))
    for model in (run.model, run.ema.module):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert norms and all(norm.momentum == 0.01 for norm in norms)
    default, moved = build(tiny(tmp_path)), []
    for each in (run, default):
        each.train_step(*each.batches[0], 0)
        moved.append(each.model.bn1.running_var - 1)
    torch.testing.assert_close(10 * moved[0], moved[1])  # torch's own is 0.1
    assert moved[0].abs().max() > 0 and run.model.bn1.momentum == 0.01  # the attack put it back
    with pytest.raises(ValueError, match='has no batch norm; leave it out'):
        set_bn_momentum(torch.nn.Linear(2, 2), 0.01)


@pytest.mark.slow
def test_training_teaches(tmp_path):
    """A dozen epochs on digits: far from chance, clean and under attack."""
    recipe = tiny(
        tmp_path,
        model_kwargs={'width': 8},
        epochs=12,
        max_steps=None,
        batch_size=64,
        eps=0.05,
        model_ema=False,
        val_interval=12,
    )
    line = fit(build(recipe))
    assert line['val_clean_acc'] > 0.8 and line['val_pgd_acc'] > 0.5


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = build(tiny(tmp_path, on_divergence='stop'))
    with torch.no_grad():
        run.model.fc.bias.fill_(float('nan'))
    with pytest.raises(Diverged, match=r'the loss is nan at step 2.*stops.*--lr.*--seed'):
        fit(run)
    assert not (tmp_path / 'run' / 'model_best.pth.tar').exists()


def test_a_run_starts_from_the_weights_of_another_with_a_new_head(tmp_path, caplog):
    robust = timm.create_model('resnet18_relu', width=2, num_classes=7)
    state = {'arch': 'resnet18_relu', 'model_kwargs': {'width': 2}, 'num_classes': 7, 'state_dict': robust.state_dict()}
    save_checkpoint(tmp_path / 'before/model_best.pth.tar', state)
    settings = {'model': 'resnet18_relu', 'model_kwargs': {'width': 2}}
    for where in (tmp_path / 'before', tmp_path / 'before/model_best.pth.tar'):
        with caplog.at_level('INFO', 'timm_robust'):
            run = build(tiny(tmp_path, **settings, initial_checkpoint=str(where)))
        assert 'has another number of classes: fc.bias, fc.weight begin anew' in caplog.text
        assert run.model.fc.weight.shape[0] == 10
        own, theirs = run.model.state_dict(), robust.state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs if not key.startswith('fc.'))
    with pytest.raises(ValueError, match=r'do not fit CifarResNet: .*size mismatch for conv1\.weight'):
        build(tiny(tmp_path, model='resnet18_relu', model_kwargs={'width': 4}, initial_checkpoint=str(where)))
    with pytest.raises(ValueError, match=r"'resnet18_relu' names a network, not its weights; add the tag"):
        build(tiny(tmp_path, **settings, initial_checkpoint='resnet18_relu'))


@pytest.mark.parametrize(
    ('changes', 'error', 'match'),
    [
        ({'model': 'resnet18_psilu2'}, ValueError, 'not registered with timm; nearest: resnet18_psilu'),
        ({'initial_checkpoint': 'nowhere.pth.tar'}, FileNotFoundError, 'nowhere.pth.tar'),
        ({'dataset': 'cifar10', 'data_dir': 'nowhere'}, FileNotFoundError, '--dataset-download'),
        ({'batch_size': 5000}, ValueError, 'batch_size 5000'),
        ({'val_size': 5000}, ValueError, '5000'),
    ],
)
def test_bad_input(tmp_path, changes, error, match):
    with pytest.raises(error, match=match):
        build(tiny(tmp_path, **changes))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('loss', ['pgd_at', 'trades', 'clean'])
@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize(
    'settings', [{'amp': True, 'attack_bn': 'train'}, {'attack': 'fgsm', 'clip_grad': 1.0, 'smoothing': 0.1}]
)
def test_every_loss_norm_and_mode_takes_a_step(tmp_path, loss, norm, settings):
    recipe = tiny(tmp_path, loss=loss, norm=norm, max_steps=1, val_size=0, model_kwargs={'width': 2}, **settings)
    run = build(recipe)
    before = run.model.conv1.weight.clone()
    x, y = run.batches[0]
    run.scheduler.step_update(0)
    out = run.train_step(x, y, 0)
    assert out.loss.isfinite() and 0 <= out.correct <= 400
    assert not torch.equal(run.model.conv1.weight, before)
    assert all(p.requires_grad for p in run.model.parameters()) and run.model.training


def test_the_compiled_run_follows_the_eager_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules['timm_robust.activations.pssilu'], '_kernels', None)  # put back afterwards
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run = build(tiny(tmp_path, model_kwargs={'width': 2}, val_size=0, lr=0.01, torchcompile=compiled))
        losses.append([run.train_step(*run.batches[i], i).loss.item() for i in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_regulariser_and_clip_rule_beta(tmp_path):
    run = build(tiny(tmp_path, max_steps=1, pssilu_reg=10.0, pssilu_beta_clip=0.01))
    x, y = run.batches[0]
    run.train_step(x, y, 0)
    assert abs(run.model.act.beta.grad.item()) == pytest.approx(0.01, rel=1e-3)
    free = build(tiny(tmp_path, max_steps=1, pssilu_reg=10.0, pssilu_beta_clip=None))
    none = build(tiny(tmp_path, max_steps=1, pssilu_reg=0.0, pssilu_beta_clip=None))
    for other in (free, none):
        other.train_step(x, y, 0)
    # d(10 |beta|)/d beta = 10 for beta = 1e-8 > 0
    assert free.model.act.beta.grad.item() - none.model.act.beta.grad.item() == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize('number_of_step', [4, 5, 6], ids=['inside', 'end of an epoch', 'end of the run'])
def test_a_signal_saves_within_the_step_and_resume_gives_the_same_bits(undisturbed, tmp_path, number_of_step):
    run = build(tiny(tmp_path))
    take = run.train_step.__call__

    class Signalled:
        def __getattr__(self, name):
            return getattr(run_step, name)

        def __call__(self, x, y, number, progress):
            run.stop = number == number_of_step
            return take(x, y, number, progress)

    run_step, run.train_step = run.train_step, Signalled()
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


def test_nan_rolls_back_with_another_seed_and_the_run_ends_well(tmp_path):
    run, poisoned = build(tiny(tmp_path)), []
    batches = run.batches

    class Poisoned:
        steps_per_epoch, data = batches.steps_per_epoch, batches.data

        def __getitem__(self, number):
            x, y = batches[number]
            if number == 4 and not poisoned:
                poisoned.append(number)
                x = x * float('nan')
            return x, y

    run.batches = Poisoned()
    line = fit(run)
    assert line['rollbacks'] == 1 and line['steps'] == 7
    assert all(value.isfinite().all() for value in weights(tmp_path).values() if value.is_floating_point())
    assert [row['epoch'] for row in run.history] == [0, 1, 2]
    state = load_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    assert state['rollbacks'] == 1 and len(state['origins']) == 1 and state['origins'][0]['versions']['torch']


class Spoiled:
    """A train step that leaves weights that are not finite, once, at this step, and asks the run to stop if told so."""

    def __init__(self, run, at, stop):
        self.take, self.run, self.at, self.stop = run.train_step, run, at, stop

    def __getattr__(self, name):
        return getattr(self.take, name)

    def __call__(self, x, y, number, progress):
        out = self.take(x, y, number, progress)
        if number == self.at:
            self.at, self.run.stop = None, self.stop
            with torch.no_grad():
                self.run.model.fc.weight.fill_(float('nan'))
        return out


@pytest.mark.parametrize('stopped', [False, True])
def test_spoiled_weights_are_never_saved_inside_an_epoch(tmp_path, stopped):
    settings = {'batch_size': 100, 'max_steps': 12, 'log_interval': 20, 'save_interval': 3}
    run = build(tiny(tmp_path, **settings))
    run.train_step = Spoiled(run, at=5, stop=stopped)
    if stopped:
        with pytest.raises(Stopped):
            fit(run)
    else:
        assert fit(run)['steps'] == 12
    assert run.rollbacks == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values() if value.is_floating_point())


def end_behind_epoch(run, last, monkeypatch):
    """Let the budget of a run end just behind this epoch."""
    done, finish_epoch = [0.5], engine.finish_epoch
    run.clock.progress = lambda step: done[0]

    def finish_slowly(run, row, log):
        finish_epoch(run, row, log)
        if row['epoch'] == last:
            done[0] = 1.0

    monkeypatch.setattr(engine, 'finish_epoch', finish_slowly)


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


def inode(path):
    return path.stat().st_ino


def test_a_state_is_written_once_whatever_its_names(tmp_path, monkeypatch):
    found = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': next(found)})
    fit(build(tiny(tmp_path)))
    run = tmp_path / 'run'
    assert inode(run / 'last.pth.tar') == inode(run / 'checkpoint-2.pth.tar')
    assert inode(run / 'model_best.pth.tar') == inode(run / 'checkpoint-1.pth.tar') != inode(run / 'last.pth.tar')


def test_what_is_saved_are_the_weights_of_that_moment(tmp_path, monkeypatch):
    """The file is written while training changes weights, momenta, averages and history."""
    go, torch_save = threading.Event(), torch.save
    run = build(tiny(tmp_path, save_interval=2))
    run.folder.mkdir()
    run.history = [{'epoch': 0, 'train_loss': 1.0}]
    run.scheduler.step_update(3)  # no warm-up
    run.train_step(*run.batches[0], 0)
    monkeypatch.setattr(torch, 'save', lambda *args: go.wait(60) and torch_save(*args))
    expected = {key: value.clone() for key, value in run.model.state_dict().items()}
    momentum = run.train_step.optimizer.state_dict()['state'][0]['momentum_buffer'].clone()
    save(run, 0)
    run.train_step(*run.batches[1], 1)
    run.history[0]['epoch'] = 9
    go.set()
    run.writer.wait()
    state = load_checkpoint(run.folder / 'last.pth.tar')
    assert_same(state['state_dict'], expected)
    assert not torch.equal(run.model.conv1.weight, expected['conv1.weight'])
    assert torch.equal(state['optimizer']['state'][0]['momentum_buffer'], momentum)
    assert state['history'] == [{'epoch': 0, 'train_loss': 1.0}]


@pytest.mark.slow
@pytest.mark.parametrize(('val_size', 'seconds', 'expected'), [(50, 600, [2, 4]), (0, 600, [2, 4]), (50, 0, [3, 4])])
def test_epochs_between_validations_are_not_saved_unless_long_ago(tmp_path, monkeypatch, val_size, seconds, expected):
    monkeypatch.setattr(engine, 'SAVE_SECONDS', seconds)
    fit(build(tiny(tmp_path, epochs=5, max_steps=None, batch_size=1000, val_interval=3, val_size=val_size)))
    numbers = [int(path.name.split('-')[1].split('.')[0]) for path in (tmp_path / 'run').glob('checkpoint-*')]
    assert sorted(numbers) == expected
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] == 5 and [row['epoch'] for row in state['history']] == list(range(5))


def test_a_long_epoch_is_saved_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, 'SAVE_SECONDS', 0)
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path, log_interval=1))))
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


def test_the_best_that_a_kill_left_without_its_name_gets_it_on_resumption(tmp_path, monkeypatch):
    found = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': next(found)})
    fit(build(tiny(tmp_path)))
    run = tmp_path / 'run'
    best, middle = run / 'model_best.pth.tar', str(run / 'checkpoint-1.pth.tar')
    best.unlink()
    assert build(tiny(tmp_path, resume=str(run / 'checkpoint-2.pth.tar'))).best == -1.0  # not the best, and alone
    assert not best.exists()
    assert build(tiny(tmp_path, resume=middle)).best == 0.5 and load_checkpoint(best)['epoch'] == 1
    older = load_checkpoint(best)
    save_checkpoint(best, {**older, 'step': 3, 'epoch': 0})  # the one before
    build(tiny(tmp_path, resume=middle))
    assert load_checkpoint(best)['epoch'] == 1
    save_checkpoint(best, {**older, 'step': 9, 'epoch': 8})  # of a run that went on, and was gone back from
    build(tiny(tmp_path, resume=middle))
    assert load_checkpoint(best)['epoch'] == 8


def test_synchronised_batch_norms_keep_the_activations_inside_them():
    model = timm.create_model('efficientnet_b0_silu', num_classes=10).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(module.convert_sync_batchnorm(model).eval()(x), expected) and expected.abs().max() > 0


@pytest.mark.slow
def test_an_epoch_that_the_budget_cuts_on_resumption_has_a_row_of_its_own(tmp_path):
    settings = {'max_steps': None, 'epochs': 80, 'budget': '1h', 'val_interval': 2}
    run = build(tiny(tmp_path, **settings))
    run.clock.progress = lambda step: 0.5
    take = run.train_step

    class Signalled:
        def __getattr__(self, name):
            return getattr(take, name)

        def __call__(self, x, y, number, progress):
            run.stop = number == 10
            return take(x, y, number, progress)

    run.train_step = Signalled()
    with pytest.raises(Stopped):
        fit(run)
    again = build(tiny(tmp_path, resume='auto', **settings))
    again.clock.progress = lambda step: 1.0
    assert fit(again)['steps'] == 11
    rows = [(row['epoch'], row['step'], 'val_pgd_acc' in row) for row in again.history]
    assert rows == [(0, 3, False), (1, 6, True), (2, 9, False), (3, 11, True)]


@pytest.mark.slow
def test_a_collapse_found_when_there_is_no_time_left_ends_the_run(tmp_path, monkeypatch, caplog):
    run = build(tiny(tmp_path, max_steps=None, epochs=80, val_interval=4, budget='1h'))
    found = [0.8, 0.01]
    end_behind_epoch(run, 5, monkeypatch)
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': found.pop(0)})
    line = fit(run)
    assert line['epoch'] == 3 and line['rollbacks'] == 0 and not found
    assert 'collapsed' in caplog.text and 'the best checkpoint stands' in caplog.text


def test_what_diverged_is_not_gone_back_to(tmp_path, monkeypatch):
    run = build(tiny(tmp_path, max_steps=None, epochs=80, budget='1h', save_interval=2))
    over, found = [False], {3: 0.8}
    monkeypatch.setattr(
        engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': found.get(run.step, 0.01)}
    )

    def progress(step):
        over[0] = over[0] or step >= 5  # inside the second epoch, after a save inside it
        return 1.0 if over[0] else 0.5

    run.clock.progress = progress
    line = fit(run)
    assert line['epoch'] == 0 and line['steps'] == 3 and line['rollbacks'] <= 2


@pytest.mark.slow
def test_a_collapse_goes_back_behind_the_epoch_that_it_was_seen_in(tmp_path, monkeypatch):
    """Though there is a state inside that epoch: it may have collapsed already."""
    begun, found = [], iter([0.8, 0.8, 0.01, 0.8, 0.8])
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': next(found)})
    real = rollback.restore
    monkeypatch.setattr(rollback, 'restore', lambda run, path: real(run, path) or begun.append(run.step))
    run = build(tiny(tmp_path, batch_size=200, epochs=4, max_steps=None, save_interval=4))
    monkeypatch.setattr(engine, 'check_epoch', lambda row, history: check_epoch({**row, 'train_acc': 1.0}, history))
    per_epoch = run.batches.steps_per_epoch
    assert per_epoch == 6  # saved inside the epoch from step 12 on, at 16
    assert fit(run)['rollbacks'] == 1 and begun == [2 * per_epoch] and run.step == 4 * per_epoch
    assert not list((tmp_path / 'run').glob('abandoned*'))


def test_a_state_that_diverged_again_is_not_gone_back_to_for_ever(tmp_path):
    run = build(tiny(tmp_path, batch_size=200, epochs=2, max_steps=None, save_interval=2, log_interval=1))
    take, begun = run.train_step, []

    class Spoiling:
        def __getattr__(self, name):
            return getattr(take, name)

        def __call__(self, x, y, number, progress):
            begun.append(number)
            out = take(x, y, number, progress)
            return out._replace(loss=out.loss * float('nan')) if number == 10 and run.rollbacks < 2 else out

    run.train_step = Spoiling()
    assert fit(run)['rollbacks'] == 2
    jumps = [now for before, now in itertools.pairwise(begun) if now != before + 1]
    assert jumps == [10, 6]  # the newest, then the one before the epoch


def test_a_fault_of_one_process_is_one_of_all(tmp_path):
    class Other:
        size, rank = 2, 0

        def max(self, value):
            return 1.0

    run = build(tiny(tmp_path))
    run.world = Other()
    with pytest.raises(Diverged, match='weights of another process are not finite'):
        engine.save_within(run, 0)


def test_the_result_is_that_of_the_saved_best(tmp_path):
    run = build(tiny(tmp_path))
    fit(run)
    run.history.insert(0, {**run.history[0], 'epoch': -1, 'val_pgd_acc': 0.99})  # of a checkpoint that stayed elsewhere
    assert result(run)['epoch'] == load_checkpoint(tmp_path / 'run/model_best.pth.tar')['epoch']


def test_too_many_rollbacks_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rollback, 'MAX_ROLLBACKS', 1)
    run = build(tiny(tmp_path, lr=1e30, warmup_epochs=0.0))
    with pytest.raises(Diverged, match='stops after 1 rollbacks'):
        fit(run)


@pytest.mark.slow
@pytest.mark.parametrize('seconds', [12, 25])
def test_a_budget_ends_on_time_at_the_end_rate(tmp_path, seconds):
    """The schedule follows the clock. Loose bounds: what is tested is the logic, on a machine that others use too."""
    run = build(tiny(tmp_path, max_steps=None, budget=f'{seconds}s', batch_size=100, ema_bn_batches=2))
    line = fit(run)
    assert 0.7 * seconds < line['seconds'] < 1.3 * seconds
    assert run.train_step.optimizer.param_groups[0]['lr'] < 0.2 * 0.05
    assert line['steps'] == run.step > 0


def test_a_budget_counts_the_time_already_spent(tmp_path):
    with pytest.raises(Killed):
        fit(killed_at(4, build(tiny(tmp_path, max_steps=None, budget='100s'))))
    again = build(tiny(tmp_path, max_steps=None, budget='100s', resume='auto'))
    assert again.clock.elapsed() > load_checkpoint(tmp_path / 'run' / 'last.pth.tar')['seconds'] > 0
    assert again.clock.progress(again.step) > 0


def test_a_resumed_budget_pays_for_reading_the_data_too(tmp_path, monkeypatch):
    fit(build(tiny(tmp_path, max_steps=1)))
    spent = load_checkpoint(tmp_path / 'run/last.pth.tar')['seconds']

    def read_slowly(*arguments):
        time.sleep(1.0)
        return read_data(*arguments)

    monkeypatch.setattr(module, 'read_data', read_slowly)
    again = build(tiny(tmp_path, resume='auto', allow_changes=True))
    assert again.clock.elapsed() > spent + 1


def test_sums_of_an_epoch_survive_another_number_of_processes(tmp_path):
    class Pair:
        """Two processes whose sums are equal."""

        size, rank, device = 2, 0, torch.device('cpu')

        def sum(self, value):
            return 2 * value

        def gather(self, items):
            return items

    run = build(tiny(tmp_path))
    fit(run)
    run.sums = Sums(0, torch.tensor(6.0), torch.tensor(30.0))
    row = epoch_row(run, run.sums, 0, 0.0)
    save(run, 2, numbered=False)
    for rank in (0, 1):
        run.world, run.recipe = Pair(), tiny(tmp_path, batch_size=200)
        run.world.rank = rank
        restore(run, tmp_path / 'run/last.pth.tar')
        assert [run.sums.loss.item(), run.sums.correct.item()] == ([12.0, 30.0] if rank == 0 else [0.0, 0.0])
    loss, correct = 12.0, 30.0  # summed over the two
    assert loss / run.step / 2 == pytest.approx(row['train_loss']) and correct / run.step / 400 == row['train_acc']


def test_plan_measures_and_trains_nothing(tmp_path):
    line = plan(build(tiny(tmp_path, max_steps=None)), steps=1)
    assert line['images'] == 3 * 3 * 400 and line['epochs'] == 3
    assert line['hours'] * 3600 > 9 * line['step_ms'] / 1000
    assert line['peak_memory_gib'] > 0.1
    assert not (tmp_path / 'run').exists()


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


def test_images_of_another_size_are_refused_or_resized(tmp_path):
    kwargs = {'patch_size': 16, 'embed_dim': 12, 'depth': 1, 'num_heads': 2}
    with pytest.raises(ValueError, match=r'does not take 3 x 32 x 32.*--img-size 224.*--model-kwargs img_size=32'):
        build(tiny(tmp_path, model='vit_tiny_patch16_224', model_kwargs=kwargs))
    recipe = tiny(tmp_path, model='vit_tiny_patch16_224', model_kwargs={**kwargs, 'img_size': 64}, img_size=64)
    assert build(recipe).forward(torch.rand(2, 3, 32, 32)).shape == (2, 10)


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


@pytest.mark.parametrize('loss', ['pgd_at', 'trades'])
def test_the_folded_attack_is_the_plain_attack(tmp_path, loss):
    # a pixel whose gradient is rounding noise may step the other way
    runs = [build(tiny(tmp_path / str(fold), loss=loss, fold_bn=fold, steps=3, lr=0.01)) for fold in (True, False)]
    assert runs[0].attack_forward.folded and not runs[1].attack_forward.folded
    x, y = runs[0].batches[0]
    found, gradients = [], []
    for number in range(3):  # statistics and weights move
        runs[0].train_step(*runs[0].batches[number], number)
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    for run in runs:
        run.train_step.draw_from(9)
        with run.attack_forward.ready('eval') as forward:
            gradients.append(input_gradient(lambda z, forward=forward: cross_entropy(forward(z), y), x))
        found.append(run.train_step.perturb(x, y, 1.0))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())
    assert ((found[0] - found[1]).abs() < 1e-6).float().mean() > 0.99


def test_averaged_statistics_are_re_estimated(tmp_path):
    """With stale statistics the average sits at chance; re-estimated ones are those of its own activations."""
    run = build(tiny(tmp_path, model_ema_decay=0.99))
    fit(run)
    means = [run.ema.module.bn1.running_mean, run.model.bn1.running_mean]
    conv = torch.nn.functional.conv2d(run.batches[0][0], run.ema.module.conv1.weight, padding=1)
    theirs = conv.mean((0, 2, 3))
    run.forward.net = None  # compiled, it would be compiled anew for the momenta of this
    reestimate_batch_norm(run, run.recipe.ema_bn_batches)
    assert (means[0] - theirs).norm() < 0.2 * theirs.norm()


@pytest.mark.parametrize(
    'settings',
    [{'attack': 'n_fgsm'}, {'attack': 'apgd', 'steps': 3}, {'awp_gamma': 0.01}, {'mixup': 0.2}, {'loss': 'mart'}],
)
def test_further_attacks_and_regularisers_take_a_step(tmp_path, settings):
    run = build(tiny(tmp_path, **{'max_steps': 1, 'val_size': 0, 'model_kwargs': {'width': 2}, **settings}))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.scheduler.step_update(0)
    assert run.train_step(*run.batches[0], 0).loss.isfinite()
    assert not torch.equal(run.model.conv1.weight, before['conv1.weight'])


def test_extra_images_are_mixed_in(tmp_path):
    numpy = pytest.importorskip('numpy')
    extra = tmp_path / 'extra.npz'
    rng = numpy.random.default_rng(0)
    numpy.savez(extra, image=rng.integers(0, 256, (300, 32, 32, 3), dtype=numpy.uint8), label=rng.integers(0, 10, 300))
    run = build(tiny(tmp_path, extra_data=str(extra), extra_fraction=0.5, max_steps=1, val_size=0))
    x, y = run.batches[0]
    assert x.shape == (400, 3, 32, 32) and len(y) == 400
    assert (x[:, 0] != x[:, 1]).flatten(1).any(1).sum() == 200  # digits are grey, noise is not
    run.train_step(x, y, 0)


def test_image_folder_streams_through_timm(tmp_path):
    from PIL import Image

    for split, n in (('train', 6), ('validation', 3)):
        for name in ('cat', 'dog'):
            (tmp_path / 'folder' / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / 'folder' / split / name / f'{i}.png')
    recipe = tiny(
        tmp_path, dataset='folder', data_dir=str(tmp_path / 'folder'), val_split='validation', batch_size=4, workers=0,
        img_size=32, max_steps=3, model_ema=False,
    )  # fmt: skip
    line = fit(build(recipe))
    assert line['steps'] == 3 and 'val_pgd_acc' in line
