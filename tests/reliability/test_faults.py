"""Disks that fill up, go read-only or lose files, processes that die, activations that blow up, tokens that leak."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from tiny_runs import tap_batches, tiny, weights

from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.training.builder import build
from timm_robust.training.loop import fit
from timm_robust.training.watchdog import Diverged

ROOT = Path(__file__).parents[2]
ARGS = [
    '--dataset', 'digits', '--model', 'resnet18_pssilu', '--model-kwargs', 'width=4', '--eps', '0.1', '--steps', '1',
    '--eval-steps', '1', '--val-size', '30', '--hflip', '0', '--batch-size', '100', '--experiment', 'run',
    '--log-interval', '1', '--device', 'cpu',
]  # fmt: skip
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
NAMESPACE = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c']
DISK = """
import contextlib, gc, io, os, shutil, subprocess, sys
from pathlib import Path
from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.train import main

disk, *args = sys.argv[1:]
last, fill = Path(disk, 'run/last.pth.tar'), Path(disk, 'fill')

def train(steps):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = main([*args, '--output', disk, '--max-steps', str(steps), '--resume', 'auto', '--allow-changes'])
    gc.collect()  # the lock of the run, or the disk stays writable
    return code, error.getvalue()

def remount(how):
    subprocess.run(['mount', '-o', f'remount,{how}', disk], check=True)

def fill_up():
    fill.write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))

assert train(4)[0] == 0
for steps, fault, text, mend in (
    (8, fill_up, 'bytes', fill.unlink),
    (12, lambda: remount('ro'), 'Read-only file system', lambda: remount('rw')),
):
    before, names = last.read_bytes(), sorted(os.listdir(last.parent))
    fault()
    code, error = train(steps)
    print(error)
    line = error.strip().splitlines()[-1]
    assert code == 2 and 'Traceback' not in error and line.startswith('error: ') and disk in line and text in line
    assert last.read_bytes() == before
    assert sorted(os.listdir(last.parent)) == names
    mend()
    assert train(steps)[0] == 0 and load_checkpoint(last)['step'] == steps
print('survived')
"""


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_costs_nothing_that_was_saved(tmp_path):
    mount = f'mount -t tmpfs -o size=16m tmpfs {tmp_path}'
    if not shutil.which('unshare') or subprocess.run([*NAMESPACE, mount], capture_output=True).returncode:
        pytest.skip('needs a mount namespace of its own')
    command = [*NAMESPACE, f'{mount} && exec "$0" -c "$@"', sys.executable, DISK, str(tmp_path), *ARGS]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.stdout.endswith('survived\n'), run.stdout + run.stderr


def test_a_folder_that_vanishes_is_made_anew(tmp_path, caplog):
    run = build(tiny(tmp_path))

    def vanish(batches, number):
        if number == batches.steps_per_epoch + 1:
            run.writer.wait()
            shutil.rmtree(tmp_path / 'run')
        return batches[number]

    tap_batches(run, vanish)
    with caplog.at_level('WARNING', 'timm_robust'):
        line = fit(run)
    assert 'has vanished; it is made anew' in caplog.text and line['steps'] == run.total_steps
    assert {'args.yaml', 'last.pth.tar', 'summary.csv'} <= set(os.listdir(tmp_path / 'run'))
    assert len((tmp_path / 'run/summary.csv').read_text().splitlines()) == 4  # the first epoch's row too


@pytest.mark.slow
def test_when_one_of_two_processes_dies_the_other_ends_and_nothing_is_half_written(tmp_path):
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += [str(ROOT / 'train/adv_train.py'), *ARGS, '--output', str(tmp_path), '--epochs', '500']
    command += ['--save-interval', '1', '--resume', 'auto']
    process = warm.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
    warm.wait_for_line(process, ' step 3/')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    if not children.is_file():
        process.kill()
        pytest.skip('needs /proc/PID/task/PID/children')
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    rest = process.communicate(timeout=300)[1]  # a process that nobody ends waits for the other for half an hour
    assert process.returncode != 0 and 'Signal 9 (SIGKILL)' in rest
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] >= 2 and not list((tmp_path / 'run').glob('.*'))
    steps = ['--max-steps', str(state['step'] + 1), '--allow-changes']
    again = warm.run([*command, *steps], env=ENVIRONMENT)
    assert again.returncode == 0 and f'at step {state["step"]} of' in again.stderr, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('act', 'name', 'value'),
    [
        ('psoftplus', 'alpha', 0.0),  # log(2) / 0
        ('pssilu', 'beta', 1.0),  # x (s - 1) / 0
        ('pssilu', 'alpha', float('inf')),
        ('smoothrelu', 'alpha', float('nan')),
    ],
)
@pytest.mark.parametrize('remedy', ['rollback', 'stop'])
def test_an_activation_that_blows_up_is_never_saved(tmp_path, act, name, value, remedy):
    run, hit = build(tiny(tmp_path, model=f'resnet18_{act}', on_divergence=remedy, log_interval=1)), []
    raw = next(p for key, p in run.model.act.named_parameters() if name in key or len(run.model.act.initial) == 1)

    def blow_up(batches, number):
        if number == 4 and not hit:  # in the second epoch
            hit.append(number)
            with torch.no_grad():
                raw.fill_(value)
        return batches[number]

    tap_batches(run, blow_up)
    if remedy == 'stop':
        with pytest.raises(Diverged, match='the run stops'):
            fit(run)
    else:
        assert fit(run)['rollbacks'] == 1
    assert hit
    for path in (tmp_path / 'run').glob('*.pth.tar'):
        for key, tensor in weights(tmp_path, path.name).items():
            assert tensor.isfinite().all(), (path, key)


@pytest.mark.slow
def test_catastrophic_overfitting_is_caught(tmp_path):
    """Accuracy on the training attack rises while PGD accuracy falls: the attack comes to give the labels away here."""
    settings = {'train_split': 'train', 'val_size': 100, 'model_kwargs': {'width': 8}, 'attack': 'fgsm', 'eps': 0.05}
    settings |= {'epochs': 4, 'max_steps': None, 'batch_size': 64, 'lr': 0.1, 'warmup_epochs': 0.25}
    settings |= {'eval_steps': 10, 'model_ema': False}
    run = build(tiny(tmp_path, on_divergence='stop', log_interval=100, **settings))
    robust, per_epoch = run.train_step.perturb, run.batches.steps_per_epoch

    def perturb(x, y, progress):
        if run.step < 2 * per_epoch:
            return robust(x, y, progress)
        return (y / 9).view(-1, 1, 1, 1).expand_as(x)  # the label alone, as a shade of grey

    run.train_step.perturb = perturb
    with pytest.raises(Diverged, match=r'PGD accuracy collapsed from .*catastrophic overfitting'):
        fit(run)
    best = load_checkpoint(tmp_path / 'run/model_best.pth.tar')
    assert best['best'] == max(row['val_pgd_acc'] for row in best['history']) > 0.2 and best['epoch'] <= 2


@pytest.mark.slow
def test_a_token_appears_nowhere(tmp_path):
    token = 'hf_' + 'canary' * 6
    environment = {**ENVIRONMENT, 'HF_TOKEN': token, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')}
    name = 'resnet18_pssilu.fgsm_digits_linf'

    def call(*command, status=0):
        run = warm.run(command, env=environment)
        assert run.returncode == status, run.stderr
        return run.stdout + run.stderr

    whole = [word for word in ARGS if word not in ('--model-kwargs', 'width=4')]  # a release is the network itself
    shown = call(ROOT / 'train/adv_train.py', *whole, '--max-steps', '1', '--output', tmp_path)
    where = ['--cards', tmp_path / 'cards', '--table', tmp_path / 'releases.json']
    (tmp_path / 'releases.json').write_text('{}')
    shown += call('-m', 'timm_robust.staging', 'stage', tmp_path / 'run', name, *where)
    evaluate = ['-m', 'timm_robust.evaluate', tmp_path / 'run', '--dataset', 'digits', '-n', '4', '--attack', 'pgd']
    shown += call(*evaluate, '--results-file', tmp_path / 'results.json')
    shown += call('-c', 'import timm, timm_robust; timm.create_model("wrn34_10_pssilu", pretrained=True)', status=1)
    assert 'canary' not in shown
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b'canary' in path.read_bytes()]
