import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_robust.attacks.surrogates import kl_divergence
from timm_robust.training.losses import LOSSES, clean, mart, pgd_at, trades


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 4))


@pytest.fixture
def batch():
    return torch.rand(6, 3, 2, 2), torch.arange(6) % 4


def nudge(loss_fn, x):
    """An attack that looks at its loss, as real ones do, and moves every pixel by 0.1."""
    assert loss_fn(x).shape == (len(x),)
    return (x + 0.1).clamp(0, 1)


def lost(loss, net, attack, x, y):
    return loss.descend(net, x, loss.perturb(net, attack, x, y), y)


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


def test_trades_at_beta_0_is_cross_entropy(net, batch):
    x, y = batch
    result = lost(trades(beta=0.0), net, nudge, x, y)
    expected = F.cross_entropy(net(x), y)
    torch.testing.assert_close(result.loss, expected)
    for ours, theirs in zip(gradients(net, result.loss), gradients(net, expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_trades_is_the_papers_formula_in_value_and_gradient(net, batch):
    x, y = batch
    result = lost(trades(beta=6.0), net, nudge, x, y)
    p, q = net(x).softmax(1), net(nudge(lambda x: net(x).sum(1), x)).softmax(1)
    expected = F.cross_entropy(net(x), y) + 6 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(result.loss, expected)
    for ours, theirs in zip(gradients(net, result.loss), gradients(net, expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_trades_computes_its_target_once_an_attack(net, batch):
    calls = []

    def counting(x):
        calls.append(torch.is_grad_enabled())
        return net(x)

    def three_steps(loss_fn, x):
        for _ in range(3):
            loss_fn(x)
        return x

    lost(trades(), counting, three_steps, *batch)
    assert len(calls) == 1 + 3 + 2 and calls.count(False) == 1


def test_pgd_at_trains_on_the_adversarial_images_alone(net, batch):
    x, y = batch
    result = lost(pgd_at(), net, nudge, x, y)
    torch.testing.assert_close(result.loss, F.cross_entropy(net(nudge(lambda x: net(x).sum(1), x)), y))
    assert torch.equal(result.logits, net(nudge(lambda x: net(x).sum(1), x)))


def test_mart_is_the_papers_formula(net, batch):
    x, y = batch
    p, q = net(x).softmax(1), net(nudge(lambda x: net(x).sum(1), x)).softmax(1)
    rows = torch.arange(6)
    others = q.masked_fill(F.one_hot(y, 4).bool(), 0).amax(1)
    bce = -q[rows, y].log() - (1 - others).log()
    expected = (bce + 5 * (p * (p / q).log()).sum(1) * (1 - p[rows, y])).mean()
    found = lost(mart(beta=5.0), net, nudge, x, y).loss
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(net, found), gradients(net, expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match='without mixup'):
        lost(mart(), net, nudge, x, F.one_hot(y, 4).float())


@pytest.mark.parametrize('name', ['pgd_at', 'trades', 'clean'])
def test_soft_labels_that_are_hard_change_nothing(net, batch, name):
    x, y = batch
    hard, soft = (
        lost(LOSSES[name].make(6.0, 0.0), net, nudge, x, target).loss for target in (y, F.one_hot(y, 4).float())
    )
    torch.testing.assert_close(hard, soft)


def test_clean_runs_no_attack(net, batch):
    def forbidden(loss_fn, x):
        raise AssertionError('attacked')

    torch.testing.assert_close(lost(clean(), net, forbidden, *batch).loss, F.cross_entropy(net(batch[0]), batch[1]))


@pytest.mark.parametrize('name', LOSSES)
def test_label_smoothing_reaches_the_loss(net, batch, name):
    plain, smooth = (lost(LOSSES[name].make(6.0, s), net, nudge, *batch).loss for s in (0.0, 0.3))
    assert not torch.isclose(plain, smooth)


def test_losses_are_fp32_for_low_precision_logits(batch):
    x, y = batch
    low = lambda x: x.flatten(1)[:, :4].bfloat16()  # noqa: E731
    for name in LOSSES:
        assert lost(LOSSES[name].make(6.0, 0.0), low, nudge, x, y).loss.dtype == torch.float32


def test_kl_divergence():
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    assert (kl_divergence(a, b) > 0).all()
    torch.testing.assert_close(kl_divergence(a, a + 3), torch.zeros(5), atol=1e-6, rtol=0)


def test_trades_climbs_the_divergence_of_the_adversarial_from_the_clean_outputs(net, batch):
    (x, y), seen = batch, []
    x_adv = (x + 0.3).clamp(0, 1)
    trades().perturb(net, lambda surrogate, start: seen.append(surrogate(x_adv)) or start, x, y)
    p, q = net(x).softmax(1), net(x_adv).softmax(1)
    torch.testing.assert_close(seen[0], (p * (p / q).log()).sum(1))
