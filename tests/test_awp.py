import pytest
import torch
import torch.nn as nn

from timm_robust.training.awp import perturbed_weights


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 10))


def test_weights_move_up_the_loss_by_gamma_and_come_back_bit_for_bit(net):
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8)
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def loss():
        return nn.functional.cross_entropy(net(x), y)

    grads = torch.autograd.grad(loss(), [net[0].weight, net[4].weight])
    net.load_state_dict(before)
    with perturbed_weights(net, loss, 0.01):
        inside = {key: value.clone() for key, value in net.state_dict().items()}
        worse = loss().item()
    net.load_state_dict({**net.state_dict(), **{k: v for k, v in before.items() if 'running' in k or 'num' in k}})
    assert worse > loss().item()
    for name, grad in zip(('0.weight', '4.weight'), grads, strict=True):
        move = inside[name] - before[name]
        torch.testing.assert_close(move, 0.01 * before[name].norm() * grad / grad.norm(), rtol=1e-3, atol=1e-6)
        assert torch.equal(net.state_dict()[name], before[name])
    assert all(torch.equal(inside[key], value) for key, value in before.items() if key.startswith('1.'))
    assert torch.equal(inside['4.bias'], before['4.bias'])


def test_a_factor_of_the_loss_changes_nothing_and_weights_without_a_finite_gradient_stay(net):
    x, y, moves = torch.rand(8, 3, 8, 8), torch.arange(8), []
    before = [p.detach().clone() for p in net.parameters()]
    for factor in (1.0, 1024.0):
        with perturbed_weights(net, lambda f=factor: f * nn.functional.cross_entropy(net(x), y), 0.01):
            moves.append([p - old for p, old in zip(net.parameters(), before, strict=True)])
    torch.testing.assert_close(*moves, rtol=1e-4, atol=1e-8)

    def overflows():
        return nn.functional.cross_entropy(net(x), y) + torch.inf * net[4].weight[0, 0]

    with perturbed_weights(net, overflows, 0.01):
        assert torch.equal(net[4].weight, before[4])
        torch.testing.assert_close(net[0].weight - before[0], moves[0][0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_move_is_each_weights_own_bit_for_bit(net, layout):
    net = net.to(memory_format=layout)
    x, y = torch.rand(8, 3, 8, 8).contiguous(memory_format=layout), torch.arange(8)

    def loss():
        return nn.functional.cross_entropy(net(x), y)

    weights = [net[0].weight, net[4].weight]
    grads = [grad.contiguous() for grad in torch.autograd.grad(loss(), weights)]
    expected = []
    for w, grad in zip([w.detach() for w in weights], grads, strict=True):
        expected.append(w + grad * (0.01 * w.norm() / (grad.norm() + 1e-12)))
    with perturbed_weights(net, loss, 0.01):
        assert all(torch.equal(w, moved) for w, moved in zip(weights, expected, strict=True))


def test_the_statistics_of_batch_norm_stay(net):
    before = {key: value.clone() for key, value in net[1].named_buffers()}
    with perturbed_weights(net, lambda: net(torch.rand(8, 3, 8, 8)).sum(), 0.01):
        pass
    assert all(torch.equal(before[key], value) for key, value in net[1].named_buffers())
