import pytest
import timm
import torch
from torch import nn

import timm_robust  # noqa: F401
from timm_robust.attacks.packing import PackedConv2d, pack_convolutions

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch without oneDNN')


def gradients(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = net(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize(
    'settings',
    [
        {'kernel_size': 3, 'padding': 1},
        {'kernel_size': 3, 'padding': 1, 'bias': False},
        {'kernel_size': 3, 'padding': 1, 'stride': 2},
        {'kernel_size': 1, 'stride': 2},
        {'kernel_size': 1},
        {'kernel_size': (3, 5), 'padding': (0, 2)},
        {'kernel_size': 3, 'padding': 2, 'dilation': 2},
        {'kernel_size': 1, 'padding': 1},  # the gradient's convolution would need a negative padding
        {'kernel_size': 2, 'padding': 1, 'stride': (1, 2)},
    ],
)
@pytest.mark.parametrize('images', [1, 5, 33])
def test_equal_to_the_convolution(settings, images):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, **settings).requires_grad_(False)
    packed = PackedConv2d(conv)
    x = torch.randn(images, 24, 9, 8).contiguous(memory_format=torch.channels_last)
    for layout in (torch.channels_last, torch.contiguous_format):
        for ours, theirs in zip(gradients(packed, x), gradients(conv, x.contiguous(memory_format=layout)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        x = x.contiguous()
    with torch.no_grad():
        torch.testing.assert_close(packed(x), conv(x), rtol=1e-4, atol=1e-4)


def test_a_network_of_packed_convolutions():
    torch.manual_seed(0)
    model = timm.create_model('resnet18_pssilu', width=8).eval().requires_grad_(False)
    x = torch.rand(6, 3, 32, 32)
    logits, gradient = gradients(model, x)
    assert pack_convolutions(model) == 0  # too small to gain
    assert pack_convolutions(model, least=0) == 20
    ours, theirs = gradients(model, x)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, gradient, rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.conv1(x).dtype == torch.bfloat16  # a screen in bf16 is one


def test_what_is_not_packed():
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, padding='same'),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(8, 8, 3).double(),
        nn.Conv2d(8, 8, 3, device='meta'),
        nn.Conv1d(8, 8, 3),
    )
    assert pack_convolutions(net, least=0) == 0


def test_without_the_operators_the_network_stays_as_it_is(monkeypatch):
    def missing(*args):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_convolution_weight'")

    monkeypatch.setattr('timm_robust.attacks.packing._arguments', missing)
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    assert pack_convolutions(net, least=0) == 0 and type(net[0]) is nn.Conv2d
