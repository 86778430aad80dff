import csv
import dataclasses
import io
import json
import logging

import pytest
import torch
import yaml

from timm_robust.checkpoint import load_checkpoint, load_model
from timm_robust.data import load_dataset
from timm_robust.engine import build, fit, make_scheduler, validate
from timm_robust.evaluate import evaluate
from timm_robust.recipe import Recipe

TINY = Recipe(
    model='resnet18_pssilu',
    model_kwargs={'width': 4},
    dataset='digits',
    val_size=50,
    val_batch_size=50,
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
    assert load_checkpoint(run / 'model_best.pth.tar')['metric'] == line['val_pgd_acc']


def test_the_same_seed_gives_the_same_bits(undisturbed, tmp_path):
    fit(build(tiny(tmp_path)))
    assert_same(weights(tmp_path), weights(undisturbed[0]))


def test_another_seed_does_not(undisturbed, tmp_path):
    fit(build(tiny(tmp_path, seed=1)))
    assert not torch.equal(
        weights(tmp_path)['state_dict.conv1.weight'], weights(undisturbed[0])['state_dict.conv1.weight']
    )


@pytest.mark.parametrize('resume', ['auto', 'file'])
def test_resume_ends_with_the_undisturbed_runs_bits(undisturbed, tmp_path, resume):
    class Stopped(Exception):
        pass

    run = build(tiny(tmp_path))
    step, calls = run.train_step, []

    def fail_at_5(*args):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped
        return step(*args)

    run.train_step = fail_at_5
    fail_at_5.optimizer, fail_at_5.scaler = step.optimizer, step.scaler
    with pytest.raises(Stopped):
        fit(run)
    path = 'auto' if resume == 'auto' else str(tmp_path / 'run' / 'checkpoint-0.pth.tar')
    again = build(tiny(tmp_path, resume=path))
    assert again.step == 3 and again.folder == tmp_path / 'run'
    fit(again)
    assert_same(weights(tmp_path), weights(undisturbed[0]))
    assert len(again.history) == 3


def test_resume_auto_without_a_checkpoint_starts_afresh(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'timm_robust'):
        assert build(tiny(tmp_path, resume='auto')).step == 0
    assert 'nothing to resume' in caplog.text


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'model': 'resnet18_relu'}, r"holds arch 'resnet18_pssilu', the recipe says 'resnet18_relu'"),
        ({'batch_size': 200}, r'--batch-size 400; resume with the same, not 200'),
    ],
)
def test_resume_refuses_another_run(undisturbed, tmp_path, changes, match):
    path = str(undisturbed[0] / 'run' / 'last.pth.tar')
    with pytest.raises(ValueError, match=match):
        build(tiny(tmp_path, resume=path, **changes))


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
    ours = validate(run.model, run.forward, run.held_out, run.recipe)
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
    run = build(tiny(tmp_path))
    with torch.no_grad():
        run.model.fc.bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'the loss is nan at step 2.*--lr.*--seed'):
        fit(run)
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


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


def test_the_compiled_run_follows_the_eager_one(tmp_path):
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
