import pytest
import torch
import torch.nn as nn
from pyautoattack.autopgd_base import APGDAttack

from timm_robust.attacks.gradient import (
    _checkpoints,
    apgd,
    attacked,
    fgsm,
    frozen_statistics,
    input_gradient,
    n_fgsm,
    pgd,
)
from timm_robust.attacks.surrogates import cross_entropy_of
from timm_robust.threat_model import ThreatModel

LINF, L2 = ThreatModel('Linf', 8 / 255), ThreatModel('L2', 0.5)


@pytest.fixture
def x():
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
@pytest.mark.parametrize('steps', [1, 7])
@pytest.mark.parametrize('random_start', [True, False])
def test_stays_inside_the_threat_model_and_raises_the_loss(net, x, threat_model, steps, random_start):
    y = torch.arange(12) % 10
    loss_fn = cross_entropy_of(net, y)
    with attacked(net):
        x_adv = pgd(loss_fn, x, threat_model, steps=steps, step_size=threat_model.eps / 2, random_start=random_start)
        assert threat_model.contains(x_adv, x).all()
        assert not x_adv.requires_grad
        assert loss_fn(x_adv).mean() > loss_fn(x).mean()


@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_one_full_step_is_exact_for_a_linear_surrogate(x, threat_model):
    inner = 0.25 + 0.5 * x  # far from the bounds, where the optimum is known in closed form
    weight = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))

    def loss_fn(x):
        return (x * weight).flatten(1).sum(1)

    x_adv = fgsm(loss_fn, inner, threat_model, random_start=False)
    dual = weight.abs().sum() if threat_model.norm == 'Linf' else weight.norm()
    torch.testing.assert_close(
        loss_fn(x_adv) - loss_fn(inner), (threat_model.eps * dual).expand(12), rtol=1e-4, atol=1e-4
    )
    several = pgd(loss_fn, inner, threat_model, steps=20, step_size=threat_model.eps / 4)
    torch.testing.assert_close(loss_fn(several), loss_fn(x_adv), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_a_gaussian_start_is_as_wide_as_asked_and_allowed(x, threat_model):
    def loss_fn(x):
        return x.flatten(1).sum(1)

    inner = 0.25 + 0.5 * x
    start = pgd(loss_fn, inner, threat_model, steps=0, step_size=0.1, start_noise=0.001)
    assert (start - inner).std().item() == pytest.approx(0.001, rel=0.1)
    wide = pgd(loss_fn, x.round(), threat_model, steps=0, step_size=0.1, start_noise=1.0)
    assert threat_model.contains(wide, x.round()).all()
    assert torch.equal(pgd(loss_fn, x, threat_model, steps=0, step_size=0.1, random_start=False, start_noise=1.0), x)


def test_more_steps_climb_higher(net, x):
    loss_fn = cross_entropy_of(net, torch.zeros(12, dtype=torch.long))
    with attacked(net):
        losses = [
            loss_fn(pgd(loss_fn, x, LINF, steps=steps, step_size=2 / 255, random_start=False)).mean()
            for steps in (0, 1, 5)
        ]
    assert losses[0] < losses[1] < losses[2]


def test_same_generator_same_attack(net, x):
    y = torch.zeros(12, dtype=torch.long)
    runs = []
    with attacked(net):
        for seed in (3, 3, 4):
            generator = torch.Generator().manual_seed(seed)
            runs.append(pgd(cross_entropy_of(net, y), x, LINF, steps=2, step_size=0.01, generator=generator))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_no_parameter_gets_a_gradient(net, x):
    input_gradient(lambda x: net(x).sum(1), x)
    assert all(p.grad is None for p in net.parameters())


def test_each_image_is_attacked_on_its_own(net, x):
    y = torch.arange(12) % 10
    with attacked(net):
        whole = pgd(cross_entropy_of(net, y), x, LINF, steps=3, step_size=0.01, random_start=False)
        half = pgd(cross_entropy_of(net, y[:6]), x[:6], LINF, steps=3, step_size=0.01, random_start=False)
    torch.testing.assert_close(whole[:6], half)


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('training', [True, False])
def test_attacked_leaves_the_model_as_it_was(net, x, mode, training):
    net.train(training)
    net[1].eval()  # a batch norm that the user froze
    net[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items() if 'num_batches' not in key}
    with pytest.raises(RuntimeError, match='inside'), attacked(net, mode):
        assert net[1].training == (mode == 'train')
        assert not any(p.requires_grad for p in net.parameters())
        net(x)
        raise RuntimeError('inside')
    assert net.training == training and not net[1].training and net[1].momentum == 0.1
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize('training', [True, False])
def test_frozen_statistics_are_the_same_tensors_with_the_same_values(net, x, training):
    net.train(training)
    net(x)
    norm, before = net[1], {key: value.clone() for key, value in net[1].named_buffers()}
    tensors = dict(norm.named_buffers())
    with frozen_statistics(net):
        net(x)
        assert all(norm.get_buffer(key) is tensor for key, tensor in tensors.items())  # compiled code reads these
        assert torch.equal(norm.running_mean, before['running_mean'])
    assert norm.momentum == 0.1
    assert all(norm.get_buffer(key) is tensor for key, tensor in tensors.items())
    assert all(torch.equal(norm.get_buffer(key), value) for key, value in before.items())
    with pytest.raises(ZeroDivisionError), frozen_statistics(net):
        net(x), 1 / 0
    assert all(torch.equal(norm.get_buffer(key), value) for key, value in before.items())


def test_unknown_mode(net):
    with pytest.raises(ValueError, match='allowed: eval, train'), attacked(net, 'test'):
        pass


def test_n_fgsm_goes_beyond_the_ball_but_not_beyond_the_pixels(net, x):
    y = torch.arange(12) % 10
    with attacked(net):
        x_adv = n_fgsm(cross_entropy_of(net, y), x, LINF)
    distance = LINF.distance(x_adv, x)
    assert (distance > LINF.eps).any() and (distance <= 3 * LINF.eps + 1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_n_fgsm_starts_at_its_radius_also_where_the_ball_is_wider_than_a_pixel():
    x, threat_model, starts = torch.full((200, 3, 8, 8), 0.5), ThreatModel('L2', 1.5), []

    def loss_fn(x):
        starts.append(x.detach())
        return x.flatten(1).sum(1)

    n_fgsm(loss_fn, x, threat_model, noise=2.0)
    assert 2.9 < threat_model.distance(starts[0], x).max() <= 3 + 1e-5


@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_apgd_is_allowed_and_at_least_as_strong_as_pgd(net, x, threat_model):
    y = torch.arange(12) % 10
    loss_fn = cross_entropy_of(net, y)
    with attacked(net):
        ours = apgd(loss_fn, x, threat_model, steps=20, random_start=False)
        theirs = pgd(loss_fn, x, threat_model, steps=20, step_size=threat_model.eps / 4, random_start=False)
        assert threat_model.contains(ours, x).all()
        assert loss_fn(ours).mean() >= loss_fn(theirs).mean() - 1e-3
        assert (loss_fn(ours) >= loss_fn(x) - 1e-6).all()  # it returns the best point that it saw


def test_apgd_reaches_the_maximum_of_a_linear_surrogate(x):
    inner, weight = 0.25 + 0.5 * x, torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))

    def loss_fn(x):
        return (x * weight).flatten(1).sum(1)

    gain = loss_fn(apgd(loss_fn, inner, LINF, steps=10)) - loss_fn(inner)
    torch.testing.assert_close(gain, (LINF.eps * weight.abs().sum()).expand(12), rtol=1e-4, atol=1e-4)


@pytest.fixture
def float64():
    """The authors' attack keeps losses and counts in the default dtype: in float64 rounding cannot part the two."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
@pytest.mark.parametrize('steps', [1, 10, 25])
def test_apgd_visits_the_points_of_the_authors_code(float64, threat_model, steps):
    torch.manual_seed(1)
    x, y = torch.rand(12, 3, 8, 8), torch.arange(12) % 10
    weight, direction = torch.randn(10, 192), torch.randn(192)

    def net(x):  # waves: the loss rises and falls along a step, so that every rule of the attack is met
        flat = x.flatten(1)
        return flat @ weight.T + 5 * torch.sin(flat @ direction)[:, None] * torch.linspace(-1, 1, 10)

    visited = []

    def model(x):
        visited.append(x.detach().clone())
        return net(x)

    ours = apgd(lambda x: cross_entropy_64(model(x), y), x, threat_model, steps=steps, random_start=False)
    our_points = visited.copy()
    visited.clear()
    theirs = APGDAttack(model, n_iter=steps, norm=threat_model.norm, eps=threat_model.eps, loss='ce', device='cpu')
    theirs.init_hyperparam(x)
    best = theirs.attack_single_run(x, y, x_init=x)[0]
    assert len(our_points) == len(visited) == steps + 1
    for step, (a, b) in enumerate(zip(our_points, visited, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=lambda text, step=step: f'step {step}: {text}')
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-7)


def cross_entropy_64(output, y):
    """`cross_entropy_of` computes in fp32."""
    return nn.functional.cross_entropy(output, y, reduction='none')


@pytest.mark.parametrize(
    ('steps', 'expected'),
    [
        (1, {1}),
        (10, {2, 3, 4, 5, 6, 7, 8, 9, 10}),
        (20, {4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}),
        (100, {22, 41, 57, 70, 80, 87, 93, 99}),
    ],
)
def test_apgd_looks_back_where_the_authors_code_does(steps, expected):
    assert _checkpoints(steps) == expected


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_n_fgsm_is_one_step_of_eps_up_from_its_noise(norm):
    weight, starts = torch.randn(3, 4, 4), []

    def climb(x):
        starts.append(x.detach())
        return (x * weight).flatten(1).sum(1)

    found = n_fgsm(climb, torch.full((5, 3, 4, 4), 0.5), ThreatModel(norm, 0.1))
    step = weight.sign() if norm == 'Linf' else weight / weight.norm()
    torch.testing.assert_close(found, starts[0] + 0.1 * step)
