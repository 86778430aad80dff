import pytest
import torch
from torch import nn

from timm_robust.evaluation import sanity_checks
from timm_robust.evaluation.sanity_checks import _outputs, find_problems
from timm_robust.threat_model import ThreatModel

EPS = ThreatModel('Linf', 0.05)


class Net(nn.Sequential):
    """An honest small network."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Flatten(), nn.Linear(48, 16), nn.SiLU(), nn.Linear(16, 10))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()


class Random(Wrapped):
    def forward(self, x):
        return self.net(x) + 0.05 * torch.randn(len(x), 10)


class Softmax(Wrapped):
    def forward(self, x):
        return self.net(x).softmax(1)


class Rounded(Wrapped):
    """A quantised input: the gradient is zero everywhere."""

    def forward(self, x):
        return self.net((8 * x).round() / 8)


class Saturated(Wrapped):
    """Logits so large that the cross-entropy of right images, and its gradient, are zero in fp32."""

    def forward(self, x):
        return 1e4 * self.net(x)


class BatchStatistics(Wrapped):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return self.net(self.norm(x))


class Shattered(Wrapped):
    """A steep ripple of no height that points gradients anywhere."""

    def forward(self, x):
        return self.net(x + 1e-3 * torch.sin(3e4 * x))


class Lost(Wrapped):
    """A root whose derivative at zero is infinite, times zero: the gradient is NaN, the logits are not."""

    def forward(self, x):
        return self.net(x) + (0 * x).flatten(1).sum(1, keepdim=True).sqrt()


def images(model, n=40):
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    with torch.no_grad():
        return x, model(x).argmax(1)


def test_an_honest_model_raises_no_doubt():
    model = Net().eval()
    x, y = images(model)
    assert find_problems(model, x, y, EPS) == []
    assert find_problems(model, x, y, ThreatModel('L2', 0.5)) == []


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (Random, 'the forward pass is random'),
        (Softmax, 'the outputs are probabilities'),
        (Rounded, 'have a gradient of exactly zero'),
        (Rounded, 'PGD without a bound leaves'),
        (Saturated, 'have a gradient of exactly zero'),
        (BatchStatistics, 'depend on the others of its batch'),
        (Lost, '40 of 40 images have a gradient that is not finite'),
        (Shattered, 'PGD without a bound leaves'),
    ],
)
def test_a_dishonest_one_is_caught(make, message):
    model = make().eval()
    x, y = images(model)
    assert any(message in doubt for doubt in find_problems(model, x, y, EPS)), find_problems(model, x, y, EPS)


@pytest.mark.parametrize('make', [Net, Softmax, Rounded, Shattered])
def test_the_batch_size_bounds_every_pass_and_changes_no_doubt(make):
    model, sizes = make().eval(), []
    x, y = images(model)
    at_once = find_problems(model, x, y, EPS)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parts = find_problems(model, x, y, EPS, batch_size=16)
    assert max(sizes) == 16 and [doubt.split(':')[-1] for doubt in parts] == [doubt.split(':')[-1] for doubt in at_once]


def test_shuffled_labels():
    model = Net().eval()
    x, y = images(model)
    shuffled = (y + 1) % 10
    assert any('about chance for 10 classes' in doubt for doubt in find_problems(model, x, shuffled, EPS))


@pytest.mark.parametrize(('classes', 'right', 'said'), [(2, 37, False), (2, 31, True), (10, 8, False), (10, 7, True)])
def test_chance_is_what_guesses_reach_and_not_half_above_it(classes, right, said):
    logits = torch.eye(classes)[torch.zeros(50, dtype=torch.long)]
    found = _outputs(nn.Identity(), logits - 0.5, torch.arange(50) < right, 50)
    assert any('about chance' in doubt for doubt in found) == said


@pytest.mark.parametrize(
    ('weak', 'said'), [((0.05, 40), 'more steps are not stronger'), ((0.1, 10), 'a larger ball is not')]
)
def test_a_stronger_attack_that_finds_less_is_said(monkeypatch, weak, said):
    x, y = torch.full((20, 3, 4, 4), 0.5), torch.zeros(20, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1.0]]).expand(2, 48).clone()
    model[1].bias.data = torch.tensor([24.5, -24.5])

    def pgd(loss_fn, x, ball, steps, **settings):
        return x if (round(ball.eps, 3), steps) == weak else x + 0.05

    monkeypatch.setattr(sanity_checks, 'pgd', pgd)
    found = sanity_checks._gradients(model, x, y, EPS, 0, 50)
    assert any(said in text for text in found), found
