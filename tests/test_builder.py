import time

import pytest
import safetensors.torch
import timm
import torch
from tiny_runs import tiny

from timm_robust.models import load_checkpoint, other_function
from timm_robust.training import builder as module
from timm_robust.training.batches import read_data
from timm_robust.training.builder import build, load_initial, make_scheduler, set_bn_momentum
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.loop import fit
from timm_robust.training.recipe import Recipe


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


def test_a_constant_rate_warms_up_and_keeps_layer_decay():
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in (0.5, 1.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = make_scheduler(optimizer, Recipe(lr=1.0, epochs=10, sched='constant', warmup_epochs=2.0), 100)
    for step, expected in ((0, 0.0), (10, 0.5), (20, 1.0), (99, 1.0)):
        scheduler.step_update(step)
        assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([expected / 2, expected])


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


def test_weights_that_were_trained_on_what_is_held_out_now_are_told_of(undisturbed, tmp_path, caplog):
    start = str(undisturbed[0] / 'run')
    build(tiny(tmp_path, initial_checkpoint=start))
    build(tiny(tmp_path, initial_checkpoint=start, val_size=0, seed=1))
    assert 'holds out' not in caplog.text
    build(tiny(tmp_path, initial_checkpoint=start, seed=1))
    assert 'images that this run holds out: accuracies on them will be too high; its own were drawn' in caplog.text


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


def test_weights_of_another_function_are_told(tmp_path, caplog):
    statistics = {'pretrained_cfg_overlay': {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.2, 0.2)}}
    kwargs = {'widen_factor': 1, 'same_padding': True, **statistics}
    source = timm.create_model('wrn28_10_silu', **kwargs)
    state = {'arch': 'wrn28_10_silu', 'num_classes': 10, 'state_dict': source.state_dict()}
    save_checkpoint(tmp_path / 'before/model_best.pth.tar', state | {'model_kwargs': kwargs})
    where = str(tmp_path / 'before')
    plain = timm.create_model('wrn28_10_relu', widen_factor=1)
    load_initial(plain, where)
    for text in ('mean (0.5, 0.4, 0.3) there', 'pads ', 'act is SiLU there, ReLU here'):
        assert text in '; '.join(other_function(source, plain)), text
    assert (
        f'{where} is of a network that computes otherwise: mean ' in caplog.text and 'same_padding=true' in caplog.text
    )
    caplog.clear()
    same = timm.create_model('wrn28_10_silu', **kwargs, drop_rate=0.3, num_classes=3)
    load_initial(same, where)
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'alone.safetensors')
    load_initial(plain, str(tmp_path / 'alone.safetensors'))  # says nothing of its network
    plain.pretrained_cfg, source.pretrained_cfg = ({'mean': kind((0.5, 0.4, 0.3))} for kind in (tuple, list))
    assert not any('mean' in line or 'std' in line for line in other_function(source, plain))  # a file has lists
    assert not caplog.text and torch.equal(plain.conv1.weight, source.conv1.weight)


def test_a_folder_that_has_the_name_of_a_network_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = timm.create_model('resnet18_relu', width=2)
    state = {
        'arch': 'resnet18_relu',
        'num_classes': 10,
        'state_dict': source.state_dict(),
        'model_kwargs': {'width': 2},
    }
    save_checkpoint(tmp_path / 'resnet18_relu/model_best.pth.tar', state)
    model = timm.create_model('resnet18_relu', width=2)
    load_initial(model, 'resnet18_relu')
    assert torch.equal(model.conv1.weight, source.conv1.weight)


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


def test_synchronised_batch_norms_keep_the_activations_inside_them():
    model = timm.create_model('efficientnet_b0_silu', num_classes=10).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(module.convert_sync_batchnorm(model).eval()(x), expected) and expected.abs().max() > 0


def test_a_resumed_budget_pays_for_reading_the_data_too(tmp_path, monkeypatch):
    fit(build(tiny(tmp_path, max_steps=1)))
    spent = load_checkpoint(tmp_path / 'run/last.pth.tar')['seconds']

    def read_slowly(*arguments):
        time.sleep(1.0)
        return read_data(*arguments)

    monkeypatch.setattr(module, 'read_data', read_slowly)
    again = build(tiny(tmp_path, resume='auto', allow_changes=True))
    assert again.clock.elapsed() > spent + 1


def test_images_of_another_size_are_refused_or_resized(tmp_path):
    kwargs = {'patch_size': 16, 'embed_dim': 12, 'depth': 1, 'num_heads': 2}
    with pytest.raises(ValueError, match=r'does not take 3 x 32 x 32.*--img-size 224.*--model-kwargs img_size=32'):
        build(tiny(tmp_path, model='vit_tiny_patch16_224', model_kwargs=kwargs))
    recipe = tiny(tmp_path, model='vit_tiny_patch16_224', model_kwargs={**kwargs, 'img_size': 64}, img_size=64)
    assert build(recipe).forward(torch.rand(2, 3, 32, 32)).shape == (2, 10)
