"""The examples at the head of the modules do what they say; and the one call that attacks a batch."""

import doctest
import importlib

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_robust import ThreatModel, attack

MODULES = (
    *('', 'activations.modules', 'data.batches', 'evaluation.images', 'models.load', 'threat_model', 'training.recipe'),
)


@pytest.mark.parametrize('name', MODULES)
def test_the_examples_run(name):
    found = doctest.testmod(importlib.import_module(f'timm_robust.{name}'.rstrip('.')))
    assert found.attempted > 1 and not found.failed


@pytest.fixture
def classifier():
    """A network that thinks it is trained: labels are its own."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18_pssilu', width=4)
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.train(), x, model.eval()(x).argmax(1)


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_a_batch_is_attacked_and_the_model_left_as_it_was(classifier, norm):
    model, x, y = classifier
    threat = ThreatModel(norm, 0.1 if norm == 'Linf' else 1.0)
    state, mode = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    x_adv = attack(model, x, y, threat, batch_size=4)
    assert threat.contains(x_adv, x).all() and not x_adv.requires_grad
    assert model.training == mode and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model.eval()
        assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)
    model.train(mode)
    assert torch.equal(attack(model, x, y, threat, batch_size=4), x_adv)  # the seed decides


def test_timms_mean_and_std_are_applied_inside():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.full((1, 3, 32, 32), 0.5)
    attack(model, x, torch.tensor([0]), ThreatModel('Linf', 0.0), steps=1)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    assert torch.allclose(seen[0], (x - mean) / std)


def test_a_model_and_images_of_any_floating_type_and_labels_of_any_whole_one(classifier):
    model, x, y = classifier
    expected = attack(model, x, y, step_size=2 / 255)
    assert torch.equal(attack(model, x.double(), y.int(), step_size='2/255'), expected)
    half = attack(model.bfloat16(), x, y)
    assert half.dtype == torch.float32 and ThreatModel().contains(half, x).all()


@pytest.mark.slow
def test_autoattack_of_a_batch(classifier, short_attacks):
    model, x, y = classifier
    x_adv = attack(model.eval(), x, y, ThreatModel('Linf', 0.05), method='autoattack')
    assert ThreatModel('Linf', 0.05).contains(x_adv, x).all()


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        ({'method': 'cw'}, "method 'cw' is unknown; allowed: pgd, autoattack"),
        ({'x': torch.rand(6, 3, 32, 32) * 255}, r'pixels must lie in \[0, 1\]'),
        ({'y': torch.zeros(5, dtype=torch.int64)}, 'labels must be whole numbers'),
        ({'threat_model': ThreatModel('L2', 128)}, "write '128/255'"),
        ({'y': torch.full((6,), 10)}, r'labels must lie in 0\.\.9'),
        ({'steps': 0}, 'steps must be at least 1'),
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'step_size': -1}, 'step_size -1 is not a positive number'),
        ({'step_size': 0.1}, 'wider than the ball'),
    ],
)
def test_what_is_no_batch_is_refused(classifier, change, match):
    model, x, y = classifier
    with pytest.raises(ValueError, match=match):
        attack(**{'model': model, 'x': x, 'y': y, **change})
