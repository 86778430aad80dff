"""A run that is killed and resumed ends with the bits of one that was not, on the CPU."""

import os
import signal
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
import warm
from tiny_runs import Killed, assert_same

from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.training import loop as engine
from timm_robust.training.builder import build
from timm_robust.training.loop import fit
from timm_robust.training.recipe import Recipe
from timm_robust.training.writer import Writer

ROOT = Path(__file__).parents[1]
ARGS = [
    '--dataset', 'digits', '--model', 'resnet18_pssilu', '--model-kwargs', 'width=4', '--eps', '0.1', '--steps', '1',
    '--eval-steps', '1', '--val-size', '30', '--hflip', '0', '--crop-padding', '1', '--batch-size', '100',
    '--epochs', '2', '--model-ema', '--model-ema-decay', '0.9', '--cutmix', '1',
    '--log-interval', '1', '--save-interval', '3', '--experiment', 'run', '--resume', 'auto',
]  # fmt: skip


def start(folder):
    return warm.Popen([ROOT / 'train/adv_train.py', *ARGS, '--output', folder], stderr=PIPE)


def final(folder):
    state = load_checkpoint(folder / 'run/last.pth.tar')
    losses = [row['train_loss'] for row in state['history']]
    tensors = {f'{part}.{k}': v for part in ('state_dict', 'state_dict_ema') for k, v in state[part].items()}
    momenta = {f'momentum.{i}': s['momentum_buffer'] for i, s in state['optimizer']['state'].items()}
    return {**tensors, **momenta}, losses, state['step']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    process = start(folder)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return final(folder)


def assert_same_end(folder, undisturbed):
    tensors, losses, step = final(folder)
    assert step == undisturbed[2] and losses == undisturbed[1]
    assert_same(tensors, undisturbed[0])


@pytest.mark.slow
def test_sigkill_at_any_step_and_a_checkpoint_cut_off(tmp_path, undisturbed):
    for step in (2, 9, 14, 17):
        process = start(tmp_path)
        warm.wait_for_line(process, f' step {step}/')
        time.sleep(0.05)  # somewhere in the next step, or in a save
        process.kill()
        process.wait()
    last = tmp_path / 'run/last.pth.tar'
    raw, newest = last.read_bytes(), max(path.name for path in last.parent.glob('checkpoint-*'))
    last.unlink()  # it may be a second name of another checkpoint
    last.write_bytes(raw[:-1000])
    process = start(tmp_path)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert 'last.pth.tar' in error and f'{newest} at step' in error
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_polite_signal_saves_says_how_to_go_on_and_exits(tmp_path, undisturbed):
    process = start(tmp_path)
    warm.wait_for_line(process, ' step 4/')
    process.send_signal(signal.SIGTERM)
    error = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert '--resume' in error and 'Traceback' not in error
    step = load_checkpoint(tmp_path / 'run/last.pth.tar')['step']
    assert step >= 4 and f'stopped by a signal at step {step}' in error and f' step {step + 1}/' not in error
    process = start(tmp_path)
    process.communicate()
    assert_same_end(tmp_path, undisturbed)


class Kill:
    """Ends the life of a process before its n-th change of the names in its folder: from then on it changes nothing."""

    def __init__(self, patch, at=None):
        self.at, self.count = at, 0
        for name in ('replace', 'link', 'unlink', 'rmdir', 'rename'):
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, change):
        def changed(*args, **kwargs):
            if self.at is not None and self.count >= self.at:
                raise Killed
            if change.__name__ != 'unlink' or os.path.lexists(args[0]):
                self.count += 1
            return change(*args, **kwargs)

        return changed


def short_run(folder, monkeypatch):
    """Three epochs of one step; the best is the second."""
    found = {1: 0.3, 2: 0.5, 3: 0.4}
    validation = lambda run, data: {'val_clean_acc': 0.9, 'val_pgd_acc': found[run.step]}  # noqa: E731
    monkeypatch.setattr(engine, 'validate', validation)
    start = Writer.start
    monkeypatch.setattr(Writer, 'start', lambda self, work: (start(self, work), self.wait()))  # always the same order
    settings = {'model': 'test_resnet', 'val_size': 1400, 'batch_size': 30, 'epochs': 3, 'ema_bn_batches': 0}
    settings |= {'dataset': 'digits', 'eps': 0.1, 'steps': 1, 'model_ema': True}
    return Recipe(**settings, output=str(folder), experiment='run', resume='auto')


def everything(folder):
    """Each checkpoint's epoch, metric, weights and momenta."""
    found = {}
    for path in sorted((folder / 'run').glob('*.pth.tar')):
        state = load_checkpoint(path)
        tensors = [*state['state_dict'].values(), *state['state_dict_ema'].values()]
        tensors += [part['momentum_buffer'] for part in state['optimizer']['state'].values()]
        rows = [(row['step'], row['train_loss'], row['val_pgd_acc']) for row in state['history']]
        found[path.name] = state['epoch'], state['best'], rows, torch.cat([t.double().flatten() for t in tensors])
    return found


@pytest.mark.slow
def test_a_kill_before_any_rename_link_or_deletion_loses_nothing(tmp_path, monkeypatch):
    recipe = short_run(tmp_path / 'whole', monkeypatch)
    with monkeypatch.context() as patch:
        changes = Kill(patch)
        fit(build(recipe))
    expected = everything(tmp_path / 'whole')
    assert expected['model_best.pth.tar'][0] == 1 and len(expected) == 4 and changes.count > 15
    for number in range(changes.count):
        folder = tmp_path / str(number)
        recipe = short_run(folder, monkeypatch)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Kill(patch, number)
            fit(build(recipe))
        fit(build(recipe))
        found = everything(folder)
        assert found.keys() - expected.keys() <= {'checkpoint-0.pth.tar'}, number  # killed before the last deletion
        for name, (*numbers, tensors) in expected.items():
            assert list(found[name][:3]) == numbers and torch.equal(found[name][3], tensors), (number, name)
        assert not list((folder / 'run').glob('.*')), number
