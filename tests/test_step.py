"""A training step's twins: recomputed, of half the bits, and with a learned activation instead of a fixed one."""

import itertools

import pytest
import timm
import torch
from tiny_runs import tiny

from timm_robust.attacks.gradient import input_gradient
from timm_robust.attacks.surrogates import cross_entropy
from timm_robust.training import step
from timm_robust.training.builder import build
from timm_robust.training.loop import fit
from timm_robust.training.losses import trades

SETTINGS = {'val_size': 0, 'max_steps': None, 'batch_size': 32, 'warmup_epochs': 0.0, 'model_ema': False}


def kept_bytes(model: torch.nn.Module, x: torch.Tensor, frozen: bool) -> int:
    """Bytes that a forward keeps for its backward, each piece of memory once, weights aside."""
    model.requires_grad_(not frozen)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # the tensor stays alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x.clone().requires_grad_(frozen))
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize('frozen', [True, False], ids=['attack', 'update'])
def test_pssilu_keeps_no_more_for_backward_than_silu(frozen):
    x, sizes = torch.rand(8, 3, 32, 32), {}
    for act in ('silu', 'pssilu'):
        model = timm.create_model(f'wrn28_10_{act}', depth=10, widen_factor=1)
        sizes[act] = kept_bytes(model, x, frozen)
        model.set_grad_checkpointing()
        sizes[f'{act}, recomputed'] = kept_bytes(model, x, frozen)
    slack = 200  # alpha, beta and what follows from them
    assert sizes['pssilu'] <= sizes['silu'] + slack
    assert sizes['pssilu, recomputed'] <= sizes['silu, recomputed'] + slack
    assert sizes['pssilu, recomputed'] < 0.5 * sizes['pssilu']


@pytest.mark.parametrize(
    'settings',
    [{'loss': 'trades', 'steps': 2}, {'awp_gamma': 0.01, 'steps': 2}, {'attack_bn': 'train'}, {'amp': True}],
    ids=['trades', 'awp', 'attack in train mode', 'bf16'],
)
def test_recompute_takes_the_same_step(tmp_path, settings):
    weights = []
    for recompute in (False, True):
        recipe = tiny(tmp_path, **{**SETTINGS, 'batch_size': 16, 'grad_checkpointing': recompute, **settings})
        run = build(recipe)
        assert run.model.stages[0].grad_checkpointing == recompute
        for number in range(2):
            run.train_step(*run.batches[number], number, 0.5)
        weights.append(run.model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.slow
def test_bf16_trains_as_well_as_fp32(tmp_path):
    found = {}
    for amp in (False, True):
        changes = SETTINGS | {'model_kwargs': {'width': 8}, 'attack': 'fgsm', 'epochs': 5, 'batch_size': 64}
        changes |= {'train_split': 'train', 'val_size': 200, 'val_interval': 5, 'lr': 0.1, 'eval_steps': 10, 'amp': amp}
        found[amp] = fit(build(tiny(tmp_path / str(amp), **changes)))
    clean, robust = (abs(found[True][key] - found[False][key]) for key in ('val_clean_acc', 'val_pgd_acc'))
    assert found[False]['val_clean_acc'] > 0.8 and found[False]['val_pgd_acc'] > 0.5  # training teaches
    assert clean < 0.1 and robust < 0.1  # two standard errors of a difference between two shares of 200 images


MODES = [{'amp': True, 'attack_bn': 'train'}, {'attack': 'fgsm', 'clip_grad': 1.0, 'smoothing': 0.1}]
KINDS = itertools.product(('pgd_at', 'trades', 'clean'), ('Linf', 'L2'), MODES)


@pytest.mark.parametrize(
    'settings',
    [
        *({'loss': loss, 'norm': norm, **mode} for loss, norm, mode in KINDS),
        *({'attack': 'n_fgsm'}, {'attack': 'apgd', 'steps': 3}, {'awp_gamma': 0.01}, {'mixup': 0.2}, {'loss': 'mart'}),
        *({'seed': 2**63 - 1}, {'opt': 'adahessian'}),
    ],
    ids=str,
)
def test_every_loss_attack_and_mode_takes_a_step(tmp_path, settings):
    run = build(tiny(tmp_path, max_steps=1, val_size=0, model_kwargs={'width': 2}, **settings))
    before = run.model.conv1.weight.clone()
    run.scheduler.step_update(0)
    out = run.train_step(*run.batches[0], 0)
    assert out.loss.isfinite() and 0 <= out.correct <= 100
    assert not torch.equal(run.model.conv1.weight, before)
    assert all(p.requires_grad for p in run.model.parameters()) and run.model.training


def test_the_compiled_run_follows_the_eager_one(tmp_path):
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run = build(tiny(tmp_path, model_kwargs={'width': 2}, val_size=0, lr=0.01, torchcompile=compiled))
        losses.append([run.train_step(*run.batches[i], i).loss.item() for i in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_on_a_gpu_a_network_for_images_of_several_sides_has_its_pssilu_compiled_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(step, 'compile_kernels', asked.append)
    nets = [timm.create_model(f'resnet18_{act}', width=2) for act in ('pssilu', 'silu')]
    whole = [step.compiled(net, torch.device('cuda'), sides) is not net for sides in (1, 3) for net in nets]
    assert whole == [True, True, False, True] and asked == ['cuda']


def test_adaptive_clipping_leaves_the_head_alone(tmp_path):
    gradients = []
    for bound in (None, 1e-6):
        run = build(tiny(tmp_path, max_steps=1, model_kwargs={'width': 2}, clip_grad=bound, clip_mode='agc'))
        run.train_step(*run.batches[0], 0)
        gradients.append({name: parameter.grad for name, parameter in run.model.named_parameters()})
    plain, clipped = gradients
    assert torch.equal(plain['fc.weight'], clipped['fc.weight'])
    assert clipped['conv1.weight'].norm() < 0.1 * plain['conv1.weight'].norm()


def test_of_mixed_images_the_larger_part_is_the_right_answer(tmp_path):
    run = build(tiny(tmp_path, model_kwargs={'width': 2}, cutmix=1.0, loss='clean'))
    step, (x, y) = run.train_step, run.batches[0]
    seen, scale = [], torch.ones((), requires_grad=True)
    step.mixup, mix = lambda x, y: seen.append(mix(x, y)) or seen[-1], step.mixup
    step.forward.net = lambda x: scale * seen[-1][1]
    assert [step(x, y, number).correct.item() for number in range(4)] == [len(y)] * 4
    assert any((target.argmax(1) != y).any() for _, target in seen)


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


def test_the_penalty_of_beta_takes_nothing_from_a_bound_on_the_norm(tmp_path):
    gradients = []
    for bound in (None, 1e3):  # no bound, and one that ordinary gradients are far below
        run = build(tiny(tmp_path, max_steps=1, clip_grad=bound, pssilu_reg=1e5))
        run.train_step(*run.batches[0], 0)
        gradients.append(run.model.conv1.weight.grad)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.slow
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


def tiny_run(folder, **changes):
    settings = {'max_steps': 3, 'model_kwargs': {'width': 2}, 'pssilu_reg': 0.0, 'pssilu_beta_clip': None}
    return build(tiny(folder, **settings | changes))


def test_beta_and_smoothing_of_the_recipe_reach_the_loss(tmp_path):
    run = tiny_run(tmp_path, loss='trades', beta=3.0, smoothing=0.2)
    x, y = run.batches[0]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 10))
    found, expected = (loss.descend(net, x, x + 0.01, y).loss for loss in (run.train_step.loss, trades(3.0, 0.2)))
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found, trades().descend(net, x, x + 0.01, y).loss)


def test_the_norm_of_all_gradients_is_clipped(tmp_path):
    run = tiny_run(tmp_path, clip_grad=1e-3)
    run.train_step(*run.batches[0], 0)
    total = torch.stack([parameter.grad.norm() for parameter in run.model.parameters()]).norm().item()
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_the_update_is_taken_at_weights_further_up_the_loss(tmp_path):
    run, losses = tiny_run(tmp_path, awp_gamma=0.05, loss='clean'), []
    objective = run.train_step.objective

    def watch(*args):
        out = objective(*args)
        losses.append(out.loss.item())
        return out

    run.train_step.objective = watch
    run.train_step(*run.batches[0], 0)
    assert len(losses) == 2 and losses[1] > losses[0]


def test_each_step_and_each_process_draws_noise_of_its_own(tmp_path):
    train_step, drawn = tiny_run(tmp_path).train_step, []
    for number, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        train_step.rank = rank
        train_step.draw_from(number)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


def test_the_average_warms_up_in_training(tmp_path):
    run = tiny_run(tmp_path, model_ema_decay=0.9)
    before = run.model.conv1.weight.detach().clone()
    run.scheduler.step_update(1)
    run.train_step(*run.batches[0], 0)
    assert not torch.equal(before, run.model.conv1.weight)
    torch.testing.assert_close(run.ema.module.conv1.weight, 0.1 * before + 0.9 * run.model.conv1.weight)
