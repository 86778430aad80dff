import pytest
import torch

from timm_robust.threat_model import ThreatModel, check_images, check_step_size, parse_eps, resolved_step_size

MODELS = [ThreatModel('Linf', 8 / 255), ThreatModel('L2', 0.5), ThreatModel('Linf', 0.0), ThreatModel('L2', 128 / 255)]
ids = [str(m) for m in MODELS]


@pytest.fixture
def x():
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0], images[1] = 0.0, 1.0  # corners of the box, where projections meet
    return images


@pytest.mark.parametrize('threat_model', MODELS, ids=ids)
def test_random_start_is_allowed_and_random(threat_model, x):
    start = threat_model.random_start(x)
    assert threat_model.contains(start, x).all()
    assert threat_model.eps == 0 or not torch.equal(start, threat_model.random_start(x))


def test_random_start_fills_the_ball():
    x = torch.full((4000, 1, 2, 2), 0.5)
    linf = ThreatModel('Linf', 0.1).random_start(x) - x
    assert linf.abs().max() > 0.0999 and abs(linf.mean()) < 0.002
    radius = (ThreatModel('L2', 0.1).random_start(x) - x).flatten(1).norm(dim=1) / 0.1
    # uniform in a 4-dimensional ball: P(radius < r) = r^4
    for r in (0.5, 0.8, 0.9):
        assert abs((radius < r).float().mean() - r**4) < 0.03


@pytest.mark.parametrize('threat_model', MODELS, ids=ids)
def test_projection_is_allowed_idempotent_and_keeps_what_is_allowed(threat_model, x):
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    once = threat_model.project(far, x)
    assert threat_model.contains(once, x).all()
    torch.testing.assert_close(threat_model.project(once, x), once)
    torch.testing.assert_close(threat_model.project(x, x), x)


def test_linf_projects_to_the_nearest_allowed_point_l2_where_no_pixel_is_clipped():
    x, far = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2), torch.tensor([-0.4, 0.8]).view(1, 1, 1, 2)
    linf = ThreatModel('Linf', 0.25).project(far, x)
    torch.testing.assert_close(linf.flatten(), torch.tensor([0.0, 0.75]))  # nearest in each coordinate
    l2 = ThreatModel('L2', 0.25).project(far, x)  # half of (-0.4, 0.3), then clipped; the nearest is (0, 0.75)
    torch.testing.assert_close(l2.flatten(), torch.tensor([0.0, 0.65]))


def test_l2_norms_of_large_images_are_exact_to_rounding():
    x = torch.full((1, 3, 224, 224), 0.5)
    far, ball = x + 0.0137, ThreatModel('L2', 3)
    length = (far - x).double().square().sum().sqrt().item()
    assert ball.distance(far, x).item() == pytest.approx(length, rel=1e-6)
    near = (ball.project(far, x) - x).double().square().sum().sqrt().item()
    assert near == pytest.approx(3, rel=3e-6)  # pixels near 0.5 are rounded by 3e-8 of 0.008


@pytest.mark.parametrize('steps', [1, 2, 10])
def test_the_default_step_of_pgd_may_be_given_too(steps):
    step = resolved_step_size(None, 8 / 255, steps, 'step_size')
    check_step_size(step, 8 / 255, 'step_size')
    assert step == pytest.approx(8 / 255 * {1: 2, 2: 1.25, 10: 0.25}[steps])
    assert resolved_step_size('2/255', 8 / 255, steps, 'step_size') == 2 / 255


def test_step_lengths():
    x, grad = torch.full((2, 3, 4, 4), 0.5), torch.randn(2, 3, 4, 4)
    grad[1] = 0
    linf = ThreatModel('Linf').step(x, grad, 0.01)
    torch.testing.assert_close(linf - x, 0.01 * grad.sign())
    l2 = ThreatModel('L2').step(x, grad, 0.01)
    torch.testing.assert_close((l2 - x)[0].norm(), torch.tensor(0.01))
    assert torch.equal(l2[1], x[1])


@pytest.mark.parametrize(('text', 'value'), [('8/255', 8 / 255), ('0.5', 0.5), (0.25, 0.25), ('1e-2', 0.01), (0, 0.0)])
def test_parse_eps(text, value):
    assert parse_eps(text) == pytest.approx(value)


@pytest.mark.parametrize('bad', ['eight', '8/0', '8/', -0.1, float('nan'), float('inf'), None, '8/255/2'])
def test_parse_eps_refuses(bad):
    with pytest.raises(ValueError, match=r'8/255'):
        parse_eps(bad)


@pytest.mark.parametrize('eps', [8, '8', 1.5])
def test_linf_eps_on_the_wrong_scale_says_what_to_type(eps):
    with pytest.raises(ValueError, match=rf"pixels lie in \[0, 1\] here.*write '{eps}/255'"):
        ThreatModel('Linf', eps)


def test_unknown_norm_and_empty_bounds():
    with pytest.raises(ValueError, match='allowed: Linf, L2'):
        ThreatModel('linf')
    with pytest.raises(ValueError, match='empty'):
        ThreatModel(bounds=(1.0, 0.0))


def test_names():
    assert str(ThreatModel('Linf', 8 / 255)) == 'Linf 8/255'
    assert str(ThreatModel('Linf', '0.5/255')) == 'Linf 0.5/255'
    assert str(ThreatModel('L2', 0.5)) == 'L2 0.5'
    assert str(ThreatModel('Linf', 0.031)) == 'Linf 0.031'
    assert str(ThreatModel('L2', '128/255')) == 'L2 128/255'


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('eps', [0.0, 8 / 255, 0.5, 128 / 255, 0.0123456789, 1 / 3, 0.1 + 0.2])
def test_the_text_is_read_back_as_the_same_radius(norm, eps):
    assert parse_eps(ThreatModel(norm, eps).eps_text) == eps


ONE = torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize(
    ('x', 'y', 'match'),
    [
        (torch.rand(3, 8, 8), ONE, r'\[B, C, H, W\]'),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ONE, r'x\.float\(\) / 255'),
        (torch.rand(1, 3, 8, 8) * 255, ONE, r'divide 8-bit images by 255'),
        (torch.rand(1, 3, 8, 8) - 0.5, ONE, r'\[0, 1\]'),
        (torch.full((1, 3, 8, 8), float('nan')), ONE, r'\[0, 1\]'),
        (torch.rand(2, 3, 8, 8), ONE, 'labels'),
        (torch.rand(2, 3, 8, 8), torch.zeros(2), 'whole numbers'),
        (torch.rand(2, 3, 8, 8), torch.tensor([0, 10]), r'0\.\.9'),
    ],
)
def test_check_images_refuses(x, y, match):
    with pytest.raises(ValueError, match=match):
        check_images(x, y, num_classes=10)


@pytest.mark.parametrize('threat_model', MODELS[:2], ids=str)
def test_what_lies_a_thousandth_outside_is_not_contained(threat_model):
    x = torch.full((1, 3, 8, 8), 0.5)
    away = torch.ones_like(x) if threat_model.norm == 'Linf' else torch.ones_like(x) / x.numel() ** 0.5
    for far, inside in ((1.0, True), (1.001, False)):
        assert threat_model.contains(x + far * threat_model.eps * away, x).item() == inside
