import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_robust  # noqa: F401
from timm_robust.attacks.folding import FoldedNet


def unsettle(model: nn.Module) -> nn.Module:
    """Statistics and scales far from the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize(
    ('name', 'kwargs', 'folded'),
    [
        ('resnet18_pssilu', {'width': 8}, 20),
        ('wrn28_10_pssilu', {'widen_factor': 1, 'depth': 10}, 3),
        ('resnet18', {}, 20),
        ('efficientnet_b0', {}, 49),  # BatchNormAct2d
        ('convnext_atto', {'dims': (8, 8, 16, 16), 'depths': (1, 1, 1, 1)}, 0),
    ],
)
def test_logits_and_input_gradients_are_the_networks(name, kwargs, folded):
    torch.manual_seed(0)
    model = unsettle(timm.create_model(name, num_classes=10, **kwargs)).double()
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    net = FoldedNet(model, x)
    assert len(net.pairs) == folded
    for ours, theirs in zip(gradients(net, x), gradients(model, x), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    assert not any(p.requires_grad for p in net.parameters()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('shared', [True, False])
def test_an_activation_of_its_own_inside_a_batch_norm_keeps_its_parameters(shared):
    model = timm.create_model('act_swapped', model='mobilenetv3_small_050', act='pssilu', shared=shared, num_classes=10)
    model = unsettle(model).double()
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith('alpha'):
                parameter.fill_(1 + 0.01 * place)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    net = FoldedNet(model, x)
    assert net.pairs
    for ours, theirs in zip(gradients(net, x), gradients(model, x), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_refresh_takes_the_present_weights():
    torch.manual_seed(0)
    model, x = unsettle(timm.create_model('resnet18_pssilu', width=8)), torch.rand(4, 3, 32, 32)
    net = FoldedNet(model, x)
    unsettle(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert not torch.allclose(net(x), model(x), rtol=1e-3)
    net.refresh()
    torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-4)


class Bare(nn.Module):
    """A convolution with a bias before a batch norm without scale and shift, and one of another eps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, bias=False), nn.BatchNorm2d(7, eps=0.1)
        self.fc = nn.Linear(7, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn2(self.conv2(self.bn1(self.conv1(x)))).mean((2, 3)))


def expected_weights(model: nn.Module, pairs: dict[str, str]) -> dict[str, torch.Tensor]:
    """Each layer on its own, by the formula."""
    state = dict(model.state_dict())
    for conv, name in pairs.items():
        norm = model.get_submodule(name)
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = (state.get(f'{conv}.bias', 0) - norm.running_mean) * scale
        state[f'{conv}.weight'] = state[f'{conv}.weight'] * scale.view(-1, 1, 1, 1)
        state[f'{conv}.bias'] = shift if norm.bias is None else shift + norm.bias
    return state


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('resnet18_pssilu', {'width': 5}),
        ('wrn28_10_pssilu', {'widen_factor': 1, 'depth': 10}),
        ('efficientnet_b0', {}),
        ('', {}),
    ],
)
def test_weights_of_the_copy_are_each_layers_own_bit_for_bit(name, kwargs, dtype):
    torch.manual_seed(0)
    model = unsettle(timm.create_model(name, **kwargs) if name else Bare())
    model = model.to(memory_format=torch.channels_last)
    net = FoldedNet(model, torch.rand(2, 3, 32, 32), dtype)
    assert len(net.pairs) > 1
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    net.refresh()
    expected = expected_weights(model, net.pairs)
    for key, value in net.net.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be sent, views aside; one over lists counts as one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu'])
def test_a_refresh_is_an_operation_a_folded_convolution_and_few_more(name):
    model = timm.create_model(name, **({'width': 4} if name.startswith('resnet') else {'widen_factor': 1}))
    net = FoldedNet(model, torch.rand(2, 3, 32, 32), torch.bfloat16)
    with Launches() as launches:
        net.refresh()
    assert launches.count <= len(net.pairs) + 20


class Twice(nn.Module):
    """A network whose convolution feeds more than its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.fc((self.bn(y) + y).mean((2, 3)))


def test_what_cannot_be_folded_is_left_alone():
    model, x = unsettle(Twice()), torch.rand(2, 3, 8, 8)
    net = FoldedNet(model, x)
    assert net.pairs == {}
    torch.testing.assert_close(net(x), model(x))


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('hooked', [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_weights_that_a_hook_computes_are_not_folded(hooked):
    layers = [hooked(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    model, x = unsettle(nn.Sequential(*layers).requires_grad_(False)), torch.rand(2, 3, 8, 8)
    model(x)
    net = FoldedNet(model, x)
    assert net.pairs == {'2': '3'}
    torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-4)


def test_low_precision_weights():
    model, x = unsettle(timm.create_model('resnet18_silu', width=8)), torch.rand(2, 3, 32, 32)
    net = FoldedNet(model, x, torch.bfloat16)
    assert net.net.conv1.weight.dtype == torch.bfloat16 and net.net.conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = net(x)
    torch.testing.assert_close(logits.float(), model(x), rtol=0.1, atol=0.1 * model(x).abs().max().item())
