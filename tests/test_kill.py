"""A run that is killed and resumed ends with the bits of one that was not, on the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from timm_robust.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
ARGS = [
    '--dataset', 'digits', '--model', 'resnet18_pssilu', '--model-kwargs', 'width=4', '--eps', '0.1', '--steps', '1',
    '--eval-steps', '1', '--val-size', '30', '--hflip', '0', '--crop-padding', '1', '--batch-size', '100',
    '--epochs', '2', '--model-ema', '--model-ema-decay', '0.9', '--cutmix', '1',
    '--log-interval', '1', '--save-interval', '3', '--experiment', 'run', '--resume', 'auto',
]  # fmt: skip


def start(folder):
    command = [sys.executable, str(ROOT / 'train/adv_train.py'), *ARGS, '--output', str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


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
    different = [key for key, value in undisturbed[0].items() if not torch.equal(tensors[key], value)]
    assert not different


@pytest.mark.parametrize('steps', [(2, 9, 17), (14,)])
def test_sigkill_at_any_step(tmp_path, undisturbed, steps):
    for step in steps:
        process = start(tmp_path)
        for line in process.stderr:
            if f' step {step}/' in line:
                time.sleep(0.05)  # somewhere in the next step, or in a save
                break
        process.kill()
        process.wait()
    process = start(tmp_path)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert 'resumed' in error
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_says_how_to_go_on_and_exits(tmp_path, undisturbed, number):
    process = start(tmp_path)
    for line in process.stderr:
        if ' step 4/' in line:
            break
    process.send_signal(number)
    error = process.stderr.read()
    assert process.wait(60) == 128 + number
    assert '--resume' in error and 'Traceback' not in error
    assert 4 <= load_checkpoint(tmp_path / 'run/last.pth.tar')['step'] <= 6
    process = start(tmp_path)
    process.communicate()
    assert_same_end(tmp_path, undisturbed)


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(tmp_path, undisturbed):
    process = start(tmp_path)
    for line in process.stderr:
        if ' step 16/' in line:
            break
    process.kill()
    process.wait()
    last = tmp_path / 'run/last.pth.tar'
    last.write_bytes(last.read_bytes()[:-1000])
    process = start(tmp_path)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert 'last.pth.tar' in error and 'checkpoint-0.pth.tar at step' in error
    assert_same_end(tmp_path, undisturbed)
