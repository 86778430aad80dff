import logging
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from timm_robust.evaluation import autoattack as door
from timm_robust.evaluation import runner as autoattack_runner
from timm_robust.evaluation.autoattack import autoattack, predict, undisturbed
from timm_robust.precision import ieee_fp32
from timm_robust.threat_model import ThreatModel

pyautoattack = pytest.importorskip('pyautoattack')
LINF, L2 = ThreatModel('Linf', 0.02), ThreatModel('L2', 0.3)


def conv_net(num_classes: int = 10) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(128, num_classes)]
    return nn.Sequential(*layers).eval()


def linear_net(num_classes: int = 10) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def images(model: nn.Module, n: int = 16, lo: float = 0.0, hi: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    x = lo + (hi - lo) * torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(1).detach()


def upstream(model, x, y, threat_model, batch_size, seed, attacks=None):
    version = {'version': 'custom', 'attacks': attacks} if attacks else {'version': 'standard'}
    runner = pyautoattack.AutoAttack(model, norm=threat_model.norm, eps=threat_model.eps, seed=seed, **version)
    runner.apgd.n_restarts, runner.apgd_targeted.n_target_classes = 1, 9
    x_adv, labels = runner.run_standard_evaluation(x, y, batch_size=batch_size)
    return labels == y, x_adv


@pytest.mark.slow
@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_standard_is_the_library_bit_for_bit(threat_model, short_attacks):
    model = conv_net()
    x, y = images(model)
    y[0] = (y[0] + 1) % 10
    robust, x_adv = upstream(model, x, y, threat_model, batch_size=7, seed=5)
    result = autoattack(model, x, y, threat_model, batch_size=7, seed=5)
    assert 0 < robust.sum() < 15
    assert torch.equal(result.robust, robust)
    assert torch.equal(result.x_adv, x_adv)
    assert not result.robust[0] and not result.clean_correct[0] and result.clean_correct[1:].all()
    assert torch.equal(result.y_pred_adv == y, result.robust)
    assert threat_model.contains(result.x_adv, x).all()
    assert list(result.per_attack) == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    assert result.per_attack['square'] == result.robust.float().mean().item()
    assert result.rejected == 0


def test_steps_restarts_and_queries_are_the_librarys():
    model = conv_net()
    runner = autoattack_runner.Runner(model, images(model)[0], LINF, 7, 0, autoattack_runner.Report(None)).runner
    own = pyautoattack.AutoAttack(model, norm='Linf', eps=LINF.eps, version='standard')
    for attack, steps in (('apgd', 100), ('apgd_targeted', 100), ('fab', 100)):
        ours, theirs = getattr(runner, attack), getattr(own, attack)
        assert (ours.n_iter, ours.n_restarts) == (theirs.n_iter, theirs.n_restarts) == (steps, 1)
    assert runner.square.n_queries == own.square.n_queries == 5000


def test_square_draws_the_same_positions_and_keeps_them_on_the_cpu():
    model = conv_net()
    report = autoattack_runner.Report(None)
    square = autoattack_runner.Runner(model, images(model)[0], LINF, 7, 0, report).runner.square
    torch.manual_seed(0)
    theirs = [type(square).random_int(square, 1, high) for high in range(2, 40)]
    torch.manual_seed(0)
    square.device = 'meta'
    assert type(square).random_int(square).is_meta  # what it does by itself
    torch.manual_seed(0)
    assert [square.random_int(1, high) for high in range(2, 40)] == theirs


@pytest.mark.slow
@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_apgd_is_the_first_half_of_standard(threat_model, short_attacks):
    model = conv_net()
    x, y = images(model)
    robust, x_adv = upstream(model, x, y, threat_model, batch_size=7, seed=5, attacks=['apgd-ce', 'apgd-t'])
    result = autoattack(model, x, y, threat_model, version='apgd', batch_size=7, seed=5)
    standard = autoattack(model, x, y, threat_model, batch_size=7, seed=5)
    assert torch.equal(result.robust, robust) and torch.equal(result.x_adv, x_adv)
    assert result.per_attack == {name: standard.per_attack[name] for name in ('apgd-ce', 'apgd-t')}
    assert (standard.robust <= result.robust).all()


def tf32_allowed():
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision != 'ieee' if hasattr(cudnn, 'conv') else cudnn.allow_tf32


def test_verdicts_are_in_fp32_and_searching_as_the_user_has_it():
    seen, model = [], linear_net()
    x, y = images(model)
    model.register_forward_pre_hook(lambda module, args: seen.append((tf32_allowed(), torch.is_grad_enabled())))
    predict(model, x, 250)
    assert seen == [(False, False)] and tf32_allowed()
    seen.clear()
    autoattack(model, x, y, ThreatModel('Linf', 0.05), version='apgd')
    assert (True, True) in seen and tf32_allowed()


@pytest.mark.parametrize('everywhere', ['ieee', 'tf32', 'none'])
def test_verdicts_are_in_fp32_whatever_the_user_set(everywhere):
    model = linear_net()
    x, _ = images(model)
    before, seen = torch.backends.fp32_precision, []
    model.register_forward_pre_hook(lambda module, args: seen.append(torch.backends.cudnn.conv.fp32_precision))
    try:
        torch.backends.fp32_precision = everywhere
        predict(model, x, 250)
    finally:
        torch.backends.fp32_precision = before
        torch.backends.cudnn.allow_tf32 = True  # sets both operators, as they were
    assert seen == ['ieee']


@pytest.mark.parametrize('asked', ['highest', 'high', 'medium'])
def test_matrix_products_of_verdicts_are_in_fp32_and_the_users_setting_comes_back(asked):
    model, seen = linear_net(), []
    before = torch.get_float32_matmul_precision()
    model.register_forward_pre_hook(lambda module, args: seen.append(torch.get_float32_matmul_precision()))
    try:
        torch.set_float32_matmul_precision(asked)
        predict(model, images(model)[0], 250)
        seen.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[-2:] == ['highest', asked]


def test_logits_that_are_nan_are_no_label():
    logits = torch.tensor([[torch.nan, 1.0], [2.0, torch.nan], [2.0, 1.0]])
    assert predict(nn.Identity(), logits, 2).tolist() == [-1, -1, 0]


def test_the_older_flag_may_be_read_and_set_meanwhile():
    before = torch.backends.cudnn.allow_tf32
    with ieee_fp32(), torch.backends.cudnn.flags(enabled=False):
        pass  # as a model may in its forward pass
    assert torch.backends.cudnn.allow_tf32 == before and tf32_allowed() == before


def test_no_ball_and_nothing_left_need_no_attack():
    model = conv_net()
    x, y = images(model)
    y[:4] = (y[:4] + 1) % 10
    same = autoattack(model, x, y, ThreatModel('Linf', 0))
    assert torch.equal(same.robust, same.clean_correct) and torch.equal(same.x_adv, x)
    assert same.per_attack['square'] == 0.75
    none = autoattack(model, x, (model(x).argmax(1) + 1) % 10, LINF, version='apgd')
    assert none.per_attack == {'apgd-ce': 0.0, 'apgd-t': 0.0}


@pytest.mark.parametrize('cut', ['detach', 'round'])
def test_a_hidden_gradient_is_warned_of_and_square_sees_through_it(cut):
    class Masked(nn.Module):
        def forward(self, x):
            return x.detach() if cut == 'detach' else (x * 255).round() / 255

    plain = conv_net()
    model = nn.Sequential(Masked(), plain)
    x, y = images(model)
    result = autoattack(model, x, y, LINF)
    assert result.per_attack['square'] < result.per_attack['apgd-t']
    assert [text for text in result.warnings if 'zero gradient' in text and 'times)' in text]
    assert [text for text in result.warnings if 'Square Attack has decreased' in text]
    assert len(result.warnings) == 2


def test_upstreams_other_warnings_are_kept_and_not_printed(capsys, caplog):
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    x, y = images(conv_net())
    for last, word in ((nn.Softmax(1), 'probability distribution'), (Noise(), 'randomized defense')):
        model = nn.Sequential(conv_net(), last)
        result = autoattack(model, x, y, LINF, version='apgd')
        assert [text for text in result.warnings if word in text]
    assert capsys.readouterr() == ('', '') and not caplog.records


def test_a_compiled_model_is_not_called_dynamic():
    model = conv_net()
    x, y = images(model)
    plain = autoattack(model, x, y, LINF, version='apgd', batch_size=10)
    compiled = torch.compile(model, backend='aot_eager')
    result = autoattack(compiled, x, y, LINF, version='apgd', batch_size=10)
    assert result.warnings == [] and torch.equal(result.robust, plain.robust)
    funcs = pyautoattack.checks.funcs
    funcs['grad'] = 3  # what a model checked before leaves behind
    assert autoattack(model, x, y, LINF, version='apgd').warnings == []
    assert set(funcs.values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_layouts_and_precisions(threat_model, short_attacks):
    x, y = images(conv_net())
    last = conv_net().to(memory_format=torch.channels_last)
    result = autoattack(last, x.contiguous(memory_format=torch.channels_last), y, threat_model)
    plain = autoattack(conv_net(), x, y, threat_model)
    assert (result.robust != plain.robust).sum() <= 1
    half = autoattack(conv_net().bfloat16(), x.double(), y, threat_model)
    assert half.x_adv.dtype == torch.float32 and half.x_adv.is_contiguous()
    assert (half.robust != plain.robust).sum() <= 2


def random_numbers():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def tracer(frame, event, arg):
    return None


@pytest.mark.parametrize('interrupted', [False, True])
def test_everything_is_left_as_it_was(interrupted):
    class Interrupt(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if interrupted and self.calls > 30:
                raise KeyboardInterrupt
            return x

    model = nn.Sequential(Interrupt(), conv_net())
    x, y = images(model)
    model.train()
    model[1][1].eval()
    model[1][0].weight.requires_grad_(False)
    model[1][0].bias.grad = grad = torch.ones(8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    numbers, before, level = random_numbers(), sys.gettrace(), logging.getLogger('auto-attack').level
    sys.settrace(tracer)
    try:
        autoattack(model, x, y, LINF, version='apgd', progress=None)
        assert not interrupted
    except KeyboardInterrupt:
        assert interrupted
    finally:
        trace = sys.gettrace()
        sys.settrace(before)
    assert trace is tracer
    assert random_numbers() == numbers
    assert modes == [module.training for module in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    assert [p.grad is not None for p in model.parameters()] == [False, True, False, False, False, False]
    assert model[1][0].bias.grad is grad and grad.eq(1).all()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert logging.getLogger('auto-attack').level == level


def test_undisturbed_freezes_inside():
    model = conv_net().train()
    with undisturbed(model):
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.parametrize('fault', ['outside the ball', 'nan', 'label unchanged', 'outside the bounds'])
def test_false_claims_are_rejected(monkeypatch, fault):
    model = linear_net()
    x, y = images(model)
    far = (1 - x).clamp(0, 1)
    assert (model(far).argmax(1) != y).any()
    lies = {'outside the ball': far, 'nan': torch.full_like(x, torch.nan), 'label unchanged': x.clone()}
    lie = lies.get(fault, x - 10.0)
    monkeypatch.setattr(door.Runner, 'run', lambda self, attack, x, y: (lie, torch.ones(len(x), dtype=torch.bool)))
    result = autoattack(model, x, y, LINF, version='apgd')
    assert result.robust.all() and result.rejected == 2 * len(x)
    assert torch.equal(result.x_adv, x) and torch.equal(result.y_pred_adv, y)


def test_a_rejected_image_meets_the_next_attack(monkeypatch):
    model = conv_net()
    x, y = images(model)
    honest = door.Runner.run

    def run(self, attack, x, y):
        claims, claimed = honest(self, attack, x, y)
        return (x, torch.ones_like(claimed)) if attack == 'apgd-ce' else (claims, claimed)

    monkeypatch.setattr(door.Runner, 'run', run)
    result = autoattack(model, x, y, LINF, version='apgd')
    assert result.per_attack['apgd-ce'] == 1 > result.per_attack['apgd-t']
    assert result.rejected == len(x)


class WrongInTF32(nn.Module):
    """Another class for every image, wherever TF32 is allowed."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        logits = self.net(x)
        return logits.roll(1, dims=1) if tf32_allowed() else logits


@pytest.mark.parametrize('searched', [False, True])
def test_what_tf32_alone_gets_wrong_is_attacked_in_fp32(searched):
    assert tf32_allowed()
    model = WrongInTF32()
    x, y = images(model.net)
    result = autoattack(model, x, y, LINF, version='apgd', search=model if searched else None)
    truth = autoattack(model.net, x, y, LINF, version='apgd')
    assert result.clean_correct.all() and result.searched == searched
    assert not truth.robust.all() and torch.equal(result.robust, truth.robust)


@pytest.mark.parametrize('num_classes', [2, 3, 5])
def test_few_classes_are_attacked_and_said_so(num_classes, short_attacks):
    model = linear_net(num_classes)
    x, y = images(model)
    result = autoattack(model, x, y, ThreatModel('Linf', 0.05))
    assert not result.robust.all()
    assert f'{num_classes} classes: {num_classes - 1} target classes instead of 9' in result.warnings
    assert list(result.per_attack) == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    assert any('apgd-t climbs' in text for text in result.warnings) == (num_classes < 4)
    assert not any('not possible to use' in text for text in result.warnings)  # upstream's, of the loss replaced


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('num_classes', [2, 3])
def test_apgd_t_breaks_what_is_breakable_where_cross_entropy_of_few_classes_underflows(num_classes, norm):
    model = linear_net(num_classes).requires_grad_(False)
    for value in model.parameters():
        value *= 1e5
    x, y = images(model, n=40, lo=0.45, hi=0.55)
    weight, rows = model[1].weight, torch.arange(len(x))
    gaps = model(x)[rows, y][:, None] - model(x)
    slopes = (weight[y][:, None] - weight).norm(p=1 if norm == 'Linf' else 2, dim=2)
    gaps[rows, y] = torch.inf
    radius = (gaps / slopes).amin(1)  # the exact minimal one, as no pixel comes near 0 or 1
    eps = radius.median().item()
    result = autoattack(model, x, y, ThreatModel(norm, eps), version='apgd')
    assert result.per_attack['apgd-ce'] > 0.8
    clear = (radius / eps - 1).abs() > 0.02
    assert clear.sum() > 30 and torch.equal(result.robust[clear], (radius > eps)[clear])


def test_progress_reports_batches_and_time_left(monkeypatch):
    monkeypatch.setattr(autoattack_runner, '_REPORT_EVERY_S', 0.0)
    model, lines = conv_net(), []
    x, y = images(model)
    autoattack(model, x, y, LINF, version='apgd', batch_size=10, progress=lines.append)
    assert [line for line in lines if line.startswith('apgd-ce, batch 1: ')]
    assert [line for line in lines if line.startswith('apgd-t: ') and line.endswith('min left in all')]
    assert [line for line in lines if line.endswith('% of 16 images still robust')]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'version': 'plus'}, 'allowed: standard, apgd'),
        ({'x': torch.full((2, 3, 8, 8), 2.0)}, 'divide 8-bit images by 255'),
        ({'x': torch.zeros(0, 3, 8, 8), 'y': torch.zeros(0, dtype=torch.long)}, 'no images'),
        ({'y': torch.tensor([1, 10])}, 'labels must lie in 0..9'),
        ({'y': torch.tensor([1])}, 'labels must be whole numbers'),
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'threat_model': ThreatModel('Linf', 0.1, (-1.0, 1.0))}, r'write bounds=\(0.0, 1.0\)'),
        ({'x': torch.zeros(2, 3, 4, 8), 'threat_model': L2}, "4 x 8 pixels; write version='apgd'"),
        ({'x': torch.zeros(2, 3, 12, 12), 'threat_model': L2}, r'--attack apgd\)'),
        ({'model': linear_net(1)}, 'at least 2 classes'),
    ],
)
def test_wrong_input_is_refused(change, message):
    given = {'model': conv_net(), 'x': torch.zeros(2, 3, 8, 8), 'y': torch.tensor([0, 0]), 'threat_model': LINF}
    given |= change
    with pytest.raises(ValueError, match=message):
        autoattack(given.pop('model'), given.pop('x'), given.pop('y'), given.pop('threat_model'), **given)


def test_square_l2_is_refused_at_just_the_sizes_at_which_it_fails():
    logits = torch.tensor([[1.0, 0.0]])

    def works(size):
        square = pyautoattack.square.SquareAttack(lambda x: logits.expand(len(x), 2).clone(), 'L2', 1, 0.3, seed=0)
        try:
            square.perturb(torch.rand(1, 1, *size), torch.tensor([0]))
        except (RuntimeError, ZeroDivisionError):
            return False
        return True

    sizes = [(side, side) for side in range(1, 34)]
    sizes += [(32, 30), (64, 48), (32, 40), (30, 32), (48, 64), (7, 3), (96, 96)]
    assert [works(size) for size in sizes] == [door._tiles(*size) for size in sizes]
    assert not door._tiles(24, 24) and door._tiles(32, 32) and door._tiles(224, 224)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    with pytest.raises(ImportError, match="type: pip install 'pyautoattack"):
        autoattack(conv_net(), torch.zeros(1, 3, 8, 8), torch.tensor([0]), LINF)


@pytest.mark.parametrize('threat_model', [ThreatModel('Linf', 8 / 255), ThreatModel('L2', 0.5)], ids=str)
def test_what_lies_a_thousandth_outside_counts_for_nothing(threat_model):
    x = torch.full((1, 3, 8, 8), 0.5)
    away = torch.ones_like(x) if threat_model.norm == 'Linf' else torch.ones_like(x) / x.numel() ** 0.5
    always_wrong = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(always_wrong[1].weight)
    always_wrong[1].bias.data = torch.tensor([0.0, 1.0])
    for far, inside in ((1.0, True), (1.001, False)):
        x_adv = x + far * threat_model.eps * away
        assert door.recheck(always_wrong, x_adv, x, torch.tensor([0]), threat_model)[2].item() == inside
