"""Training on smaller images first: what each step sees, what follows a change of side, and what counts as best."""

import pytest
import torch
from tiny_runs import assert_same, signalled_at, tap_steps, tiny, weights

from timm_robust.pixels import resized
from timm_robust.training import loop as engine
from timm_robust.training.builder import build
from timm_robust.training.clock import Clock
from timm_robust.training.loop import Stopped, fit
from timm_robust.training.planning import plan
from timm_robust.training.recipe import Recipe

STAGES = {8: 1, 16: 1, 32: 2}  # 3 steps an epoch


def staged(folder, **changes):
    settings = {'epochs': 4, 'max_steps': None, 'eps_warmup': 0.5, 'progressive_resizing': STAGES}
    return tiny(folder, **settings | changes)


def seen_by(run):
    """The sides of the images that the training steps get, one a step."""
    sides = []

    def watch(take, x, y, number, progress):
        assert run.side == x.shape[-1] == x.shape[-2]
        sides.append(x.shape[-1])
        return take(x, y, number, progress)

    tap_steps(run, watch)
    return sides


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stages')
    return folder, fit(build(staged(folder)))


def test_antialiasing():
    x = torch.zeros(1, 1, 16, 16)
    x[..., ::2, ::2] = x[..., 1::2, 1::2] = 1.0
    small = resized(x, 8)  # the finest checkerboard is grey at half the side, without any pattern
    torch.testing.assert_close(small[..., 1:-1, 1:-1], torch.full((1, 1, 6, 6), 0.5))
    assert resized(x, None) is x and resized(x, 16) is x
    noise = resized(torch.rand(8, 3, 32, 32).round(), 24)
    assert noise.min() >= 0 and noise.max() <= 1


def test_each_step_gets_images_of_its_stage(tmp_path):
    run = build(staged(tmp_path))
    sides = seen_by(run)
    fit(run)
    per_epoch = run.batches.steps_per_epoch
    assert sides == [8] * per_epoch + [16] * per_epoch + [32] * 2 * per_epoch
    assert [row['side'] for row in run.history] == [8, 16, 32, 32]


def test_a_shorter_run_goes_through_the_same_stages(tmp_path):
    run = build(staged(tmp_path, max_steps=8))
    sides = seen_by(run)
    fit(run)
    assert sides == [8, 8, 16, 16, 32, 32, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize('stop', [2, 3, 4, 6])  # within a stage, and where the side changes
def test_resumed_run_ends_with_the_same_bits(tmp_path, undisturbed, stop):
    run = signalled_at(stop - 1, build(staged(tmp_path)))
    assert run.batches.steps_per_epoch == 3
    with pytest.raises(Stopped):
        fit(run)
    fit(build(staged(tmp_path, resume='auto')))
    assert_same(weights(tmp_path), weights(undisturbed[0]))


@pytest.mark.parametrize('number', [0, 1], ids=['change of side', 'average'])
def test_a_signal_in_a_re_estimation_saves_before_it(tmp_path, undisturbed, monkeypatch, number):
    run, estimate, places = build(staged(tmp_path)), engine.reestimate_batch_norm, []

    def signalled(run, batches):
        places.append(run.step)
        run.stop = run.side == 16 and len(places) > 1 + number
        estimate(run, batches)

    monkeypatch.setattr(engine, 'reestimate_batch_norm', signalled)
    with pytest.raises(Stopped, match=rf'at step {3 + 3 * number}, and saved'):
        fit(run)
    monkeypatch.undo()
    fit(build(staged(tmp_path, resume='auto')))
    assert_same(weights(tmp_path), weights(undisturbed[0]))


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({}, [False, False, True, True]),
        ({'val_size': 0}, 4 * [False]),  # the average is re-estimated at the end alone
        ({'val_size': 0, 'model_ema': False}, [False, False, True, True]),
        ({'late_steps': 2, 'late_start': 0.9}, [False, False, False, True]),
    ],
)
def test_the_estimate_of_the_last_validation_holds_until_one_like_it(tmp_path, monkeypatch, settings, expected):
    seen = []
    monkeypatch.setattr(Clock, 'note_validation', lambda clock, seconds, interval, like: seen.append(like))
    fit(build(staged(tmp_path, **settings)))
    assert seen == expected


def test_batch_norm_follows_the_side(tmp_path):
    run = build(staged(tmp_path, loss='clean'))
    engine.enter_stage(run, 8)
    before = run.model.bn1.running_mean.clone()
    assert torch.equal(before, torch.zeros_like(before))  # the first stage begins as the network is
    engine.enter_stage(run, 16)
    n = max(run.batches.steps_per_epoch // 4, 1)
    maps = [run.model.conv1(resized(run.batches[i][0], 16)).mean((0, 2, 3)) for i in range(n)]
    torch.testing.assert_close(run.model.bn1.running_mean, torch.stack(maps).mean(0))
    assert run.model.bn1.momentum == 0.1


def test_the_plan_tells_the_rate_at_each_side(tmp_path):
    line = plan(build(staged(tmp_path)), steps=1)
    rates = [line[f'images_per_s_at_{side}'] for side in (8, 16, 32)]
    assert line['images_per_s'] == pytest.approx(4 / (1 / rates[0] + 1 / rates[1] + 2 / rates[2]))


def test_best_is_of_the_last_stage(tmp_path, monkeypatch):
    scores = iter([0.9, 0.8, 0.3, 0.2])
    monkeypatch.setattr(engine, 'validate', lambda *_: {'val_clean_acc': 1.0, 'val_pgd_acc': next(scores)})
    run = build(staged(tmp_path))
    line = fit(run)
    assert line['val_pgd_acc'] == run.best == 0.3 and line['epoch'] == 2


def test_the_result_is_of_the_last_stage(undisturbed):
    assert undisturbed[1]['epoch'] in (2, 3)


@pytest.mark.parametrize(
    ('stages', 'epochs', 'words'),
    [
        ({16: 4, 32: 10}, 15, r'14 epochs in all, epochs is 15; make them equal'),
        ({32: 4, 16: 10}, 14, r'has the sides \[32, 16\]; allowed: sides of 8 to 4096 that grow.*16=4 24=8'),
        ({'a': 4}, 4, r"\{'a': 4\} is not of the right form"),
        ({16: 0, 32: 4}, 4, r'not of the right form'),
        ({16: 1.5, 32: 2}, 4, r'not of the right form'),
        ({0: 1, 32: 3}, 4, r'sides \[0, 32\]'),
    ],
)
def test_bad_stages(stages, epochs, words):
    with pytest.raises(ValueError, match=words):
        Recipe(progressive_resizing=stages, epochs=epochs)


def test_stages_that_do_not_fit_the_images_or_the_network(tmp_path):
    with pytest.raises(ValueError, match=r'last stage .* has 16 pixels a side, the images have 32; end with 32'):
        build(staged(tmp_path, progressive_resizing={8: 2, 16: 2}))
    with pytest.raises(ValueError, match=r'img_size resizes inside the network, .* give one'):
        build(staged(tmp_path, img_size=32))
    vit = {'img_size': 32, 'patch_size': 4, 'embed_dim': 12, 'depth': 1, 'num_heads': 1}
    with pytest.raises(ValueError, match=r'does not take 3 x 8 x 8 images .* takes every side of its stages'):
        build(staged(tmp_path, model='vit_tiny_patch16_224', model_kwargs=vit))


def test_a_network_of_timm_that_takes_several_sizes(tmp_path):
    kwargs = {'img_size': 32, 'patch_size': 4, 'embed_dim': 12, 'depth': 1, 'num_heads': 1, 'dynamic_img_size': True}
    run = build(staged(tmp_path, model='vit_tiny_patch16_224', model_kwargs=kwargs))
    fit(run)
    assert [row['side'] for row in run.history] == [8, 16, 32, 32]
