import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import warm
from torch import nn

from timm_robust.activations import pssilu
from timm_robust.evaluation import search_network as search
from timm_robust.evaluation.autoattack import autoattack
from timm_robust.evaluation.batch_store import BatchStore, Found
from timm_robust.evaluation.search_network import search_model
from timm_robust.threat_model import ThreatModel

pyautoattack = pytest.importorskip('pyautoattack')
LINF, L2 = ThreatModel('Linf', 0.02), ThreatModel('L2', 0.3)
LOGITS = torch.tensor([[1.0, -2.0]])
KILLED = """
import os, signal, sys
from short import shorten
from test_batch_store import LINF, BatchStore, autoattack, conv_net, images
save, left = BatchStore.save, int(sys.argv[2])
def save_or_die(*args):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    save(*args)
BatchStore.save = save_or_die
shorten()
model = conv_net()
autoattack(model, *images(model), LINF, batch_size=3, state_dir=sys.argv[1])
"""
PAIR = """
import pathlib, sys, torch
from short import shorten
from test_batch_store import LINF, autoattack, conv_net, images
from timm_robust.distributed import World
shorten()
world, folder, lines = World.join('cpu'), pathlib.Path(sys.argv[1]), []
model = conv_net()
x, y = images(model)
settings = {'batch_size': 5, 'state_dir': folder / 'state', 'progress': lines.append}
result = autoattack(model, x, y, LINF, world=world, **settings)
torch.save({k: getattr(result, k) for k in ('robust', 'x_adv', 'per_attack')}, folder / f'{world.rank}.pt')
batches = [line.split()[2].strip(':') for line in lines if line.startswith('apgd-ce, batch')]
(folder / f'{world.rank}.txt').write_text(' '.join(batches))
world.leave()
"""


def conv_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(128, 10))
    net[1].running_mean.uniform_(-0.2, 0.2)
    net[1].running_var.uniform_(0.5, 2.0)
    return net.eval()


def images(model: nn.Module, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(1).detach()


def same(a, b) -> bool:
    tensors = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ('robust', 'x_adv', 'y_pred_adv', 'clean_correct'))
    return tensors and (a.per_attack, a.warnings, a.rejected) == (b.per_attack, b.warnings, b.rejected)


@pytest.mark.slow
@pytest.mark.parametrize('threat_model', [LINF, L2], ids=str)
def test_the_folded_search_gives_the_librarys_verdicts(threat_model, short_attacks):
    model = conv_net()
    x, y = images(model, 16)
    runner = pyautoattack.AutoAttack(model, norm=threat_model.norm, eps=threat_model.eps, seed=5, version='standard')
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = 9
    _, labels = runner.run_standard_evaluation(x, y, batch_size=7)
    search = search_model(model, x)
    assert search is not None and not any(isinstance(module, nn.BatchNorm2d) for module in search.modules())
    result = autoattack(model, x, y, threat_model, batch_size=7, seed=5, search=search)
    assert 0 < result.robust.sum() < 16 and torch.equal(result.robust, labels == y)
    assert (model(result.x_adv).argmax(1) != y).equal(~result.robust)


def test_what_cannot_be_folded_or_is_not_fp32_is_searched_itself():
    x = torch.rand(4, 3, 8, 8)
    assert search_model(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), x) is None
    assert search_model(conv_net().bfloat16(), x) is None


class Fooled(nn.Module):
    """The model while images are unchanged, other labels elsewhere: every attack on it succeeds at once."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.model, self.x = model, x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = (x[:, None] - self.x[None]).abs().amax((2, 3, 4)).amin(1, keepdim=True) == 0
        logits = self.model(x)
        return torch.where(near, logits, -logits)


def test_finds_that_the_model_does_not_confirm_are_looked_for_on_the_model():
    model = conv_net()
    x, y = images(model)
    plain = autoattack(model, x, y, LINF, version='apgd', batch_size=12)
    misled = autoattack(model, x, y, LINF, version='apgd', batch_size=12, search=Fooled(model, x))
    assert 0 < plain.robust.sum() < 12
    assert (misled.robust <= plain.robust).all() and misled.rejected == 0


@pytest.mark.slow
def test_two_processes_share_the_batches_and_agree_with_one(tmp_path, short_attacks):
    model = conv_net()
    x, y = images(model)
    expected = autoattack(model, x, y, LINF, batch_size=5)
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
    (tmp_path / 'pair.py').write_text(PAIR)
    warm.run_pair([tmp_path / 'pair.py', tmp_path], env=environment).check_returncode()
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert value == getattr(expected, key) if key == 'per_attack' else value.equal(getattr(expected, key)), key
        assert value == second[key] if key == 'per_attack' else value.equal(second[key]), key
    done = [(tmp_path / f'{rank}.txt').read_text().split() for rank in (0, 1)]
    assert done == [['1', '3'], ['2']]  # batches 1, 2 and 3 of APGD-CE, dealt out in turn
    again = autoattack(model, x, y, LINF, batch_size=5, state_dir=tmp_path / 'state')  # read back by one process
    assert same(again, expected)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_verdicts(tmp_path, short_attacks):
    model = conv_net()
    x, y = images(model)
    expected = autoattack(model, x, y, LINF, batch_size=3)
    state = tmp_path / 'state'
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
    for more, saved in ((1, 1), (4, 5)):  # batches, in the first attack and in the second
        assert warm.run(['-c', KILLED, state, more], env=environment).returncode == -signal.SIGKILL
        assert len(list(state.glob('*.npz'))) == saved
    assert same(autoattack(model, x, y, LINF, batch_size=3, state_dir=state), expected)
    files = {file: file.stat().st_mtime_ns for file in state.iterdir()}
    assert same(autoattack(model, x, y, LINF, batch_size=3, state_dir=state), expected)  # read back whole
    assert files == {file: file.stat().st_mtime_ns for file in state.iterdir()}


@pytest.mark.slow
def test_the_whole_attack_goes_on_where_its_first_half_ended_and_counts_its_time(tmp_path, short_attacks):
    model = conv_net()
    x, y = images(model)
    expected = autoattack(model, x, y, LINF, batch_size=5)
    half = autoattack(model, x, y, LINF, version='apgd', batch_size=5, state_dir=tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    whole = autoattack(model, x, y, LINF, batch_size=5, state_dir=tmp_path)
    assert same(whole, expected) and files == {file: file.stat().st_mtime_ns for file in files}
    taken = [float(json.loads(str(np.load(file)['about']))['seconds']) for file in files if file.suffix == '.npz']
    assert half.earlier_s == 0 < whole.earlier_s == pytest.approx(sum(taken))


def test_another_measurements_folder_is_refused(tmp_path):
    model = conv_net()
    x, y = images(model)
    autoattack(model, x, y, LINF, version='apgd', batch_size=12, state_dir=tmp_path)
    for change, what in (({'seed': 1}, 'seed 0, now 1'), ({'batch_size': 6}, 'batch_size 12, now 6')):
        settings = {'version': 'apgd', 'batch_size': 12} | change
        with pytest.raises(ValueError, match=f'another measurement.*{what}.*name another folder'):
            autoattack(model, x, y, LINF, state_dir=tmp_path, **settings)
    with torch.no_grad():
        model[4].bias += 1e-3
    with pytest.raises(ValueError, match='another measurement: weights'):
        autoattack(model, x, y, LINF, version='apgd', batch_size=12, state_dir=tmp_path)


class Shifted(nn.Module):
    """A network with a setting that neither its repr nor its weights show."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.net, self.shift = conv_net(), shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.shift * torch.eye(10)[0]


def test_a_setting_that_weights_and_repr_do_not_show_is_another_measurement_and_rounding_is_none(tmp_path):
    x, y = images(conv_net())
    settings = {'version': 'apgd', 'batch_size': 5, 'state_dir': tmp_path}
    autoattack(Shifted(0.0), x, y, LINF, **settings)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    autoattack(Shifted(1e-6), x, y, LINF, **settings)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}  # read back whole
    with pytest.raises(ValueError, match='another measurement: the model has other logits now'):
        autoattack(Shifted(0.1), x, y, LINF, **settings)
    path = tmp_path / 'identity.json'
    facts = json.loads(path.read_text())
    for logits in (None, 'text', [], [[1.0]]):
        path.write_text(json.dumps(facts | {'logits': logits}))
        with pytest.raises(ValueError, match='other logits'):
            autoattack(Shifted(0.0), x, y, LINF, **settings)
    del facts['logits']
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r'an older version wrote it.*name another folder, or delete it'):
        autoattack(Shifted(0.0), x, y, LINF, **settings)


def test_logits_that_are_nan_are_themselves(tmp_path):
    logits = torch.tensor([[torch.nan, torch.inf, 1.0]])
    BatchStore(tmp_path, {}, logits)
    BatchStore(tmp_path, {}, logits)
    with pytest.raises(ValueError, match='other logits'):
        BatchStore(tmp_path, {}, torch.tensor([[0.0, torch.inf, 1.0]]))


def stored(**changes) -> Found:
    values = {'broken': torch.tensor([1]), 'x_adv': torch.rand(1, 3, 2, 2), 'labels': torch.tensor([7])}
    return Found(**(values | {'rejected': 2, 'messages': ['a warning'], 'seconds': 1.5} | changes))


def test_damaged_files_are_named(tmp_path):
    store, part, found = BatchStore(tmp_path, {'seed': 0}, LOGITS), torch.arange(4), stored()
    store.save('fab-t', 3, part, found)
    back = store.load('fab-t', 3, part, (3, 2, 2))
    assert torch.equal(back.x_adv, found.x_adv)
    assert (back.rejected, back.messages, back.seconds) == (2, ['a warning'], 1.5)
    assert store.load('fab-t', 4, part, (3, 2, 2)) is None
    with pytest.raises(ValueError, match=r'fab-t-00003\.npz is of another measurement'):
        store.load('fab-t', 3, part + 1, (3, 2, 2))
    file = tmp_path / 'fab-t-00003.npz'
    for content in (file.read_bytes()[:-200], b'', b'<html>'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r'fab-t-00003\.npz is damaged'):
            store.load('fab-t', 3, part, (3, 2, 2))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'broken': torch.tensor([4])}, 'not different ones of 0..3'),
        ({'broken': torch.tensor([-1])}, 'not different ones'),
        ({'broken': torch.tensor(1)}, '0-d'),
        ({'broken': torch.tensor([True])}, 'broken is .* not'),
        (
            {'broken': torch.tensor([1, 1]), 'x_adv': torch.rand(2, 3, 2, 2), 'labels': torch.tensor([7, 7])},
            'different',
        ),
        ({'x_adv': torch.rand(1, 3, 2, 3)}, 'x_adv is .* not'),
        ({'x_adv': torch.rand(1, 3, 2, 2).double()}, 'x_adv is .* not'),
        ({'labels': torch.tensor([7, 8])}, 'labels is .* not'),
        ({'rejected': -1}, 'rejected is -1'),
        ({'seconds': float('nan')}, 'seconds is nan'),
        ({'messages': 'text'}, 'messages is no list'),
    ],
)
def test_what_no_attack_can_have_found_is_damage(tmp_path, change, message):
    store, part = BatchStore(tmp_path, {'seed': 0}, LOGITS), torch.arange(4)
    store.save('fab-t', 3, part, stored(**change))
    with pytest.raises(ValueError, match=f'is damaged .*{message}'):
        store.load('fab-t', 3, part, (3, 2, 2))


@pytest.mark.parametrize('text', [None, '{', '[]', '[' * 100_000])
def test_without_a_sound_identity_only_files_of_this_measurement_count(tmp_path, text):
    part = torch.arange(4)
    for seed in (0, 1):
        BatchStore(tmp_path / str(seed), {'seed': seed}, LOGITS).save('fab-t', seed, part, stored())
    shutil.copy(tmp_path / '1/fab-t-00001.npz', tmp_path / '0')
    path = tmp_path / '0/identity.json'
    path.unlink() if text is None else path.write_text(text)
    store = BatchStore(tmp_path / '0', {'seed': 0}, LOGITS)
    assert json.loads(path.read_text()) == {'seed': 0, 'logits': LOGITS.tolist()}
    assert store.load('fab-t', 0, part, (3, 2, 2)).seconds == 1.5
    with pytest.raises(ValueError, match='is of another measurement'):
        store.load('fab-t', 1, part, (3, 2, 2))


def test_forged_finds_are_not_believed_and_damage_is_attacked_again(tmp_path):
    model, lines = conv_net(), []
    x, y = images(model)
    settings = {'version': 'apgd', 'batch_size': 5, 'state_dir': tmp_path, 'progress': lines.append}
    expected = autoattack(model, x, y, LINF, **settings)
    assert expected.robust.sum() > 0
    part, broken = torch.arange(5), (~expected.robust[:5]).nonzero()[:, 0]
    clean, found, y_broken = x[broken], expected.x_adv[broken], y[broken]
    outside = (clean + 1.5 * (found - clean)).clamp(0, 1)  # fools the model from outside the ball
    assert len(broken) and (model(outside).argmax(1) != y_broken).all()
    digest = hashlib.sha256((tmp_path / 'identity.json').read_bytes()).hexdigest()
    for x_adv in (clean, outside, torch.full_like(clean, torch.nan)):
        for labels in (model(x_adv).argmax(1), (y_broken + 1) % 10):
            about = {'rejected': 0, 'messages': [], 'seconds': 0.0, 'measurement': digest}
            arrays = {'images': part, 'broken': broken, 'x_adv': x_adv, 'labels': labels, 'about': json.dumps(about)}
            np.savez(tmp_path / 'apgd-ce-00000.npz', **{key: np.asarray(value) for key, value in arrays.items()})
            lines.clear()
            assert same(autoattack(model, x, y, LINF, **settings), expected)
            assert sum('apgd-ce, batch 1: the model does not confirm' in line for line in lines) == 1
    (tmp_path / 'apgd-ce-00001.npz').write_bytes(b'PK')
    assert same(autoattack(model, x, y, LINF, **settings), expected)
    [line] = [line for line in lines if '00001.npz is damaged' in line]
    assert line.endswith('attacking this batch again')


def test_a_state_that_cannot_be_kept_ends_no_measurement(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError('cannot write: no space left')

    model, lines = conv_net(), []
    x, y = images(model)
    settings = {'version': 'apgd', 'batch_size': 12}
    monkeypatch.setattr(BatchStore, 'save', refuse)
    kept = autoattack(model, x, y, LINF, state_dir=tmp_path, progress=lines.append, **settings)
    assert same(kept, autoattack(model, x, y, LINF, **settings))
    assert 'cannot write: no space left; going on without' in lines


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_a_long_search_runs_on_compiled_kernels_to_the_same_verdicts(monkeypatch):
    monkeypatch.setattr(search, '_WORTH_SECONDS', 0.0)
    torch.manual_seed(0)
    model = timm.create_model('resnet18_pssilu', width=8).eval()
    with torch.no_grad():
        model.act.alpha.fill_(1.7)
    x = torch.rand(8, 3, 32, 32)
    y, kernels = model(x).argmax(1), pssilu
    plain, fast = search_model(model, x), search_model(model, x, len(x))
    calls = []
    fast.kernels = tuple(lambda *a, f=f: calls.append(1) or f(*a) for f in fast.kernels)
    assert plain.kernels is None and kernels._kernels is None
    results = [
        autoattack(model, x, y, ThreatModel('Linf', 0.002), version='apgd', batch_size=8, search=net)
        for net in (plain, fast)
    ]
    assert len(calls) > 100 and kernels._kernels is None  # in the search alone
    assert 0 < results[0].robust.sum() < 8 and results[0].robust.equal(results[1].robust)


def test_a_search_without_a_compiler_is_eager(monkeypatch):
    """Here PyTorch cannot reach the device; elsewhere its compiler may be missing."""
    monkeypatch.setattr(search, 'compiled_kernels', lambda device: refuse(device))
    asked = []

    def refuse(device):
        asked.append(device)
        raise RuntimeError(f'cannot compile for {device!r}')

    model = timm.create_model('resnet18_pssilu', width=2)
    assert [search._kernels(model, torch.device(device)) for device in ('cpu', 'cuda:0', 'meta')] == [None] * 3
    assert search._kernels(conv_net(), torch.device('cuda')) is None and asked == ['cpu', 'cuda']
