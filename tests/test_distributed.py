"""Two gloo processes on the CPU: the gradients, the log and the files of one run."""

import csv
import io
import json
import os
import signal
import socket
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
import warm

from timm_robust.distributed import World
from timm_robust.models.checkpoint import load_checkpoint

ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1'}
SCRIPT = Path(__file__).parents[1] / 'train/adv_train.py'
# layer norm alone: batch norm on CPU processes sees their own halves of the batch
ARGS = [
    '--dataset', 'digits', '--model', 'convnext_atto', '--model-kwargs', 'dims=(8,8,16,16)', 'depths=(1,1,1,1)',
    '--eps', '0.1', '--steps', '2', '--eval-steps', '2', '--val-size', '51', '--hflip', '0',
    '--no-random-start', '--experiment', 'run', '--lr', '0.05', '--device', 'cpu',
]  # fmt: skip


def torchrun(*args):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launch = ['-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', port]
    return [*launch, SCRIPT, *ARGS, *args]


# not TRADES: without a random start its surrogate begins where its gradient is rounding noise
@pytest.mark.slow
@pytest.mark.parametrize('settings', [['--awp-gamma', '0.01'], ['--loss', 'mart']], ids=['awp', 'mart'])
def test_two_processes_take_the_steps_of_one_on_the_joint_batch(tmp_path, settings):
    lines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        how = {1: warm.run, 2: warm.run_pair}[processes]
        cut = ['--batch-size', 100 // processes, '--max-steps', 3, '--output', folder]
        run = how([SCRIPT, *ARGS, *settings, *cut])
        assert run.returncode == 0, run.stderr
        assert run.stdout.count('"model"') == 1, 'only the first process prints'
        lines += [json.loads(line) for line in run.stdout.splitlines() if '"model"' in line]  # Gloo may print too
    states = [load_checkpoint(tmp_path / p / 'run/last.pth.tar') for p in ('1', '2')]
    for key, value in states[0]['state_dict'].items():
        torch.testing.assert_close(states[1]['state_dict'][key], value, atol=1e-5, rtol=1e-4)
    rows = [list(csv.DictReader(io.StringIO((tmp_path / p / 'run/summary.csv').read_text()))) for p in ('1', '2')]
    for key in ('train_loss', 'train_acc', 'val_clean_acc', 'val_pgd_acc', 'images', 'lr'):
        assert float(rows[0][-1][key]) == pytest.approx(float(rows[1][-1][key]), abs=1e-4), key
    assert lines[0]['images'] == lines[1]['images'] == 300


@pytest.mark.slow
def test_a_stopped_pair_saves_and_resumes(tmp_path):
    settings = ['--batch-size', 50, '--epochs', 400, '--output', tmp_path, '--log-interval', 1, '--max-steps', 2000]
    process = warm.Popen(torchrun(*settings), stderr=PIPE, env=ONE_THREAD)
    warm.wait_for_line(process, ' step 2/')
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    process.wait(60)
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    assert state['step'] >= 2, rest
    settings[-1] = state['step'] + 2
    run = warm.run_pair([SCRIPT, *ARGS, *settings, '--resume', 'auto', '--allow-changes'])
    assert run.returncode == 0, run.stderr
    assert f'at step {state["step"]} of' in run.stderr


@pytest.mark.slow
def test_two_processes_with_different_settings_are_refused(tmp_path):
    code = 'import os, sys; sys.argv += ["--eps", "0." + os.environ["RANK"] + "1"]; from runpy import run_path; '
    (tmp_path / 'train.py').write_text(code + f'run_path({str(SCRIPT)!r}, run_name="__main__")\n')
    run = warm.run_pair([tmp_path / 'train.py', *ARGS, '--output', tmp_path, '--max-steps', 1, '--batch-size', 50])
    assert run.returncode and 'error: eps 0.01 in process 0, 0.11 in process 1: the processes of a run' in run.stderr
    assert not (tmp_path / 'run').exists()


def test_inside_an_allocation_a_command_runs_alone(monkeypatch, caplog):
    for name in ('WORLD_SIZE', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('SLURM_NTASKS', '2')
    monkeypatch.setenv('SLURM_PROCID', '0')  # as sbatch has it in the script itself
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', '1')
    assert World.join('cpu') == World(torch.device('cpu'))  # without waiting for the other
    assert caplog.messages == ['SLURM_NTASKS is 2, but neither srun nor torchrun started this: it runs alone']
