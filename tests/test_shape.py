import pytest
import torch
from torch import nn

from timm_robust.activations.modules import PSSiLU, get_activation
from timm_robust.evaluation.shape import curve_facts, local_lipschitz, minimal_radii, set_shape, square_success


def linear(outputs=2, seed=0):
    """A linear classifier of 3 x 4 x 4 images around middle grey, where [0, 1] does not bind."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs)).eval()


def test_minimal_radii_of_a_linear_model_are_margin_over_l1_norm():
    model = linear()
    x = 0.5 + 0.02 * torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        weight = model[1].weight
        expected = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
    y[0] = 1 - y[0]
    expected[0] = 0  # wrong from the start
    found = minimal_radii(model, x, y, largest=0.3, rounds=14, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(found, expected, atol=2 * 0.3 / 2**14 + 1e-5)
    resists = minimal_radii(model, x, y, largest=expected.max().item() / 2, rounds=3)
    assert resists.max().item() == pytest.approx(expected.max().item() / 2)


@pytest.mark.parametrize('pixel', [0.0, 1.0])
def test_minimal_radii_where_the_pixels_bound_the_ball(pixel):
    model, x = linear(), torch.full((4, 3, 4, 4), pixel)
    with torch.no_grad():
        y = model(x).argmax(1)
        away = (model[1].weight[1 - y] - model[1].weight[y]).clamp(*((0, None) if pixel == 0 else (None, 0)))
        margin = model(x).gather(1, y[:, None])[:, 0] - model(x).gather(1, 1 - y[:, None])[:, 0]
        expected = margin / away.abs().sum(1)  # half of the weights point out of the box
    assert expected.max() < 1
    found = minimal_radii(model, x, y, largest=1.0, rounds=14, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(found, expected, atol=2 / 2**14 + 1e-5)


def test_local_lipschitz_of_a_linear_model_with_one_output_is_its_l1_norm():
    model = linear(outputs=1)
    x = torch.full((3, 3, 4, 4), 0.5)
    found = local_lipschitz(model, x, 0.05, generator=torch.Generator().manual_seed(0))
    assert found == pytest.approx(model[1].weight.abs().sum().item(), rel=1e-3)


def test_square_breaks_all_or_nothing_by_radius():
    model = linear()
    x = 0.5 + 0.02 * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    assert square_success(model, x, y, eps=0.45, queries=1000) == 1.0
    assert square_success(model, x, y, eps=1e-5, queries=20) == 0.0
    assert square_success(model, x, 1 - y, eps=0.3) == 0.0  # nothing was right


def test_set_shape_freezes_or_lets_learn():
    act = PSSiLU()
    set_shape(act, {'alpha': 3.0})
    assert act.values() == {'alpha': 3.0, 'beta': pytest.approx(1e-8)}
    assert not any(parameter.requires_grad for parameter in act.parameters())
    set_shape(act, {}, learned=True)
    assert all(parameter.requires_grad for parameter in act.parameters())
    with pytest.raises(ValueError, match="PSSiLU has no parameter 'gamma'; it has alpha, beta"):
        set_shape(act, {'gamma': 1.0})


def test_curve_facts_say_what_the_curve_does():
    facts = curve_facts(get_activation('softplus10')())
    assert facts['max_curvature'] == 2.5 and facts['f(-5)'] == pytest.approx(0, abs=1e-6)
    assert curve_facts(get_activation('relu')())['max_curvature'] == float('inf')


def test_the_lipschitz_constant_of_several_outputs_is_in_the_l1_norm():
    weight = torch.randn(1, 48)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False))
    model[1].weight.data = torch.cat([weight, 2 * weight])
    found = local_lipschitz(model, torch.full((3, 3, 4, 4), 0.5), 0.05)
    assert found == pytest.approx(3 * weight.abs().sum().item(), rel=1e-3)
